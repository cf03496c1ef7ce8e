"""Pre-flight: what speaks against a scene before anything is trained, as warnings with numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from skimage.measure import blur_effect
from torch import Tensor
from torch.nn import functional as F

from realfill.rank.correspondences import Matcher
from realfill.rank.ranking import rank_candidates
from realfill.rank.references import LUMA

# Long side at which blur is judged, about what the model sees of a photo.
BLUR_PX = 512
# Sharp photographs of five places measure 0.25 to 0.44, the same at a quarter of their resolution
# 0.49 to 0.61.
MOST_BLUR = 0.48
# Unrelated photographs still match in four to nine cells of a hundred.
LEAST_OVERLAP = 0.1
LEAST_HOLE, MOST_HOLE = 0.002, 0.75
# Mean difference below which a reference is the target itself, saved another time.
SAME = 0.02


@dataclass(frozen=True)
class Caution:
    """One thing that speaks against the scene.

    Attributes:
        code: Stable name of the kind.
        subject: ``target``, ``mask`` or ``reference 1`` and so on.
        value: What was measured.
        bound: What it should not pass.
        message: A sentence with both, and what to do.
    """

    code: str
    subject: str
    value: float
    bound: float
    message: str


@torch.no_grad()
def preflight(
    references: Sequence[Tensor],
    target: Tensor,
    mask: Tensor,
    *,
    matcher: Matcher | None = None,
    size_px: int = 512,
) -> list[Caution]:
    """Look at a scene before training, and say what is likely to go wrong.

    Args:
        references: Photos in [0, 1], of any size. [3, H, W] each
        target: The image to complete, in [0, 1]. [3, H, W]
        mask: 1 where pixels are missing, else 0. [H, W]
        matcher: Finds what target and references share; without it overlap is not measured.
        size_px: Resolution of the base; smaller photos have nothing to teach at it.

    Returns:
        Warnings in a fixed order; none is a good sign.
    """
    found = _mask_warnings(mask)
    photos = {f"reference {k + 1}": photo for k, photo in enumerate(references)}
    for subject, photo in {**photos, "target": target}.items():
        found += _photo_warnings(subject, photo, size_px)
    for subject, photo in photos.items():
        found += _sameness(subject, photo, target, mask)
    known = (mask <= 0).float()
    if matcher is not None and bool(known.any()) and references:
        found += _overlap_warnings(matcher, references, target, known)
    return found


def _mask_warnings(mask: Tensor) -> list[Caution]:
    """Holes that are absent, tiny or nearly everything, and masks that are not plain."""
    hole = (mask > 0).float()
    share = float(hole.mean())
    found = []
    if share < LEAST_HOLE:
        found.append(
            Caution(
                "hole_small",
                "mask",
                share,
                LEAST_HOLE,
                f"The hole is {share:.2%} of the target, less than {LEAST_HOLE:.1%}: ranking has "
                "next to no cells to count; crop the target around it, or check that white is "
                "what is missing.",
            )
        )
    if share > MOST_HOLE:
        found.append(
            Caution(
                "hole_large",
                "mask",
                share,
                MOST_HOLE,
                f"The hole is {share:.1%} of the target, more than {MOST_HOLE:.0%}: little is left "
                "to go by; check that white is what is missing, or use a larger target.",
            )
        )
    between = float(((mask > 0) & (mask < 1)).float().mean())
    if between > 0:
        found.append(
            Caution(
                "mask_grey",
                "mask",
                between,
                0.0,
                f"{between:.2%} of the mask is neither 0 nor 1 and counts as missing: save the "
                "mask as PNG without smoothing.",
            )
        )
    return found


def _photo_warnings(subject: str, photo: Tensor, size_px: int) -> list[Caution]:
    """Photos that are too small or out of focus."""
    found = []
    shorter = min(photo.shape[-2:])
    if shorter < size_px:
        found.append(
            Caution(
                "small",
                subject,
                float(shorter),
                float(size_px),
                f"The {subject} is {photo.shape[-1]}x{photo.shape[-2]} px, its shorter side under "
                f"{size_px}: detail will be missing; use the photo in full resolution.",
            )
        )
    blur = measure_blur(photo)
    if blur > MOST_BLUR:
        found.append(
            Caution(
                "blurred",
                subject,
                blur,
                MOST_BLUR,
                f"The {subject} has a blur of {blur:.2f}, above {MOST_BLUR}: the answer will be as "
                "soft; use a sharper photo.",
            )
        )
    return found


def _sameness(subject: str, photo: Tensor, target: Tensor, mask: Tensor) -> list[Caution]:
    """A reference that is the target says nothing of what is missing."""
    if photo.shape != target.shape or not bool((mask <= 0).any()):
        return []
    difference = float((photo - target).abs()[:, mask <= 0].mean())
    if difference >= SAME:
        return []
    return [
        Caution(
            "reference_is_target",
            subject,
            difference,
            SAME,
            f"The {subject} differs from the target's known region by {difference:.3f} on average, "
            f"less than {SAME}: unless it shows what is missing it teaches nothing; use another "
            "photo of the place.",
        )
    ]


def _overlap_warnings(
    matcher: Matcher, references: Sequence[Tensor], target: Tensor, known: Tensor
) -> list[Caution]:
    """References that share too little with what is known of the target."""
    ranking = rank_candidates(matcher, target[None], known, references)
    found = []
    for k, matches in enumerate(ranking.per_reference[0].tolist()):
        share = matches / max(1, ranking.hole_cells)
        if share < LEAST_OVERLAP:
            found.append(
                Caution(
                    "overlap",
                    f"reference {k + 1}",
                    share,
                    LEAST_OVERLAP,
                    f"The reference {k + 1} matches the known region in {matches} of "
                    f"{ranking.hole_cells} cells ({share:.1%}, less than {LEAST_OVERLAP:.0%}): it "
                    "may show another place, or from too far off; use a photo that shares more.",
                )
            )
    return found


def measure_blur(photo: Tensor) -> float:
    """Blur of a photo in [0, 1], 1 for no edge at all, judged at 512 px at most. [3 or 1, H, W]

    Source: Crete et al., The blur effect, 2007, as scikit-image implements it.
    """
    grey = photo.float().cpu()
    if len(grey) == 3:
        grey = (grey * torch.tensor(LUMA)[:, None, None]).sum(0, keepdim=True)
    scale = min(1.0, BLUR_PX / max(grey.shape[-2:]))
    size = [max(16, round(side * scale)) for side in grey.shape[-2:]]
    grey = F.interpolate(grey[None], size=size, mode="bicubic", antialias=True)[0, 0].clamp(0, 1)
    # Without any edge the measure divides by nothing.
    if float(grey.max() - grey.min()) < 1e-3:
        return 1.0
    return float(blur_effect(grey.numpy()))
