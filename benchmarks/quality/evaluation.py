"""Scenes, adapters and candidates of a measurement, kept on disk, and what judges say of them.

Adapters are trained once per scene and configuration, candidates sampled once per adapter, sampler
and seeds: what was interrupted goes on where it was, and what is measured anew costs no sampling.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quality.adapt_report import scenes_of
from benchmarks.quality.adaptation import Square, capsule_path, square_of, trained
from benchmarks.quality.metric import Metric
from benchmarks.quality.sampling import candidates
from benchmarks.quality.selection import keys_of
from realfill.adapt.training import Record
from realfill.base import load_base
from realfill.config import TrainingConfig, preset
from realfill.masks import dilate
from realfill.nano.difficulties import synthetic_scenes
from realfill.precision import training_dtype
from realfill.rank import Correspondences, Ranking, loftr, prepare_references, rank_candidates
from realfill.scene import Scene
from service.engine import Runner

# Of the square's side: how far around the hole the score "rim" looks.
RIM_SHARE = 3 / 32
# What the service ranks by comes first; then correspondences in the hole, in hole and rim, and all
# over, counted and summed by confidence.
OFFICIAL = "ranking"
SCORES = (
    OFFICIAL,
    "count",
    "confidence",
    "rim",
    "rim confidence",
    "whole",
    "whole confidence",
)
# Where synthetic scenes begin, so that drawings that tests look at are not among them.
FIRST_SEED = 100


@dataclass(frozen=True)
class Place:
    """A scene, and how it is trained.

    Attributes:
        scene: With its truth.
        config: Of its adapter.
        origin: demo, folder or synthetic.
    """

    scene: Scene
    config: TrainingConfig
    origin: str


@dataclass(frozen=True)
class Judgement:
    """Numbers of one scene's candidates.

    Attributes:
        qualities: By metric, one number per candidate. [N] each
        scores: By name of ``SCORES``; the official one's are places, the best one's highest. [N]
        order: Candidates as the service ranks them, best first.
    """

    qualities: dict[str, Tensor]
    scores: dict[str, Tensor]
    order: tuple[int, ...]


def short(config: TrainingConfig) -> TrainingConfig:
    """The configuration with fewer steps, for scenes of which there are many: 100 of a pool of 112.

    Presets of fewer steps stay as they are.
    """
    if config.steps <= 100:
        return config
    values = {"steps": 100, "pool": min(config.pool, 112), "probe_every": 0}
    return preset(config.preset, **values)


def places_of(
    folder: Path | None, *, demo: bool, synthetic: int, config: TrainingConfig
) -> list[Place]:
    """The demo's scenes, the folder's with truth, and as many synthetic ones as asked for.

    Raises:
        ValueError: That makes no scene at all.
    """
    photographs = scenes_of(folder, demo=demo)
    count = 2 if demo else 0
    found = [
        Place(scene, config, "demo" if k < count else "folder")
        for k, scene in enumerate(photographs)
    ]
    drawn = synthetic_scenes(synthetic, seed=FIRST_SEED)
    found += [Place(scene, short(config), "synthetic") for scene in drawn]
    if not found:
        raise ValueError(
            f"{folder} has no scene with target/gt: give another --scenes, --demo, or"
            " --synthetic 10."
        )
    return found


class Bench:
    """A base with a place to keep what was made with it.

    Args:
        base_name: As for ``load_base``.
        device: As for ``load_base``.
        matcher: As for ``loftr``.
        capsules: Folder of adapters, which adapt_report can share.
        samples: Folder of candidates.
        steps: U-Net calls per candidate; None for the base's own number.
    """

    def __init__(
        self,
        base_name: str,
        device: str,
        matcher: str,
        *,
        capsules: Path,
        samples: Path,
        steps: int | None = None,
    ) -> None:
        self._learner = load_base(base_name, device=device, dtype=training_dtype(device))
        self.runner = Runner(load_base(base_name, device=device))
        self.matcher = loftr(matcher, device)
        self._capsules, self._samples = capsules, samples
        self._steps = steps or self.runner.base.steps

    def square(self, place: Place) -> Square:
        """What the model sees of the scene, with its truth."""
        return square_of(place.scene, self.runner.base.size_px)

    def has_capsule(self, place: Place) -> bool:
        """Whether the adapter was trained before."""
        return self._path(place).is_file()

    def capsule(self, place: Place, on_record: Callable[[Record], None] = lambda _: None) -> bytes:
        """The scene's adapter, trained now if it never was."""
        return trained(self._path(place), self._learner, place.scene, place.config, on_record)

    def candidates(
        self,
        place: Place,
        seeds: Sequence[int],
        *,
        capsule: bytes | None,
        sampler: str | None = None,
        steps: int | None = None,
        nearest: bool = False,
    ) -> Tensor:
        """Candidates as 8-bit files hold them, sampled now if they never were. [N, 3, S, S]"""
        base, square = self.runner.base, self.square(place)
        made_by = (sampler or base.sampler, steps or self._steps, tuple(seeds), nearest)
        identity = hashlib.sha256(f"{base.fingerprint} {made_by}".encode())
        identity.update(hashlib.sha256(capsule or b"").digest())
        for part in (square.target, square.mask):
            identity.update(part.contiguous().numpy().tobytes())
        path = self._samples / f"{place.scene.name}-{identity.hexdigest()[:16]}.safetensors"
        if not path.is_file():
            images = candidates(
                self.runner,
                square.target,
                square.mask,
                seeds,
                capsule=capsule,
                sampler=made_by[0],
                steps=made_by[1],
                nearest=nearest,
            )
            keep(images, path)
        return load_file(path)["candidates"].float() / 255

    def measured(
        self, place: Place, images: Tensor, metrics: Sequence[Metric]
    ) -> dict[str, Tensor]:
        """Candidates against the truth, by metric. [N] each"""
        square = self.square(place)
        return {
            metric.name: torch.tensor(
                [metric.measure(image, square.truth, square.hole) for image in images],
                dtype=torch.float64,
            )
            for metric in metrics
        }

    def judged(self, place: Place, images: Tensor, metrics: Sequence[Metric]) -> Judgement:
        """Measure candidates against the truth, and score them against the references."""
        square = self.square(place)
        references = prepare_references(self.matcher, place.scene.references)
        inside = rank_candidates(self.matcher, images, square.hole, references)
        whole = rank_candidates(self.matcher, images, torch.ones_like(square.hole), references)
        rim = dilate(square.hole, round(RIM_SHARE * square.hole.shape[-1]))
        order = tuple(inside.order.tolist())
        scores = {OFFICIAL: keys_of(order)}
        scores |= {"count": inside.scores, "confidence": inside.confidence}
        scores |= dict(zip(("rim", "rim confidence"), within(whole, rim), strict=True))
        scores |= {"whole": whole.scores, "whole confidence": whole.confidence}
        return Judgement(
            self.measured(place, images, metrics),
            {name: score.double() for name, score in scores.items()},
            order,
        )

    def _path(self, place: Place) -> Path:
        return capsule_path(self._capsules, self._learner, place.scene, place.config)


def within(ranking: Ranking, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Count and confidence of a ranking's correspondences that start inside a mask. [N] twice

    Args:
        ranking: Of whole candidates.
        mask: Where to count, of the candidates' size. [H, W]
    """
    count = torch.zeros(len(ranking.scores), dtype=torch.float64)
    confidence = count.clone()
    for matches in ranking.correspondences:
        kept = matches.where(_inside(matches, mask))
        count.index_add_(0, kept.pair.cpu(), torch.ones(len(kept), dtype=torch.float64))
        confidence.index_add_(0, kept.pair.cpu(), kept.confidence.double().cpu())
    return count, confidence


def _inside(matches: Correspondences, mask: Tensor) -> Tensor:
    columns, rows = matches.points0.long().unbind(1)
    return mask.to(rows.device)[rows, columns] > 0


def keep(images: Tensor, path: Path) -> None:
    """Write candidates in 8 bit, entirely or not at all. [N, 3, S, S]"""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    save_file({"candidates": (images.clamp(0, 1) * 255).round().to(torch.uint8)}, draft)
    draft.replace(path)
