"""One scene: train its adapter, then measure its fills, the base's and the classical ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.fills import CLASSICAL
from benchmarks.quality.sampling import candidates
from realfill.adapt.training import Record, train
from realfill.base import Base
from realfill.complete.windows import crop, crop_mask, window_of
from realfill.config import TrainingConfig
from realfill.metrics import psnr, ssim
from realfill.rank import Matcher, Ranking, prepare_references, rank_candidates
from realfill.scene import Scene
from realfill.sheet import Row, with_hole
from service.engine import Runner

SHEET_BASE_FILLS = 6


@dataclass(frozen=True)
class Square:
    """What the model sees of a scene's target, at the base's size.

    Attributes:
        target: In [0, 1]. [3, S, S]
        truth: In [0, 1]. [3, S, S]
        mask: 1 where pixels are missing, those beyond the image included. [S, S]
        hole: 1 where pixels are missing that the truth has. [S, S]
    """

    target: Tensor
    truth: Tensor
    mask: Tensor
    hole: Tensor


@dataclass(frozen=True)
class Fills:
    """Candidates of one kind, and how good they are inside the hole.

    Attributes:
        images: [N, 3, S, S]
        psnr_db, ssim: Against the truth, one per candidate.
        matches: Correspondences with the references in the hole, one per candidate.
        order: Candidates by matches, best first.
    """

    images: Tensor
    psnr_db: tuple[float, ...]
    ssim: tuple[float, ...]
    matches: tuple[int, ...]
    order: tuple[int, ...]

    def means(self) -> dict[str, float]:
        """Means over the candidates, and the PSNR and SSIM of the one ranked best."""
        return {
            "psnr_db": fmean(self.psnr_db),
            "ssim": fmean(self.ssim),
            "matches": fmean(self.matches),
            "best_psnr_db": self.psnr_db[self.order[0]],
            "best_ssim": self.ssim[self.order[0]],
            "best_matches": self.matches[self.order[0]],
        }


@dataclass(frozen=True)
class Outcome:
    """Everything measured of one scene.

    Attributes:
        capsule_bytes: Size of the capsule.
        classical: Fills by name, one candidate each.
    """

    scene: Scene
    square: Square
    capsule_bytes: int
    base: Fills
    adapted: Fills
    classical: dict[str, Fills]
    truth: Fills

    @property
    def gain_db(self) -> float:
        """How much the adapter raises the mean PSNR."""
        return fmean(self.adapted.psnr_db) - fmean(self.base.psnr_db)

    def report(self) -> dict[str, Any]:
        """As JSON, without pictures."""
        named = {"base": self.base, "adapted": self.adapted, **self.classical}
        return {
            "scene": self.scene.name,
            "references": len(self.scene.references),
            "missing_share": float(self.square.hole.mean()),
            "capsule_bytes": self.capsule_bytes,
            "psnr_gain_db": self.gain_db,
            "truth_matches": self.truth.matches[0],
            "fills": {
                name: {
                    "means": fills.means(),
                    **{k: v for k, v in asdict(fills).items() if k != "images"},
                }
                for name, fills in named.items()
            },
        }


def square_of(scene: Scene, size_px: int) -> Square:
    """The window that a completion works on, with its truth; the scene must have one."""
    if scene.truth is None:
        raise ValueError(f"scene {scene.name!r} has no ground truth; add target/gt.png")
    window = window_of(scene.mask, size_px)
    mask = crop_mask(scene.mask, window, size_px)
    beyond = crop_mask(torch.zeros_like(scene.mask), window, size_px)
    return Square(
        target=crop(scene.target, window, size_px),
        truth=crop(scene.truth, window, size_px),
        mask=mask,
        hole=mask * (1 - beyond),
    )


def capsule_path(folder: Path, base: Base, scene: Scene, config: TrainingConfig) -> Path:
    """Where the capsule of this base, scene and configuration lies, or will lie."""
    identity = hashlib.sha256(f"{base.fingerprint} {config.digest} {base.dtype}".encode())
    for photo in (*scene.references, scene.target, scene.mask):
        identity.update(photo.contiguous().numpy().tobytes())
    return folder / f"{scene.name}-{identity.hexdigest()[:16]}.safetensors"


def trained(
    path: Path,
    base: Base,
    scene: Scene,
    config: TrainingConfig,
    on_record: Callable[[Record], None] = lambda _: None,
) -> bytes:
    """The scene's capsule, from the file if it is there, else trained and kept in it.

    An interrupted training goes on from a checkpoint beside the file.
    """
    if path.is_file():
        return path.read_bytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    for record in train(base, scene, config, checkpoint=path.with_suffix(".checkpoint")):
        on_record(record)
        if record.capsule is not None:
            draft = path.with_suffix(".part")
            draft.write_bytes(record.capsule)
            draft.replace(path)
    return path.read_bytes()


def measure(
    runner: Runner,
    matcher: Matcher,
    scene: Scene,
    capsule: bytes,
    seeds: Sequence[int],
    *,
    steps: int | None,
) -> Outcome:
    """Sample the seeds with and without the adapter, fill classically, and measure all of it.

    ``steps`` is None for the base's own number.
    """
    square = square_of(scene, runner.base.size_px)
    references = prepare_references(matcher, scene.references)

    def measured(images: Tensor) -> Fills:
        ranking = rank_candidates(matcher, images, square.hole, references)
        return _fills(images, ranking, square)

    target, mask = square.target, square.mask
    alone = candidates(runner, target, mask, seeds, steps=steps)
    adapted = candidates(runner, target, mask, seeds, capsule=capsule, steps=steps)
    return Outcome(
        scene=scene,
        square=square,
        capsule_bytes=len(capsule),
        base=measured(alone),
        adapted=measured(adapted),
        classical={name: measured(fill(target, mask)[None]) for name, fill in CLASSICAL.items()},
        truth=measured(square.truth[None]),
    )


def _fills(images: Tensor, ranking: Ranking, square: Square) -> Fills:
    return Fills(
        images=images,
        psnr_db=tuple(psnr(image, square.truth, square.hole) for image in images),
        ssim=tuple(ssim(image, square.truth, square.hole) for image in images),
        matches=tuple(ranking.scores.tolist()),
        order=tuple(ranking.order.tolist()),
    )


def sheet_rows(outcome: Outcome, seeds: Sequence[int]) -> list[Row]:
    """Rows of a contact sheet: what was given, what fills without the adapter, what with it."""
    square, base, adapted = outcome.square, outcome.base, outcome.adapted
    given = [(f"reference {k + 1}", photo) for k, photo in enumerate(outcome.scene.references)]
    given.append(("target with its hole", with_hole(square.target, square.mask)))
    given.append((f"truth\n{outcome.truth.matches[0]} matches", square.truth))
    plain = [
        (f"{name}\n{_quality(fills, 0)}", fills.images[0])
        for name, fills in outcome.classical.items()
    ]
    plain += [
        (f"base, seed {seeds[k]}\n{_quality(base, k)}", base.images[k])
        for k in range(min(SHEET_BASE_FILLS, len(seeds)))
    ]
    ranked = [
        (f"{place}. seed {seeds[k]}\n{_quality(adapted, k)}", adapted.images[k])
        for place, k in enumerate(adapted.order, start=1)
    ]
    without = f"Without the adapter: base {fmean(base.psnr_db):.1f} dB on average"
    adapter = f"With the adapter: {fmean(adapted.psnr_db):.1f} dB on average, best first by matches"
    return [(outcome.scene.name, given), (without, plain), (adapter, ranked)]


def _quality(fills: Fills, k: int) -> str:
    return f"{fills.psnr_db[k]:.1f} dB, {fills.ssim[k]:.2f}, {fills.matches[k]} matches"
