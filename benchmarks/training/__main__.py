"""``python -m benchmarks.training``: operations beside the public script's, time without a pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from benchmarks.command import Measurement
from benchmarks.record import ROWS, Row, record, table_of
from benchmarks.training.costs import count_costs
from benchmarks.training.turns import seconds_in_turns
from realfill.allocator import allocator_variables, begin_with
from realfill.base import Base, load_base
from realfill.config import preset
from realfill.errors import RealFillError
from realfill.nano.demo import motorcycle_scene
from realfill.precision import training_dtype

# The public script's run for three references and the target, and ours of as many samples.
SCRIPT_STEPS = 2000
PICTURES = 4
BATCH = 16
POOL = 512


@dataclass(frozen=True)
class Bench:
    """What is measured, and where rows go.

    Attributes:
        base: Name of the base that is trained on.
        counted: Name of the base whose operations are counted.
        steps: Of the timed runs.
    """

    base: str
    counted: str
    steps: int
    rows: Path

    def load(self, name: str) -> Base:
        """A base as training takes it on a CPU."""
        return load_base(name, device="cpu", dtype=training_dtype("cpu"))


def bench_flops(bench: Bench) -> list[Row]:
    """Operations of the public script's run, and of ours with as many samples."""
    with Console().status(f"counting the operations of {bench.counted}"):
        costs = count_costs(bench.load(bench.counted), motorcycle_scene())
    theirs = costs.reference(steps=SCRIPT_STEPS, pictures=PICTURES)
    ours = costs.ours(steps=SCRIPT_STEPS * PICTURES // BATCH, batch=BATCH, pool=POOL)
    peer = "the public script on as many samples, its validations included"
    ratio = theirs / ours
    return [
        record("train.flops_ratio_reference", ratio, "x", peer=peer, ratio=ratio, path=bench.rows),
        record(
            "train.run_pflop",
            ours / 1e15,
            "PFLOP",
            better="lower",
            peer=peer,
            peer_value=theirs / 1e15,
            path=bench.rows,
        ),
        *(
            record(f"train.{name}_tflop", count / 1e12, "TFLOP", better="lower", path=bench.rows)
            for name, count in (("sample", costs.sample), ("picture", costs.picture))
        ),
    ]


def bench_wall(bench: Bench) -> list[Row]:
    """Time of the demo's training, and of the same with fresh pictures in every step."""
    bases = [bench.load(bench.base) for _ in range(2)]
    pooled = preset("demo", steps=bench.steps)
    configs = [pooled, preset("demo", steps=bench.steps, pool=0)]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("training, with a pool and without", total=2 * bench.steps)
        ours_s, theirs_s = seconds_in_turns(
            bases, motorcycle_scene(), configs, lambda: progress.advance(task)
        )
    peer = "the same without a pool, in turns"
    ratio = theirs_s / ours_s
    return [
        record("train.wall_ratio_unpooled", ratio, "x", peer=peer, ratio=ratio, path=bench.rows),
        record(
            "train.wall_s",
            ours_s,
            "s",
            better="lower",
            peer=peer,
            peer_value=theirs_s,
            path=bench.rows,
        ),
    ]


PARTS: dict[str, Callable[[Bench], list[Row]]] = {"flops": bench_flops, "wall": bench_wall}


@click.command(cls=Measurement)
@click.option("--base", default="nano", show_default=True, help="To train on, for the part wall.")
@click.option(
    "--counted", default="sd2-random", show_default=True, help="Whose operations, for flops."
)
@click.option(
    "--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="Default: all."
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=preset("demo").steps, show_default=True
)
@click.option("--rows", type=click.Path(dir_okay=False, path_type=Path), default=ROWS)
def main(base: str, counted: str, parts: tuple[str, ...], steps: int, rows: Path) -> None:
    """Measure what training a scene costs on this machine's CPU, and record the rows."""
    bench = Bench(base=base, counted=counted, steps=steps, rows=rows)
    measured: list[Row] = []
    try:
        for name in parts or PARTS:
            measured += PARTS[name](bench)
    except RealFillError as error:
        raise click.ClickException(str(error)) from error
    Console().print(table_of(measured))


if __name__ == "__main__":
    # As the command trains.
    begin_with(allocator_variables())
    main()
