"""``python -m benchmarks.quality.adapt_report``: does a scene's adapter earn its keep?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.command import OfPhotographs
from benchmarks.quality.adaptation import Outcome, capsule_path, measure, sheet_rows, trained
from benchmarks.quality.fills import CLASSICAL
from benchmarks.quality.sampling import device_name
from benchmarks.record import ROWS, record
from realfill.base import load_base
from realfill.config import TrainingConfig, preset
from realfill.errors import RealFillError
from realfill.precision import training_dtype
from realfill.rank import loftr
from realfill.scene import Scene, load_scene
from realfill.sheet import contact_sheet
from service.engine import Runner

GAIN_DB = 2.5
MATCHES_RATIO = 2.0


@dataclass(frozen=True)
class Verdict:
    """One part of the bar that adapters have to clear."""

    claim: str
    reached: float
    bound: float
    met: bool


def scenes_of(folder: Path | None, *, demo: bool) -> list[Scene]:
    """The demo's scenes, and every scene of the folder that has a ground truth."""
    found: list[Scene] = []
    if demo:
        from realfill.nano.demo import coffee_scene, motorcycle_scene

        found += [motorcycle_scene(), coffee_scene()]
    paths = sorted(folder.glob("*/target/gt.*")) if folder is not None else []
    return found + [load_scene(path.parents[1]) for path in paths]


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Means over the scenes."""
    gains = {outcome.scene.name: outcome.gain_db for outcome in outcomes}
    base, adapted = (
        [fmean(fills.matches) for fills in side]
        for side in ([o.base for o in outcomes], [o.adapted for o in outcomes])
    )
    # Where the base has no match at all, it counts as if one seed of one scene had one.
    least = 1 / sum(len(outcome.base.matches) for outcome in outcomes)
    return {
        "scenes": len(outcomes),
        "psnr_gain_db": fmean(gains.values()),
        "worst_scene": min(gains, key=lambda name: gains[name]),
        "worst_scene_gain_db": min(gains.values()),
        "ssim": fmean(fmean(o.adapted.ssim) for o in outcomes),
        "base_ssim": fmean(fmean(o.base.ssim) for o in outcomes),
        "classical_ssim": {
            name: fmean(o.classical[name].ssim[0] for o in outcomes) for name in CLASSICAL
        },
        "matches": fmean(adapted),
        "base_matches": fmean(base),
        "matches_ratio": fmean(adapted) / max(fmean(base), least),
        "best_psnr_gain_db": fmean(
            o.adapted.means()["best_psnr_db"] - fmean(o.adapted.psnr_db) for o in outcomes
        ),
    }


def verdicts_of(summary: dict[str, Any]) -> list[Verdict]:
    """The bar, part by part."""
    peer = max(summary["classical_ssim"], key=lambda name: summary["classical_ssim"][name])
    bound = summary["classical_ssim"][peer]
    gain, worst = summary["psnr_gain_db"], summary["worst_scene_gain_db"]
    ssim, ratio = summary["ssim"], summary["matches_ratio"]
    return [
        Verdict("mean PSNR gain over the base, dB", gain, GAIN_DB, gain >= GAIN_DB),
        Verdict(f"gain on the worst scene, {summary['worst_scene']}, dB", worst, 0, worst > 0),
        Verdict(f"SSIM against {peer}, the better classical fill", ssim, bound, ssim > bound),
        Verdict("matches, times those of the base", ratio, MATCHES_RATIO, ratio >= MATCHES_RATIO),
    ]


def table_of(outcomes: Sequence[Outcome], seeds: int) -> Table:
    """One line per scene; dB and SSIM inside the hole, matches beside those of the truth."""
    table = Table(title=f"Inside the hole, means over {seeds} seeds", title_justify="left")
    table.add_column("scene")
    headings = ("base dB", "adapted dB", "gain dB", "best dB", "base SSIM", "adapted SSIM")
    for heading in (*headings, *CLASSICAL, "base matches", "adapted", "truth"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        base, adapted = outcome.base.means(), outcome.adapted.means()
        numbers = [base["psnr_db"], adapted["psnr_db"], outcome.gain_db, adapted["best_psnr_db"]]
        similar = [base["ssim"], adapted["ssim"]]
        similar += [outcome.classical[name].ssim[0] for name in CLASSICAL]
        table.add_row(
            outcome.scene.name,
            *(f"{number:.2f}" for number in numbers),
            *(f"{number:.3f}" for number in similar),
            f"{base['matches']:.1f}",
            f"{adapted['matches']:.1f}",
            str(outcome.truth.matches[0]),
        )
    return table


def record_rows(summary: dict[str, Any], *, device: str, path: Path) -> None:
    """Keep the means."""
    details: dict[str, Any] = {"device": device, "path": path}
    record("adapt.scenes", summary["scenes"], "scenes", **details)
    peer = "base alone, equal seeds and steps"
    record("adapt.psnr_gain_db", summary["psnr_gain_db"], "dB", peer=peer, **details)
    record("adapt.worst_scene_gain_db", summary["worst_scene_gain_db"], "dB", peer=peer, **details)
    record(
        "adapt.matches_ratio",
        summary["matches_ratio"],
        "x",
        target=MATCHES_RATIO,
        peer=peer,
        **details,
    )
    classical = summary["classical_ssim"]
    better = max(classical, key=lambda name: classical[name])
    record(
        "adapt.ssim",
        summary["ssim"],
        "SSIM",
        target=classical[better],
        peer=f"{better} fill, the better of {' and '.join(CLASSICAL)}",
        peer_value=classical[better],
        **details,
    )
    record(
        "adapt.best_psnr_gain_db",
        summary["best_psnr_gain_db"],
        "dB",
        peer="mean of all seeds",
        **details,
    )


def outcomes_of(
    scenes: Sequence[Scene],
    config: TrainingConfig,
    *,
    base_name: str,
    device: str,
    matcher: str,
    seeds: range,
    steps: int | None,
    out: Path,
    console: Console,
) -> list[Outcome]:
    """Train what is not in ``out`` yet, measure every scene and draw its contact sheet."""
    learner = load_base(base_name, device=device, dtype=training_dtype(device))
    capsules = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for scene in scenes:
            path = capsule_path(out / "capsules", learner, scene, config)
            kept = " (kept from before)" if path.is_file() else ""
            task = progress.add_task(f"train {scene.name}{kept}", total=config.steps, loss="")
            capsules.append(
                trained(
                    path,
                    learner,
                    scene,
                    config,
                    lambda r, task=task: progress.update(  # type: ignore[misc]
                        task, completed=r.step, loss=f"loss {r.loss:.4f}"
                    ),
                )
            )
            progress.update(task, completed=config.steps)
    runner = Runner(load_base(base_name, device=device))
    judge = loftr(matcher, device)
    outcomes = []
    with Progress(console=console) as progress:
        task = progress.add_task(f"sample {len(seeds)} seeds of each scene", total=len(scenes))
        for scene, capsule in zip(scenes, capsules, strict=True):
            outcome = measure(runner, judge, scene, capsule, seeds, steps=steps)
            contact_sheet(sheet_rows(outcome, seeds)).save(out / f"{scene.name}.png")
            outcomes.append(outcome)
            progress.advance(task)
    return outcomes


@click.command(cls=OfPhotographs)
@click.option("--base", "base_name", default="nano", show_default=True, help="As for load_base.")
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--scenes",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of scenes with target/gt.",
)
@click.option("--demo/--no-demo", default=True, help="Measure the demo's two scenes too.")
@click.option("--seeds", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), help="Else what the base is sampled with.")
@click.option("--preset", "preset_name", default="demo", show_default=True)
@click.option("--matcher", default="nano", show_default=True, help="nano, outdoor or a file.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("adapt-out"),
    show_default=True,
    help="Report, contact sheets, and capsules that a second run takes up.",
)
@click.option("--rows", type=click.Path(dir_okay=False, path_type=Path), default=ROWS)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, and no table.")
def main(
    base_name: str,
    device: str,
    folder: Path | None,
    demo: bool,
    seeds: int,
    steps: int | None,
    preset_name: str,
    matcher: str,
    out: Path,
    rows: Path,
    as_json: bool,
) -> None:
    """Adapt the demo's and other scenes, and compare the adapted model with the base alone."""
    console = Console(stderr=as_json)
    out.mkdir(parents=True, exist_ok=True)
    try:
        config = preset(preset_name)
        scenes = scenes_of(folder, demo=demo)
        if not scenes:
            raise click.ClickException(f"{folder} has no scene with target/gt: give --demo.")
        outcomes = outcomes_of(
            scenes,
            config,
            base_name=base_name,
            device=device,
            matcher=matcher,
            seeds=range(seeds),
            steps=steps,
            out=out,
            console=console,
        )
    except (RealFillError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    summary = summarize(outcomes)
    verdicts = verdicts_of(summary)
    report = {
        "preset": preset_name,
        "configuration_digest": config.digest,
        "seeds": seeds,
        "steps": steps,
        "means": summary,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "scenes": [outcome.report() for outcome in outcomes],
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    record_rows(summary, device=device_name(device), path=rows)
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    console.print(table_of(outcomes, seeds))
    for verdict in verdicts:
        word = "met   " if verdict.met else "MISSED"
        console.print(f"{word} {verdict.claim}: {verdict.reached:.3g}, bar {verdict.bound:.3g}")
    click.echo(f"Report and contact sheets: {out}")


if __name__ == "__main__":
    main()
