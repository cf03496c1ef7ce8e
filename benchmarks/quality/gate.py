"""``python -m benchmarks.quality.gate``: how far the authenticity gate can be trusted.

Fillings whose truth is known are shown to the gate: what the target really shows, as it is and as
the base's autoencoder gives it back; and what it does not: another place's picture in the hole, and
what the base alone makes up.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import click
import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

from benchmarks.command import OfPhotographs
from benchmarks.quality.confusion import share_a_photograph
from benchmarks.quality.evaluation import Bench, Place, places_of
from benchmarks.quality.sampling import device_name
from benchmarks.quality.summary import markdown_table
from benchmarks.quality.tables import bench_options, progress_on
from benchmarks.record import record
from realfill.config import preset
from realfill.errors import RealFillError
from realfill.rank import prepare_references, rank_candidates
from realfill.rank.gate import DEFAULTS, Thresholds, calibrate, judge
from realfill.rank.ranking import Ranking
from realfill.verdict import Verdict

# Whether what is in the hole is what the target shows.
KINDS = {"truth": True, "truth, decoded": True, "another place": False, "base alone": False}
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
# Of other places per scene: more of them are more of the same.
MOST_FOREIGN = 6


@dataclass(frozen=True)
class Filling:
    """One filling before the gate.

    Attributes:
        ranking: Of all fillings of its scene.
        index: Its place there.
    """

    scene: str
    kind: str
    ranking: Ranking
    index: int

    @property
    def true(self) -> bool:
        """Whether it shows what the target does."""
        return KINDS[self.kind]

    @property
    def coverage(self) -> float:
        """Share of the hole's cells that some reference matches."""
        return float(self.ranking.coverage[self.index])

    def verdict(self, thresholds: Thresholds) -> Verdict:
        """The gate's word on it."""
        return judge(self.ranking, thresholds)[self.index]


def fillings_of(
    bench: Bench, place: Place, others: Sequence[Place], seeds: Sequence[int]
) -> list[Filling]:
    """All fillings of one scene, ranked together."""
    square, base = bench.square(place), bench.runner.base
    decoded = base.decode(base.encode(square.truth[None]))[0].cpu()
    foreign = [bench.square(other).truth for other in others[:MOST_FOREIGN]]
    contents = {
        "truth": [square.truth],
        "truth, decoded": [decoded],
        "another place": foreign,
        "base alone": list(bench.candidates(place, seeds, capsule=None)),
    }
    kinds = [kind for kind, images in contents.items() for _ in images]
    inside = torch.stack([image for images in contents.values() for image in images])
    filled = torch.where(square.mask > 0, inside, square.target)
    references = prepare_references(bench.matcher, place.scene.references)
    ranking = rank_candidates(bench.matcher, filled, square.hole, references)
    return [Filling(place.scene.name, kind, ranking, k) for k, kind in enumerate(kinds)]


def elsewhere(place: Place, places: Sequence[Place]) -> Iterator[Place]:
    """Places that share no photograph with this one, nor the drawing that it was made from."""
    mine = photographs(place)
    for other in places:
        if other is not place and not share_a_photograph(mine, photographs(other)):
            yield other


def photographs(place: Place) -> list[Tensor]:
    """References and truth."""
    truth = place.scene.truth
    return [*place.scene.references, *([] if truth is None else [truth])]


def held_out(
    fillings: Sequence[Filling], strangers: Mapping[str, Collection[str]]
) -> dict[str, Thresholds]:
    """For each scene, thresholds from scenes of other places.

    Args:
        fillings: Of all scenes.
        strangers: By scene, the names of those.

    Raises:
        ValueError: Some scene's strangers cannot be told apart by coverage.
    """
    return {
        name: _calibrated([filling for filling in fillings if filling.scene in others])
        for name, others in strangers.items()
    }


def _calibrated(fillings: Sequence[Filling]) -> Thresholds:
    return calibrate([f.coverage for f in fillings], [f.true for f in fillings])


