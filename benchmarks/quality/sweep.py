"""``python -m benchmarks.quality.sweep``: how few steps are enough, with which sampler."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import click
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

from benchmarks.command import OfPhotographs
from benchmarks.quality.chart import chart
from benchmarks.quality.evaluation import Bench, Judgement, Place, places_of
from benchmarks.quality.metric import NETWORKS, Metric, metrics_of
from benchmarks.quality.sampling import device_name
from benchmarks.quality.selection import spearman, standard_error
from benchmarks.quality.summary import markdown_table
from benchmarks.quality.tables import adapters_of, bench_options, progress_on
from benchmarks.record import record
from realfill.config import preset
from realfill.errors import RealFillError

# The first is what the others are held against. Source: RealFill, arXiv:2309.16668, appendix A.1.
SETTINGS = (
    ("ddpm", 200),
    ("ddpm", 100),
    ("ddpm", 50),
    ("ddim", 50),
    ("dpm++2m", 50),
    ("dpm++2m", 25),
    ("dpm++2m", 15),
    ("ddim", 25),
    ("ddim", 12),
    ("ddim", 6),
    ("ddim", 3),
    ("ddim", 2),
)


@dataclass(frozen=True)
class Line:
    """One sampler and number of steps.

    Attributes:
        means: By metric, over seeds and scenes.
        matches: Mean score.
        agreement: Spearman's coefficient of the scores with the first line's, same seeds, mean
            over scenes.
        within: By metric, whether the mean is at most the first line's standard error worse.
        accepted: Whether it may stand for the first line.
    """

    sampler: str
    steps: int
    means: dict[str, float]
    matches: float
    agreement: float
    within: dict[str, bool]
    accepted: bool


def lines_of(
    judged: Sequence[Sequence[Judgement]],
    metrics: Sequence[Metric],
    settings: Sequence[tuple[str, int]],
) -> list[Line]:
    """Means of every setting, and which ones are as good as the first.

    A setting is accepted whose mean is worse than the first's by at most that one's standard error
    over the seeds: in DreamSim where it was measured, else in every metric there is.

    Args:
        judged: For each setting, the judgements of each scene.
        metrics: What was measured.
        settings: Sampler and steps, the reference first.
    """
    deciding = [m for m in metrics if m.name == "dreamsim"] or list(metrics)
    found = []
    for (name, steps), scenes in zip(settings, judged, strict=True):
        within = {m.name: _within(scenes, judged[0], m) for m in metrics}
        pairs = zip(scenes, judged[0], strict=True)
        found.append(
            Line(
                sampler=name,
                steps=steps,
                means={m.name: fmean(float(q.mean()) for q in _rows(scenes, m)) for m in metrics},
                matches=fmean(float(j.scores["count"].mean()) for j in scenes),
                agreement=fmean(spearman(a.scores["count"], b.scores["count"]) for a, b in pairs),
                within=within,
                accepted=all(within[m.name] for m in deciding),
            )
        )
    return found


def fastest(lines: Sequence[Line]) -> Line:
    """The accepted line with the fewest steps; the first, if no other is."""
    return min((line for line in lines if line.accepted), key=lambda line: line.steps)


def _rows(scenes: Sequence[Judgement], metric: Metric) -> list[Tensor]:
    return [judgement.qualities[metric.name] for judgement in scenes]


def _within(scenes: Sequence[Judgement], first: Sequence[Judgement], metric: Metric) -> bool:
    mine, reference = _rows(scenes, metric), _rows(first, metric)
    gap = fmean(float(q.mean()) for q in mine) - fmean(float(q.mean()) for q in reference)
    return (gap if metric.higher_is_better else -gap) >= -standard_error(reference)


def judged_settings(
    bench: Bench,
    places: Sequence[Place],
    seeds: Sequence[int],
    metrics: Sequence[Metric],
    console: Console,
) -> list[list[Judgement]]:
    """Train, then sample and judge every setting on every scene."""
    capsules = adapters_of(bench, places, console)
    found = []
    with progress_on(console) as progress:
        total = sum(steps for _, steps in SETTINGS) * len(places)
        task = progress.add_task("sample and judge, steps", total=total, note="")
        for name, steps in SETTINGS:
            progress.update(task, note=f"{name} {steps}")
            judged = []
            for place, capsule in zip(places, capsules, strict=True):
                images = bench.candidates(place, seeds, capsule=capsule, sampler=name, steps=steps)
                judged.append(bench.judged(place, images, metrics))
                progress.advance(task, steps)
            found.append(judged)
    return found


def markdown(lines: Sequence[Line], metrics: Sequence[Metric]) -> str:
    """One row per setting."""
    head = ["sampler, steps", *(m.name for m in metrics), "matches", "agreement", "accepted"]
    rows = [
        [
            f"{line.sampler}, {line.steps}",
            *(f"{line.means[m.name]:.{m.digits}f}" for m in metrics),
            f"{line.matches:.1f}",
            f"{line.agreement:+.2f}",
            "yes" if line.accepted else "no",
        ]
        for line in lines
    ]
    return markdown_table(head, rows)


def report_of(lines: Sequence[Line], scenes: Sequence[str], seeds: int) -> dict[str, Any]:
    """As JSON."""
    best = fastest(lines)
    return {
        "scenes": list(scenes),
        "seeds": seeds,
        "lines": [asdict(line) for line in lines],
        "fastest": [best.sampler, best.steps],
    }


def write(report: dict[str, Any], text: str, lines: Sequence[Line], out: Path) -> None:
    """Report, table and plot."""
    (out / "sweep.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "sweep.md").write_text(text)
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        curves.setdefault(line.sampler, []).append((line.steps, line.means["psnr_db"]))
    labels = {"title": "In-hole PSNR by steps", "x_label": "steps", "y_label": "dB"}
    chart(curves, **labels, lines=True).save(out / "sweep.png")


def record_row(best: Line, *, device: str, path: Path) -> None:
    """Keep the fewest steps that are as good as DDPM's 200."""
    peer: dict[str, Any] = {"peer": "DDPM, 200 steps", "peer_value": SETTINGS[0][1]}
    name = "quality.fewest_steps_accepted"
    record(name, best.steps, "steps", better="lower", **peer, device=device, path=path)


