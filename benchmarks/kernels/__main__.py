"""``python -m benchmarks.kernels``: every op beside torch and beside the machine's limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import Measurement
from benchmarks.engine.timing import quantile
from benchmarks.kernels.cases import CASES, SIZES, Maker
from benchmarks.kernels.contest import COMPILED, COPY, EAGER, Timings, contest, product_flops_per_s
from benchmarks.record import ROWS, record


def rows_of(timings: Timings, *, cuda: bool, path: Path) -> None:
    """Record one case: percentiles beside torch eager, bytes, bandwidth, share of the limit."""
    stem = f"kernels.{timings.case.op}.{timings.case.name}"

    def keep(what: str, value: float, unit: str, **details: Any) -> None:
        name = f"{stem}_{what}.cuda" if cuda else f"{stem}_{what}"
        record(name, value, unit, path=path, **details)

    for percent in (20, 50, 80):
        keep(
            f"p{percent}_ms",
            1000 * quantile(timings.ours_s, percent),
            "ms",
            better="lower",
            peer=EAGER,
            peer_value=1000 * quantile(timings.peers_s[EAGER], percent),
        )
    if COMPILED in timings.peers_s:
        ratio = median(timings.peers_s[COMPILED]) / median(timings.ours_s)
        keep("ratio_compiled", ratio, "x", peer=COMPILED, ratio=ratio)
    keep("moved_mb", timings.case.moved_bytes / 1e6, "MB", better="lower")
    copied = timings.gb_per_s(timings.copy_s)
    keep("gb_per_s", timings.gb_per_s(timings.ours_s), "GB/s", peer=COPY, peer_value=copied)
    limit, seconds = timings.limit
    keep("limit_pct", 100 * seconds / median(timings.ours_s), "%", peer=limit)


def table_of(measured: Sequence[Timings]) -> Table:
    """One line for each case."""
    table = Table(title="Medians, and from the 20th to the 80th percentile", title_justify="left")
    for heading in (
        "op",
        "size",
        "ours ms",
        "eager ms",
        "ratio",
        "compiled",
        "MB",
        "GB/s",
        "limit",
    ):
        table.add_column(heading, justify="left" if heading in ("op", "size", "limit") else "right")
    for timings in measured:
        ours, eager = timings.ours_s, timings.peers_s[EAGER]
        compiled = timings.peers_s.get(COMPILED)
        limit, seconds = timings.limit
        table.add_row(
            timings.case.op,
            timings.case.name,
            _spread(ours),
            _spread(eager),
            f"{median(eager) / median(ours):.2f}x",
            f"{median(compiled) / median(ours):.2f}x" if compiled else "",
            f"{timings.case.moved_bytes / 1e6:.2f}",
            f"{timings.gb_per_s(ours):.1f}",
            f"{100 * seconds / median(ours):.0f} % of {'copy' if limit == COPY else 'product'}",
        )
    return table


def _spread(seconds: Sequence[float]) -> str:
    low, middle, high = (1000 * quantile(seconds, percent) for percent in (20, 50, 80))
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


@click.command(cls=Measurement, free={"device", "ops", "compiled"})
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda with SD2's sizes.")
@click.option("--op", "ops", multiple=True, type=click.Choice(list(CASES)), help="Default: all.")
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=50, show_default=True)
@click.option(
    "--compile/--no-compile", "compiled", default=True, help="Whether torch.compile is a peer."
)
@click.option("--rows", type=click.Path(dir_okay=False, path_type=Path), default=ROWS)
def main(
    device: str, ops: tuple[str, ...], batch: int, repeats: int, compiled: bool, rows: Path
) -> None:
    """Measure the ops on this machine, beside torch, and record the rows."""
    console = Console(width=150)
    place = torch.device(device)
    cuda = place.type == "cuda"
    if cuda and not torch.cuda.is_available():
        raise click.ClickException("There is no CUDA device here; use --device cpu.")
    # As the service does it.
    dtype = torch.bfloat16 if cuda else torch.float32
    maker = Maker(place, dtype, batch, SIZES["cuda" if cuda else "cpu"])
    measured: list[Timings] = []
    try:
        peak = product_flops_per_s(place, dtype)
        for op in ops or CASES:
            for case in CASES[op](maker):
                with console.status(f"measuring {op} {case.name}"):
                    measured.append(
                        contest(case, place, repeats=repeats, product_flops=peak, compiled=compiled)
                    )
                rows_of(measured[-1], cuda=cuda, path=rows)
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    console.print(table_of(measured))
    for timings in measured:
        for reason in timings.skipped:
            console.print(reason)


if __name__ == "__main__":
    main()
