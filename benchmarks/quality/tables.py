"""``python -m benchmarks.quality.tables``: the paper's two tables, on scenes with truth."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from benchmarks.command import OfPhotographs
from benchmarks.quality.chart import chart
from benchmarks.quality.evaluation import OFFICIAL, SCORES, Bench, Place, places_of
from benchmarks.quality.metric import NETWORKS, Metric, metrics_of
from benchmarks.quality.sampling import device_name
from benchmarks.quality.selection import FILTER_RATES, ranks
from benchmarks.quality.summary import (
    Entry,
    correlations,
    markdown,
    scene_report,
    table_one,
    table_two,
)
from benchmarks.record import ROWS, record
from realfill.config import preset
from realfill.errors import RealFillError
from realfill.sheet import contact_sheet, with_hole

TILES = 6


FOLDER = click.Path(file_okay=False, path_type=Path)
SCENES = click.Path(exists=True, file_okay=False, path_type=Path)
MODEL_OPTIONS = (
    click.option("--base", "base_name", default="nano", show_default=True),
    click.option("--device", default="cpu", show_default=True),
    click.option("--matcher", default="nano", show_default=True, help="Or outdoor, a file."),
    click.option("--preset", "preset_name", default="demo", show_default=True),
    click.option(
        "--scenes",
        "folder",
        type=SCENES,
        help="RealBench, or any folder of scenes; those with target/gt count.",
    ),
    click.option("--demo/--no-demo", default=True, help="The demo's two scenes too."),
)
OUTPUT_OPTIONS = (
    click.option(
        "--out",
        type=FOLDER,
        default=Path("quality-out"),
        show_default=True,
        help="Report, sheets, plots, and candidates that another run takes up.",
    ),
    click.option(
        "--capsules",
        type=FOLDER,
        default=Path("adapt-out/capsules"),
        show_default=True,
        help="Adapters, trained once; adapt_report's are taken up too.",
    ),
    click.option("--rows", type=click.Path(dir_okay=False, path_type=Path), default=ROWS),
    click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
)


def bench_options(*, synthetic: int, seeds: int) -> Callable[..., Callable[..., None]]:
    """Options that the commands of this package share, with a command's own defaults."""
    counts = (
        click.option(
            "--synthetic",
            type=click.IntRange(min=0),
            default=synthetic,
            show_default=True,
            help="How many synthetic scenes.",
        ),
        click.option("--seeds", type=click.IntRange(min=2), default=seeds, show_default=True),
    )

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed((*MODEL_OPTIONS, *counts, *OUTPUT_OPTIONS)):
            command = option(command)
        return command

    return decorated


def progress_on(console: Console) -> Progress:
    """Bars with the time that has passed."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
    )


def adapters_of(bench: Bench, places: Sequence[Place], console: Console) -> list[bytes]:
    """Every scene's adapter, trained where it never was."""
    found = []
    with progress_on(console) as progress:
        for place in places:
            kept = " (kept from before)" if bench.has_capsule(place) else ""
            total = place.config.steps
            task = progress.add_task(f"train {place.scene.name}{kept}", total=total, note="")
            found.append(
                bench.capsule(
                    place,
                    lambda r, task=task: progress.update(  # type: ignore[misc]
                        task, completed=r.step, note=f"loss {r.loss:.4f}"
                    ),
                )
            )
            progress.update(task, completed=total)
    return found


def entries_of(
    bench: Bench,
    places: Sequence[Place],
    seeds: Sequence[int],
    metrics: Sequence[Metric],
    out: Path,
    console: Console,
) -> list[Entry]:
    """Train, sample, judge and draw every scene."""
    capsules = adapters_of(bench, places, console)
    entries = []
    with progress_on(console) as progress:
        task = progress.add_task(f"sample and judge {len(seeds)} seeds", total=len(places), note="")
        for place, capsule in zip(places, capsules, strict=True):
            progress.update(task, note=place.scene.name)
            sides = [bench.candidates(place, seeds, capsule=c) for c in (None, capsule)]
            base = bench.measured(place, sides[0], metrics)
            entry = Entry(place, base, bench.judged(place, sides[1], metrics))
            _sheet(bench, entry, sides[1], seeds).save(out / f"{place.scene.name}.png")
            entries.append(entry)
            progress.advance(task)
    return entries


def _sheet(bench: Bench, entry: Entry, images: Tensor, seeds: Sequence[int]) -> Any:
    """What was given, then the best, then the worst by rank."""
    square, judged = bench.square(entry.place), entry.adapted
    given = [(f"reference {k + 1}", photo) for k, photo in enumerate(entry.place.scene.references)]
    given += [("target", with_hole(square.target, square.mask)), ("truth", square.truth)]

    def tile(k: int) -> tuple[str, Tensor]:
        count = int(judged.scores["count"][k])
        caption = f"seed {seeds[k]}\n{judged.qualities['psnr_db'][k]:.1f} dB, {count} matches"
        return caption, images[k]

    mean = float(judged.qualities["psnr_db"].mean())
    best, worst = judged.order[:TILES], judged.order[-TILES:]
    return contact_sheet(
        [
            (entry.place.scene.name, given),
            (f"Ranked first; all seeds {mean:.1f} dB on average", [tile(k) for k in best]),
            ("Ranked last", [tile(k) for k in worst]),
        ]
    )