def verdicts(
    fillings: Sequence[Filling], thresholds: dict[str, Thresholds]
) -> dict[str, dict[str, int]]:
    """By kind, how many got each verdict by their scene's thresholds."""
    found: dict[str, dict[str, int]] = {
        kind: dict.fromkeys(map(str, VERDICTS), 0) for kind in KINDS
    }
    for filling in fillings:
        found[filling.kind][filling.verdict(thresholds[filling.scene])] += 1
    return found


def rates(found: dict[str, dict[str, int]]) -> tuple[float, float]:
    """Per cent of the false fillings called supported, and of the true ones unsupported."""

    def share(true: bool, verdict: Verdict) -> float:
        rows = [row for kind, row in found.items() if KINDS[kind] is true]
        return 100 * sum(row[verdict] for row in rows) / sum(sum(row.values()) for row in rows)

    return share(False, "supported"), share(True, "unsupported")


def markdown(tables: dict[str, dict[str, dict[str, int]]]) -> str:
    """One row per way to set thresholds and kind of filling."""
    rows = [
        [way, kind, str(sum(row.values())), *(str(row[verdict]) for verdict in VERDICTS)]
        for way, found in tables.items()
        for kind, row in found.items()
    ]
    return markdown_table(["thresholds", "filling", "number", *VERDICTS], rows)


def scenes_table(fillings: Sequence[Filling]) -> str:
    """By scene and kind, the mean coverage."""
    names = dict.fromkeys(filling.scene for filling in fillings)
    rows = []
    for name in names:
        mine = [f for f in fillings if f.scene == name]
        by_kind = [[f.coverage for f in mine if f.kind == kind] for kind in KINDS]
        rows.append([name, *(f"{sum(c) / len(c):.2f}" if c else "" for c in by_kind)])
    return markdown_table(["coverage", *KINDS], rows)


def record_rows(found: dict[str, dict[str, int]], *, device: str, path: Path) -> None:
    """Keep both kinds of error of the gate as it is set, which others depend on."""
    wrong, missed = rates(found)
    details: dict[str, Any] = {"better": "lower", "device": device, "path": path}
    record("rank.gate_false_supported_pct", wrong, "%", **details)
    record("rank.gate_true_unsupported_pct", missed, "%", **details)


@click.command(
    cls=OfPhotographs,
    free={"capsules"},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@bench_options(synthetic=12, seeds=4)
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
) -> None:
    """Show the gate fillings of which it is known whether they are true.

    \b
        python -m benchmarks.quality.gate --scenes ../shared/scenes
    Three ways to set its thresholds: as they are (realfill.rank.gate.DEFAULTS); for every scene
    from all other scenes, as they would meet a new one; and from all scenes, printed at the end to
    be set for this matcher. No adapter is trained.
    """
    console = Console(stderr=as_json)
    out.mkdir(parents=True, exist_ok=True)
    try:
        places = places_of(folder, demo=demo, synthetic=synthetic, config=preset(preset_name))
        bench = Bench(base_name, device, matcher, capsules=capsules, samples=out / "samples")
        others = {place.scene.name: list(elsewhere(place, places)) for place in places}
        fillings: list[Filling] = []
        with progress_on(console) as progress:
            task = progress.add_task("show to the gate", total=len(places), note="")
            for place in places:
                fillings += fillings_of(bench, place, others[place.scene.name], range(seeds))
                progress.advance(task)
        names = {name: {other.scene.name for other in found} for name, found in others.items()}
        apart, calibrated = held_out(fillings, names), _calibrated(fillings)
    except (RealFillError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    tables = {
        "as set": verdicts(fillings, dict.fromkeys(apart, DEFAULTS)),
        "from other scenes": verdicts(fillings, apart),
        "from these scenes": verdicts(fillings, dict.fromkeys(apart, calibrated)),
    }
    report = {
        "fillings": [{"scene": f.scene, "kind": f.kind, "coverage": f.coverage} for f in fillings],
        "verdicts": tables,
        "calibrated": asdict(calibrated),
    }
    text = f"{markdown(tables)}\n{scenes_table(fillings)}"
    (out / "gate.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "gate.md").write_text(text)
    record_rows(tables["as set"], device=device_name(device), path=rows)
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    console.print(Markdown(text))
    click.echo(f"From these scenes: {calibrated}. Report: {out}")


if __name__ == "__main__":
    main()