@click.command(
    cls=OfPhotographs,
    free={"capsules"},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@bench_options(synthetic=2, seeds=8)
@click.option("--metric", "names", multiple=True, type=click.Choice(sorted(NETWORKS)))
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
    names: tuple[str, ...],
) -> None:
    """Sample the same adapters and seeds with fewer and fewer steps.

    \b
        python -m benchmarks.quality.sweep --scenes ../shared/scenes
        python -m benchmarks.quality.sweep --base sd2 --device cuda --preset paper \\
            --scenes RealBench --no-demo --synthetic 0 --seeds 64 --metric dreamsim \\
            --rows realbench.jsonl
    A setting is accepted whose mean is worse than DDPM's with 200 steps by at most that one's
    standard error over the seeds: in DreamSim where it is measured, else in PSNR and SSIM both.
    Adapters and candidates are kept; an interrupted run goes on.
    """
    console = Console(stderr=as_json)
    out.mkdir(parents=True, exist_ok=True)
    try:
        metrics = metrics_of(names)
        places = places_of(folder, demo=demo, synthetic=synthetic, config=preset(preset_name))
        bench = Bench(base_name, device, matcher, capsules=capsules, samples=out / "samples")
        judged = judged_settings(bench, places, range(seeds), metrics, console)
    except (RealFillError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    lines = lines_of(judged, metrics, SETTINGS)
    names_of = [place.scene.name for place in places]
    report = {"preset": preset_name, **report_of(lines, names_of, seeds)}
    text = f"{len(places)} scenes x {seeds} seeds.\n\n" + markdown(lines, metrics)
    write(report, text, lines, out)
    record_row(fastest(lines), device=device_name(device), path=rows)
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    console.print(Markdown(text))
    best = fastest(lines)
    click.echo(f"Fastest that is accepted: {best.sampler}, {best.steps} steps. Report: {out}")


if __name__ == "__main__":
    main()
