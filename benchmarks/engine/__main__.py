"""``python -m benchmarks.engine``: swaps, sample-steps and the service's overhead, as rows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.engine import swaps
from benchmarks.engine.rates import compare, sample_steps_per_s
from benchmarks.engine.service import PEER as ENGINE
from benchmarks.engine.service import measure_overhead
from benchmarks.engine.swaps import measure_swaps
from benchmarks.engine.timing import quantile
from benchmarks.record import ROWS, Row, record
from realfill.base import Base, load_base
from realfill.errors import RealFillError

BATCHES = {"cpu": (1, 2, 4, 8), "cuda": (1, 2, 4, 8, 16)}
RANKS = {"nano": 32}
PERCENTS = (20, 50, 80, 99)


@dataclass(frozen=True)
class Bench:
    """What is measured, how often, and where rows go.

    Attributes:
        repeats: Of everything that takes a second; quick things are repeated more often.
        requests: To the service, for each image size.
    """

    base: Base
    base_name: str
    rank: int
    batches: tuple[int, ...]
    steps: int
    samples: int
    repeats: int
    requests: int
    rows: Path

    def keep(self, name: str, value: float, unit: str, **details: Any) -> Row:
        """Record a row under its name, or under its name on a GPU."""
        on_cuda = self.base.device.type == "cuda"
        return record(f"{name}.cuda" if on_cuda else name, value, unit, path=self.rows, **details)


def bench_swap(bench: Bench) -> list[Row]:
    """Swap between adapters in memory: quantiles, and how many times faster than diffusers."""
    measured = measure_swaps(
        bench.base, rank=bench.rank, repeats=20 * bench.repeats, peer_repeats=bench.repeats
    )
    ours, theirs = measured.ours_s, measured.peer_s
    rows = []
    for percent in PERCENTS:
        value = 1000 * quantile(ours, percent)
        # The p99 of the peer's few repeats would be their maximum, and says little.
        peer = {"peer": swaps.PEER, "peer_value": 1000 * quantile(theirs, percent)}
        details = peer if percent < 99 else {}
        rows.append(bench.keep(f"swap.p{percent}_ms", value, "ms", better="lower", **details))
    ratio = median(theirs) / median(ours)
    rows.append(bench.keep("swap.ratio_load_lora", ratio, "x", peer=swaps.PEER, ratio=ratio))
    return rows


def bench_rate(bench: Bench) -> list[Row]:
    """Sample-steps per second of a batch, encoding of the masked image included."""
    rows = []
    for batch in bench.batches:
        rates = sample_steps_per_s(bench.base, batch, steps=bench.steps, repeats=bench.repeats)
        name = f"engine.sample_steps_per_s.b{batch}"
        rows.append(bench.keep(name, median(rates), "sample-steps/s"))
    return rows


def bench_diffusers(bench: Bench) -> list[Row]:
    """One job, encoding and decoding included, against diffusers at equal steps and seeds."""
    compared = compare(bench.base, samples=bench.samples, steps=bench.steps, repeats=bench.repeats)
    first, batched = compared
    rows = [
        bench.keep(name, of.ratio, "x", peer=of.peer, ratio=of.ratio)
        for name, of in (
            ("engine.ratio_diffusers", first),
            ("engine.ratio_diffusers_batched", batched),
        )
    ]
    rows += [
        bench.keep(
            f"engine.job_p{percent}_s",
            quantile(first.ours_s, percent),
            "s",
            better="lower",
            peer=first.peer,
            peer_value=quantile(first.peer_s, percent),
        )
        for percent in (20, 50, 80)
    ]
    return rows


def bench_service(bench: Bench) -> list[Row]:
    """What a request takes beyond its job on the engine."""
    with tempfile.TemporaryDirectory(prefix="realfill-bench-") as folder:
        overheads = measure_overhead(
            bench.base, bench.base_name, Path(folder), requests=bench.requests, rank=bench.rank
        )
    rows = []
    for image, overhead in overheads.items():
        p50 = median(overhead.request_s) - median(overhead.engine_s)
        name = "service.overhead_p50_ms" + ("" if image == "square" else f".{image}")
        rows.append(bench.keep(name, 1000 * p50, "ms", better="lower", peer=ENGINE))
        rows.append(
            bench.keep(
                f"service.request_p50_ms.{image}",
                1000 * median(overhead.request_s),
                "ms",
                better="lower",
                peer=ENGINE,
                peer_value=1000 * median(overhead.engine_s),
            )
        )
    return rows


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "swap": bench_swap,
    "rate": bench_rate,
    "diffusers": bench_diffusers,
    "service": bench_service,
}


def table_of(rows: Sequence[Row]) -> Table:
    """The rows, beside their targets and peers."""
    table = Table(title=f"{rows[0].device}, {rows[0].machine}", title_justify="left")
    for heading in ("row", "value", "target", "ratio", "peer"):
        table.add_column(heading, justify="right" if heading in ("value", "target") else "left")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.value:.4g} {row.unit}",
            "" if row.target is None else f"{row.target:g}",
            "" if row.ratio is None else f"{row.ratio:.3g}x",
            row.peer or "",
        )
    return table


@click.command()
@click.option("--base", "base_name", default="nano", show_default=True, help="As for load_base.")
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="Default: all."
)
@click.option("--rank", type=click.IntRange(1, 128), help="Of adapters: 32 on nano, else 8.")
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--samples", type=click.IntRange(min=1), default=4, help="Seeds of a job.")
@click.option("--repeats", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--requests", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--rows", type=click.Path(dir_okay=False, path_type=Path), default=ROWS)
def main(
    base_name: str,
    device: str,
    parts: tuple[str, ...],
    rank: int | None,
    steps: int,
    samples: int,
    repeats: int,
    requests: int,
    rows: Path,
) -> None:
    """Measure swap, engine and service on this machine, and record the rows."""
    console = Console()
    kind = torch.device(device).type
    # As the service does it.
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    measured: list[Row] = []
    try:
        bench = Bench(
            base=load_base(base_name, device=device, dtype=dtype),
            base_name=base_name,
            rank=rank or RANKS.get(base_name, 8),
            batches=BATCHES.get(kind, BATCHES["cpu"]),
            steps=steps,
            samples=samples,
            repeats=repeats,
            requests=requests,
            rows=rows,
        )
        for name in parts or PARTS:
            with console.status(f"measuring {name}"):
                measured += PARTS[name](bench)
    except (RealFillError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error
    console.print(table_of(measured))


if __name__ == "__main__":
    main()
