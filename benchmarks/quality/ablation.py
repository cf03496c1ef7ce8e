"""``python -m benchmarks.quality.ablation``: what each choice of the method is worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

from benchmarks.command import OfPhotographs
from benchmarks.quality.evaluation import OFFICIAL, Bench, Judgement, Place, places_of
from benchmarks.quality.metric import Metric, metrics_of
from benchmarks.quality.sampling import device_name
from benchmarks.quality.selection import Interval, difference_interval, kept_mean
from benchmarks.quality.summary import markdown_table
from benchmarks.quality.tables import adapters_of, bench_options, progress_on
from benchmarks.record import record
from realfill.config import preset
from realfill.errors import RealFillError


@dataclass(frozen=True)
class Variant:
    """The method with one choice made otherwise.

    Attributes:
        name: Of the choice.
        changes: To the training configuration.
        nearest: Whether sampling, too, is told the mask by cells' middles.
        ranked_by: Score whose top quarter counts instead of all candidates; none for all.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    nearest: bool = False
    ranked_by: str | None = None


DEFAULT = Variant("default")
VARIANTS = (
    Variant("no union with the target's hole", {"target_union": False}),
    Variant("batch of 4", {"batch": 4}),
    Variant("dropout of elements", {"lora_drop_mode": "element"}),
    Variant("dropout of all layers together", {"lora_drop_mode": "all"}),
    Variant("no LoRA dropout", {"lora_dropout": 0.0}),
    Variant("nearest mask", {"mask_reduction": "nearest"}, nearest=True),
)
# Of the default's own candidates: what ranking keeps of them, looking everywhere or at a part.
RANKINGS = (
    Variant("top 25 %, ranked as the service does: everywhere", ranked_by=OFFICIAL),
    Variant("top 25 %, ranked in hole and rim", ranked_by="rim confidence"),
    Variant("top 25 %, ranked in the hole", ranked_by="count"),
)


@dataclass(frozen=True)
class Line:
    """One variant against the default, of the same scenes and seeds.

    Attributes:
        means: By metric.
        loss: By metric, how much better the default is; the interval is over scenes and seeds.
        verdict: Whether the default is better, worse, or no difference shows, by PSNR and SSIM.
    """

    name: str
    means: dict[str, float]
    loss: dict[str, Interval]
    verdict: str


def line_of(
    variant: Variant,
    judged: Sequence[Judgement],
    default: Sequence[Judgement],
    metrics: Sequence[Metric],
) -> Line:
    """Compare a variant's candidates with the default's, or what ranking keeps with all of them."""
    means, loss = {}, {}
    for metric in metrics:
        mine = [_counted(judgement, metric, variant.ranked_by) for judgement in judged]
        theirs = [judgement.qualities[metric.name] for judgement in default]
        means[metric.name] = fmean(float(row.mean()) for row in mine)
        loss[metric.name] = difference_interval(theirs, mine)
    return Line(variant.name, means, loss, verdict_of(list(loss.values())))


def _counted(judgement: Judgement, metric: Metric, score: str | None) -> Tensor:
    """Qualities of all candidates, or for each the mean of the top quarter. [N]"""
    quality = judgement.qualities[metric.name]
    if score is None:
        return quality
    return torch.full_like(quality, float(kept_mean(judgement.scores[score], quality, 0.75)))


def verdict_of(losses: Sequence[Interval]) -> str:
    """One word on intervals of how much better the default is."""
    if any(loss.high < 0 for loss in losses):
        return "default is worse" if not any(loss.low > 0 for loss in losses) else "mixed"
    if any(loss.low > 0 for loss in losses):
        return "default is better"
    return "no difference shows"


def judged_variant(
    variant: Variant,
    bench: Bench,
    places: Sequence[Place],
    seeds: Sequence[int],
    metrics: Sequence[Metric],
    console: Console,
) -> list[Judgement]:
    """Train, sample and judge a variant on every scene."""
    changed = [replace(p, config=replace(p.config, **variant.changes)) for p in places]
    console.print(variant.name)
    capsules = adapters_of(bench, changed, console)
    judged = []
    with progress_on(console) as progress:
        task = progress.add_task("sample and judge", total=len(places), note="")
        for place, capsule in zip(changed, capsules, strict=True):
            images = bench.candidates(place, seeds, capsule=capsule, nearest=variant.nearest)
            judged.append(bench.judged(place, images, metrics))
            progress.advance(task)
    return judged