def report_of(entries: Sequence[Entry], metrics: Sequence[Metric], seeds: int) -> dict[str, Any]:
    """Everything, as JSON."""
    return {
        "scenes": len(entries),
        "seeds": seeds,
        "table_1": table_one(entries, metrics),
        "table_2": table_two(entries, metrics),
        "spearman": correlations(entries, metrics),
        "by_scene": [scene_report(entry) for entry in entries],
    }


def draw_charts(report: dict[str, Any], entries: Sequence[Entry], out: Path) -> None:
    """Quality against filter rate for every score, and against the official score's place."""
    rates = [100 * rate for rate in FILTER_RATES]
    for name, unit in (("psnr_db", "dB"), ("ssim", "SSIM")):
        kept = {s: report["table_2"][s]["kept"][name] for s in SCORES}
        chart(
            {s: list(zip(rates, values, strict=True)) for s, values in kept.items()},
            title=f"What a filter rate keeps, mean of {len(entries)} scenes",
            x_label="% filtered",
            y_label=unit,
            lines=True,
        ).save(out / f"filter_{name}.png")
    points = []
    for entry in entries:
        quality, score = entry.adapted.qualities["psnr_db"], entry.adapted.scores[OFFICIAL]
        places = (ranks(score) / len(score)).tolist()
        points += list(zip(places, (quality - quality.mean()).tolist(), strict=True))
    chart(
        {OFFICIAL: points},
        title="Every candidate: place by score within its scene",
        x_label="place, 1 is best",
        y_label="dB above its scene's mean",
        lines=False,
    ).save(out / "candidates.png")


def record_rows(report: dict[str, Any], *, device: str, path: Path) -> None:
    """Keep the figures; gains by the lower end of their interval."""
    details: dict[str, Any] = {"device": device, "path": path}
    record("rank.scenes", report["scenes"], "scenes", **details)
    peer = "mean of all seeds"
    gains = report["table_2"][OFFICIAL]["top25_gain"]
    record("rank.top25_psnr_gain_db", gains["psnr_db"]["low"], "dB", peer=peer, **details)
    record("rank.top25_ssim_gain", gains["ssim"]["low"], "SSIM", target=0.0, peer=peer, **details)
    hole = report["table_2"]["count"]["top25_gain"]["psnr_db"]["low"]
    record("rank.top25_psnr_gain_hole_db", hole, "dB", peer=peer, **details)
    for metric, name in (("psnr_db", "psnr"), ("ssim", "ssim")):
        rho = report["spearman"][OFFICIAL][metric]["mean"]
        record(f"rank.spearman_{name}", rho, "rho", **details)
    one = report["table_1"]
    for metric, unit in (("psnr_db", "dB"), ("ssim", "SSIM")):
        record(
            f"quality.adapted_{metric}",
            one["adapted"][metric],
            unit,
            peer="base alone, equal seeds and steps",
            peer_value=one["base"][metric],
            **details,
        )


@click.command(
    cls=OfPhotographs,
    free={"capsules", "names"},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@bench_options(synthetic=10, seeds=128)
@click.option("--steps", type=click.IntRange(min=1), help="Else what the base is sampled with.")
@click.option(
    "--metric",
    "names",
    multiple=True,
    type=click.Choice(sorted(NETWORKS)),
    help="Beside PSNR and SSIM; may be repeated. Its weights must be configured.",
)
def main(
    base_name: str,
    device: str,
    matcher: str,
    folder: Path | None,
    demo: bool,
    synthetic: int,
    seeds: int,
    preset_name: str,
    out: Path,
    capsules: Path,
    rows: Path,
    as_json: bool,
    steps: int | None,
    names: tuple[str, ...],
) -> None:
    """Measure adapters against the base (Table 1) and what ranking is worth (Table 2).

    \b
    Scenes are the demo's two, those of --scenes that have target/gt, and synthetic ones:
        python -m benchmarks.quality.tables --scenes ../shared/scenes
        python -m benchmarks.quality.tables --base sd2 --device cuda --preset paper \\
            --scenes RealBench --no-demo --synthetic 0 --seeds 64 --metric lpips \\
            --rows realbench.jsonl
    Synthetic scenes are trained with 100 steps of the preset, so that there can be many.

    An interrupted run goes on: adapters and candidates are kept on disk. Delete OUT/samples after
    a change of the sampler's code.
    """
    console = Console(stderr=as_json)
    out.mkdir(parents=True, exist_ok=True)
    try:
        metrics = metrics_of(names)
        places = places_of(folder, demo=demo, synthetic=synthetic, config=preset(preset_name))
        bench = Bench(
            base_name, device, matcher, capsules=capsules, samples=out / "samples", steps=steps
        )
        entries = entries_of(bench, places, range(seeds), metrics, out, console)
    except (RealFillError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    report = {"preset": preset_name, "steps": steps, **report_of(entries, metrics, seeds)}
    (out / "tables.json").write_text(json.dumps(report, indent=2) + "\n")
    text = markdown(report, metrics)
    (out / "tables.md").write_text(text)
    draw_charts(report, entries, out)
    record_rows(report, device=device_name(device), path=rows)
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    console.print(Markdown(text))
    gain = report["table_2"][OFFICIAL]["top25_gain"]["psnr_db"]
    word = "excludes zero" if gain["low"] > 0 else "contains zero"
    console.print(f"Keeping the top quarter: {gain['mean']:+.3f} dB; the interval {word}.")
    click.echo(f"Report, sheets and plots: {out}")


if __name__ == "__main__":
    main()
