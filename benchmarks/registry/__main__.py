"""``python -m benchmarks.registry``: the registry's rates, and MLflow's beside them, as rows."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command import Measurement
from benchmarks.record import ROWS, Row, record
from benchmarks.registry import peer, rates
from benchmarks.registry.contents import fill
from registry import Registry, RegistryError
from registry.database import Database

PEER_FOLDER = Path(__file__).resolve().parents[2] / ".venv-mlflow"
SCENES = 1000
VERSIONS = 100_000


@dataclass(frozen=True)
class Bench:
    """Where to measure, how often, and where rows go."""

    folder: Path
    versions: int
    repeats: int
    rows: Path
    peer_folder: Path | None

    def keep(self, name: str, value: float, unit: str, **details: Any) -> Row:
        """Record a row."""
        return record(f"registry.{name}", value, unit, path=self.rows, **details)


def bench_rates(bench: Bench) -> list[Row]:
    """Publish, alias and resolve on a new registry, against MLflow's client."""
    registry = Registry.open(bench.folder / "small")
    ours = {
        "register": rates.publish(registry, bench.repeats),
        "alias": rates.set_alias(registry, bench.repeats),
        "resolve": rates.resolve(registry, ["publish@next"] * bench.repeats),
    }
    registry.close()
    rows = [
        bench.keep("publish_per_s", 1 / median(ours["register"]), "1/s"),
        bench.keep("alias_per_s", 1 / median(ours["alias"]), "1/s"),
        bench.keep("resolve_per_s", 1 / median(ours["resolve"]), "1/s"),
    ]
    if bench.peer_folder is None:
        return rows
    theirs = peer.measure(bench.peer_folder, bench.folder / "mlflow.db", bench.repeats)
    for name, seconds in theirs.seconds.items():
        # Registering is not the same work: ours checks and stores 64 kB, theirs notes a path.
        ratio = median(seconds) / median(ours[name])
        rows.append(bench.keep(f"{name}.ratio_mlflow", ratio, "x", peer=theirs.name, ratio=ratio))
        milliseconds = [1000 * median(of) for of in (ours[name], seconds)]
        details = {"better": "lower", "peer": theirs.name, "peer_value": milliseconds[1]}
        rows.append(bench.keep(f"{name}.p50_ms", milliseconds[0], "ms", **details))
    return rows


def bench_many(bench: Bench) -> list[Row]:
    """Pages and resolves in a registry of very many versions."""
    place = bench.folder / "many"
    Registry.open(place).close()
    database = Database(f"sqlite:///{place.resolve()}/registry.db")
    fill(database, SCENES, bench.versions // SCENES)
    database.close()
    registry = Registry.open(place)
    names = [f"scene-{97 * turn % SCENES + 1:05}" for turn in range(bench.repeats)]
    resolved = rates.resolve(registry, [*names, *(f"{name}@1" for name in names)])
    # A small try must not pass for the measurement.
    size = f"{bench.versions // 1000}k"
    title = "resolve" if bench.versions == VERSIONS else f"resolve{size}"
    rows = [bench.keep(f"{title}.p95_ms", _p95_ms(resolved), "ms", better="lower")]
    paged = rates.pages(registry, bench.repeats)
    registry.close()
    title = f"list{size}"
    for name, seconds in paged.items():
        rows.append(bench.keep(f"{title}.{name}.p95_ms", _p95_ms(seconds), "ms", better="lower"))
    # The slowest kind of page that a list shows by itself; searches have rows of their own.
    lists = max(_p95_ms(paged[name]) for name in ("scenes", "versions", "newest", "deep"))
    return [*rows, bench.keep(f"{title}.p95_ms", lists, "ms", better="lower")]


def bench_fetch(bench: Bench) -> list[Row]:
    """A capsule of 6 MB, from the store and from the cache."""
    found = rates.fetch(str(bench.folder / "small"), None, bench.folder / "cache", bench.repeats)
    return [
        bench.keep(f"fetch6mb.{name}_p50_ms", 1000 * median(seconds), "ms", better="lower")
        for name, seconds in found.items()
    ]


def _p95_ms(seconds: list[float]) -> float:
    return 1000 * float(np.percentile(seconds, 95))


def _table(rows: list[Row]) -> Table:
    table = Table(title=rows[0].machine, title_justify="left")
    for heading in ("row", "value", "target", "ratio", "peer"):
        table.add_column(heading)
    for row in rows:
        target = "" if row.target is None else f"{row.target:g}"
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}x"
        table.add_row(row.name, f"{row.value:.4g} {row.unit}", target, ratio, row.peer or "")
    return table


PARTS = {"rates": bench_rates, "many": bench_many, "fetch": bench_fetch}


@click.command(cls=Measurement, free={"versions", "peer_folder", "no_peer"})
@click.option(
    "--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="Default: all."
)
@click.option(
    "--versions",
    type=click.IntRange(SCENES),
    default=VERSIONS,
    show_default=True,
    help="Versions of the large registry that is listed and searched.",
)
@click.option(
    "--repeats",
    type=click.IntRange(2),
    default=200,
    show_default=True,
    help="How often each call is timed.",
)
@click.option(
    "--peer-folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=PEER_FOLDER,
    help="Virtual environment of MLflow, made when it is missing.",
)
@click.option("--no-peer", is_flag=True, help="Measure without MLflow.")
@click.option(
    "--rows",
    type=click.Path(dir_okay=False, path_type=Path),
    default=ROWS,
    help="File that the rows are added to; by default the project's own.",
)
def main(
    parts: tuple[str, ...],
    versions: int,
    repeats: int,
    peer_folder: Path,
    no_peer: bool,
    rows: Path,
) -> None:
    """Measure the registry on this machine, in a temporary directory, and record the rows."""
    console = Console()
    measured: list[Row] = []
    try:
        with tempfile.TemporaryDirectory(prefix="realfill-bench-") as folder:
            place = None if no_peer else peer_folder
            bench = Bench(Path(folder), versions, repeats, rows, place)
            for name in parts or PARTS:
                with console.status(f"measuring {name}"):
                    measured += PARTS[name](bench)
    except (RegistryError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error
    console.print(_table(measured))


if __name__ == "__main__":
    main()