def lines_of(
    bench: Bench,
    places: Sequence[Place],
    variants: Sequence[Variant],
    seeds: Sequence[int],
    metrics: Sequence[Metric],
    console: Console,
) -> list[Line]:
    """The default, the variants, and what ranking keeps of the default's candidates."""

    def judged(variant: Variant) -> list[Judgement]:
        return judged_variant(variant, bench, places, seeds, metrics, console)

    default = judged(DEFAULT)
    lines = [line_of(DEFAULT, default, default, metrics)]
    lines += [line_of(variant, judged(variant), default, metrics) for variant in variants]
    return lines + [line_of(variant, default, default, metrics) for variant in RANKINGS]


def contradicting(lines: Sequence[Line]) -> list[str]:
    """Variants that are better than the default; rankings are none."""
    rankings = {variant.name for variant in RANKINGS}
    return [
        line.name
        for line in lines
        if line.verdict == "default is worse" and line.name not in rankings
    ]


def record_row(count: int, *, device: str, path: Path) -> None:
    """Keep how many defaults the table speaks against."""
    name = "quality.defaults_contradicted"
    record(name, count, "variants", better="lower", target=0.0, device=device, path=path)


def markdown(lines: Sequence[Line], metrics: Sequence[Metric]) -> str:
    """One row per variant."""
    head = ["variant", *(m.name for m in metrics)]
    head += [*(f"{m.name}, default minus variant (95 %)" for m in metrics), "verdict"]
    rows = [
        [
            line.name,
            *(f"{line.means[m.name]:.{m.digits}f}" for m in metrics),
            *(_shown(line.loss[m.name], m.digits) for m in metrics),
            line.verdict,
        ]
        for line in lines
    ]
    return markdown_table(head, rows)


def _shown(loss: Interval, digits: int) -> str:
    return f"{loss.mean:+.{digits}f} ({loss.low:+.{digits}f} to {loss.high:+.{digits}f})"


@click.command(
    cls=OfPhotographs,
    free={"capsules"},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@bench_options(synthetic=4, seeds=16)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([variant.name for variant in VARIANTS]),
    help="Train these variants alone; may be repeated.",
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
    only: tuple[str, ...],
) -> None:
    """Train and sample with one choice of the method undone at a time.

    \b
        python -m benchmarks.quality.ablation --scenes ../shared/scenes
        python -m benchmarks.quality.ablation --no-demo --only "nearest mask" --rows rows.jsonl
    Rows are variants, columns how much better the default is. Rows of rankings say what the top
    quarter of the default's own candidates gains over all of them.
    Adapters and candidates are kept; an interrupted run goes on.
    """
    console = Console(stderr=as_json)
    out.mkdir(parents=True, exist_ok=True)
    try:
        metrics = metrics_of(())
        places = places_of(folder, demo=demo, synthetic=synthetic, config=preset(preset_name))
        bench = Bench(base_name, device, matcher, capsules=capsules, samples=out / "samples")
        chosen = [v for v in VARIANTS if not only or v.name in only]
        lines = lines_of(bench, places, chosen, range(seeds), metrics, console)
    except (RealFillError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    report = {
        "scenes": [place.scene.name for place in places],
        "seeds": seeds,
        "preset": preset_name,
        "lines": [asdict(line) for line in lines],
    }
    (out / "ablation.json").write_text(json.dumps(report, indent=2) + "\n")
    text = f"{len(places)} scenes x {seeds} seeds.\n\n" + markdown(lines, metrics)
    (out / "ablation.md").write_text(text)
    against = contradicting(lines)
    record_row(len(against), device=device_name(device), path=rows)
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    console.print(Markdown(text))
    click.echo(f"Better than the default: {', '.join(against) or 'none'}. Report: {out}")


if __name__ == "__main__":
    main()
