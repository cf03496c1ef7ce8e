"""``python -m benchmarks.quality.halving``: what giving up seeds half-way costs in quality."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.command import OfPhotographs
from benchmarks.quality.evaluation import Bench, Place, places_of
from benchmarks.quality.sampling import device_name, drawn, feather_of, job_for
from benchmarks.quality.selection import spearman
from benchmarks.quality.tables import adapters_of, bench_options
from benchmarks.record import record
from realfill.complete.compositing import composite
from realfill.complete.seam import seamless
from realfill.config import preset
from realfill.errors import RealFillError
from realfill.metrics import psnr
from realfill.rank import ReferenceFeatures, prepare_references, rank_candidates
from service.engine.halving import Halving, survivors
from service.engine.sample import Sample

# Halving is worth having on by default only where the answer loses no more than this on average.
BOUND_DB = 0.1


@dataclass(frozen=True)
class Regret:
    """One scene's loss by halving.

    Attributes:
        first_db: In-hole PSNR of the candidate that is ranked first among all.
        halved_db: Of the one that is ranked first among those that were kept.
        mean_db: Mean of all candidates.
        same: Whether both are the same candidate.
        share: Of the sample-steps that were made.
        spearman: Of the scores at each look with the final ones, over all candidates.
    """

    scene: str
    first_db: float
    halved_db: float
    mean_db: float
    same: bool
    share: float
    spearman: tuple[float, ...]


def regret_of(
    bench: Bench, place: Place, capsule: bytes, seeds: Sequence[int], *, steps: int | None
) -> Regret:
    """Sample every seed to the end, look at all of them on the way, and halve afterwards.

    ``steps`` is None for the base's own number.
    """
    runner, square = bench.runner, bench.square(place)
    job = job_for(runner, square.target, square.mask, seeds, capsule=capsule, steps=steps)
    plan = Halving(judge=lambda previews: torch.zeros(len(previews)))
    looks = plan.steps(job.steps)
    previews: dict[int, Tensor] = {}

    def look(step: int, samples: list[Sample]) -> None:
        if step in looks:
            previews[step] = runner.decode([sample.history for sample in samples])

    samples = drawn(runner, job, after_step=look)
    references = prepare_references(bench.matcher, place.scene.references)
    feather_px = feather_of(runner.base.size_px)
    finals = seamless(
        runner.decode([sample.latents for sample in samples]), square.target, square.mask
    )
    candidates = composite(finals, square.target, square.mask, feather_px=feather_px)
    final = _scores(bench, candidates, square.hole, references)
    kept, made, at, rho = list(range(len(seeds))), 0, 0, []
    for step in looks:
        images = composite(previews[step], square.target, square.mask, feather_px=0)
        early = _scores(bench, images, square.hole, references)
        rho.append(spearman(early, final))
        made, at = made + len(kept) * (step - at), step
        kept = [kept[k] for k in survivors(early[kept], plan.keeps(len(kept)))]
    made += len(kept) * (job.steps - at)
    quality = [psnr(image, square.truth, square.hole) for image in candidates]
    first = survivors(final, 1)[0]
    halved = kept[survivors(final[kept], 1)[0]]
    return Regret(
        scene=place.scene.name,
        first_db=quality[first],
        halved_db=quality[halved],
        mean_db=fmean(quality),
        same=first == halved,
        share=made / (len(seeds) * job.steps),
        spearman=tuple(rho),
    )


def _scores(bench: Bench, images: Tensor, hole: Tensor, references: ReferenceFeatures) -> Tensor:
    return rank_candidates(bench.matcher, images, hole, references).ordered_by.double().cpu()


def table_of(regrets: Sequence[Regret]) -> Table:
    """A line for every scene, and their mean."""
    table = Table(title="Ranked first among all, and among those that halving kept")
    for heading in ("scene", "all, dB", "halved, dB", "mean, dB", "same", "steps", "Spearman"):
        table.add_column(heading, justify="left" if heading == "scene" else "right")
    for r in regrets:
        rho = ", ".join(f"{value:.2f}" for value in r.spearman)
        table.add_row(
            r.scene,
            f"{r.first_db:.2f}",
            f"{r.halved_db:.2f}",
            f"{r.mean_db:.2f}",
            "yes" if r.same else "no",
            f"{100 * r.share:.0f} %",
            rho,
        )
    return table


@click.command(
    cls=OfPhotographs,
    free={"capsules"},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@bench_options(synthetic=10, seeds=32)
# The two that nano is sampled with leave nothing to look at.
@click.option("--steps", type=click.IntRange(min=1), default=6, show_default=True)
def main(
    base_name: str,
    device: str,
    matcher: str,
    preset_name: str,
    folder: Path | None,
    demo: bool,
    synthetic: int,
    seeds: int,
    out: Path,
    capsules: Path,
    rows: Path,
    as_json: bool,
    steps: int,
) -> None:
    """Measure the regret of seed halving: quality lost against sample-steps saved.

    Every seed is sampled to its end, with looks at the predicted pictures at 40 % and 70 % of the
    steps; what halving would have given up is left out afterwards. Halving is on by default only if
    its mean regret is at most 0.1 dB.
    """
    console = Console(stderr=as_json)
    try:
        places = places_of(folder, demo=demo, synthetic=synthetic, config=preset(preset_name))
        bench = Bench(base_name, device, matcher, capsules=capsules, samples=out / "samples")
        adapters = adapters_of(bench, places, console)
        regrets = [
            regret_of(bench, place, capsule, range(seeds), steps=steps)
            for place, capsule in zip(places, adapters, strict=True)
        ]
    except (RealFillError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    lost = fmean(r.first_db - r.halved_db for r in regrets)
    share = fmean(r.share for r in regrets)
    details: dict[str, Any] = {"device": device_name(device), "path": rows, "better": "lower"}
    peer = "all seeds to the end"
    record("halving.regret_db", lost, "dB", target=BOUND_DB, peer=peer, **details)
    record("halving.sample_steps_pct", 100 * share, "%", peer=peer, **details)
    if as_json:
        click.echo(json.dumps([asdict(r) for r in regrets], indent=2))
        return
    console.print(table_of(regrets))
    console.print(f"regret {lost:+.2f} dB on average, for {100 * share:.0f} % of the sample-steps")


if __name__ == "__main__":
    main()
