"""``python -m benchmarks.soak``: load without mercy on the real server, and what must hold."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.command import Measurement
from benchmarks.record import ROWS
from benchmarks.soak.contents import Contents, fill
from benchmarks.soak.driver import Driver
from benchmarks.soak.memory import PROC
from benchmarks.soak.report import keep, summarize, table, write
from benchmarks.soak.run import Findings, Soak, soak
from realfill.base import load_base
from realfill.errors import RealFillError
from registry import RegistryError
from service.libraries import begin_as_served

# Fewer capsules than scenes, so that they come and go all the time; no ranking.
# Room for nine of fifty scenes' weights on the device and for a dozen capsules in memory.
PRESSURE = {
    "REALFILL_ARENA_BYTES": "400000000",
    "REALFILL_HOST_BYTES": "16000000",
    "REALFILL_MATCHER": "none",
    # On a starved machine a registry that is waited for too briefly gives stale answers, which say
    # so. Here every answer has to be right.
    "REALFILL_REGISTRY_PATIENCE_S": "30",
}


def _pair(value: str) -> tuple[str, str]:
    name, equals, text = value.partition("=")
    if not (name and equals):
        raise click.BadParameter(f"{value!r} is not of the form NAME=VALUE.")
    return name, text


def _setting(value: str) -> tuple[str, str]:
    name, text = _pair(value)
    if not name.startswith("REALFILL_"):
        raise click.BadParameter(f"{name} is no setting of the server: REALFILL_... are.")
    return name, text


@click.command(cls=Measurement)
@click.option("--minutes", type=click.FloatRange(min=0.2), default=30.0, show_default=True)
@click.option("--scenes", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("--base", default="nano", show_default=True, help="nano, or a folder.")
@click.option("--workers", type=click.IntRange(min=1), default=8, help="Clients, one request each.")
@click.option(
    "--rate",
    "rate_per_s",
    type=click.FloatRange(min=0, min_open=True),
    help="Arrivals per second, in an open loop instead of the workers.",
)
@click.option("--zipf", "zipf_s", type=click.FloatRange(min=0), default=1.0)
@click.option("--cancels", "cancel_share", type=click.FloatRange(0, 1), default=0.1)
@click.option("--move-every", "move_every_s", type=click.FloatRange(min=0.01), default=1.0)
@click.option("--rechecks", type=click.IntRange(min=0), default=50, help="Pictures drawn alone.")
@click.option("--scale", type=float, default=1.0, help="Of the adapters.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=1), default=120.0)
@click.option("--max-growth", "max_growth_pct", type=float, default=2.0, help="Of memory, in %.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Server's setting.")
@click.option("--field", "fields", multiple=True, metavar="NAME=VALUE", help="More form fields.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--rows", type=click.Path(dir_okay=False, path_type=Path), default=ROWS)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("soak-out"))
def main(
    minutes: float,
    settings: tuple[str, ...],
    fields: tuple[str, ...],
    as_json: bool,
    rows: Path,
    out: Path,
    **options: Any,
) -> None:
    """Soak the real server, and end with status 1 where it breaks a promise."""
    if not PROC.is_dir():
        raise click.ClickException(f"Memory is read from {PROC}: run the soak on Linux.")
    plan = Soak(
        duration_s=60 * minutes,
        environment={**PRESSURE, **dict(map(_setting, settings))},
        fields=dict(map(_pair, fields)),
        **options,
    )
    try:
        with tempfile.TemporaryDirectory(prefix="realfill-soak-") as folder:
            findings = _run(plan, Path(folder) / "registry", out)
    except (RealFillError, RegistryError, RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from error
    summary = summarize(plan, findings)
    write(out, findings, summary)
    keep(summary, rows)
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        Console().print(table(summary))
        click.echo(f"Report, outcomes, log and picture: {out}")
    for sentence in summary["violations"]:
        click.echo(sentence, err=True)
    sys.exit(1 if summary["violations"] else 0)


def _run(plan: Soak, registry: Path, out: Path) -> Findings:
    """Fill the registry and soak, with a bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        contents = _filled(plan, registry, progress)
        task = progress.add_task("the server starts", total=plan.duration_s)

        def watch(driver: Driver) -> None:
            now_s = min(driver.clock(), plan.duration_s)
            progress.update(task, completed=now_s, description=_state(driver))

        return soak(plan, contents, registry, out, watch)


def _filled(plan: Soak, registry: Path, progress: Progress) -> Contents:
    base = load_base(plan.base, device="cpu", dtype=torch.float32)
    task = progress.add_task(f"publishing {plan.scenes} scenes", total=plan.scenes)
    return fill(
        base,
        registry,
        scenes=plan.scenes,
        scale=plan.scale,
        seed=plan.seed,
        on_scene=lambda: progress.advance(task),
    )


def _state(driver: Driver) -> str:
    """The counts so far, in a line."""
    seen = driver.record
    ended = {kind: seen.count(kind) for kind in ("answer", "throttled", "cancelled")}
    words = [
        f"{ended['answer']} answers",
        f"{ended['throttled']} throttled",
        f"{ended['cancelled']} cancelled",
        f"{len(seen.outcomes) - sum(ended.values())} lost",
        f"{len(seen.gallery.far)} differing",
        f"{seen.moves} moves",
    ]
    if seen.memory:
        words.append(f"{seen.memory[-1].rss_bytes / 2**20:.0f} MiB")
    return ", ".join(words)


if __name__ == "__main__":
    begin_as_served()
    main()
