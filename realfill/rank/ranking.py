"""Correspondence-based ranking: the references vouch for the best candidate's filled region.

Source: RealFill, arXiv:2309.16668, section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from realfill.errors import InvalidScene
from realfill.rank.matching import CELL_PX, Correspondences, Features, Matcher

# Luma weights of sRGB, those that LoFTR was trained with.
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class ReferenceFeatures:
    """References as a matcher sees them, kept from one ranking to the next.

    Attributes:
        features: One entry of a single image per reference.
        sizes: Height and width of each photo, in px.
    """

    features: tuple[Features, ...]
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Ranking:
    """Candidates by score, with the evidence.

    Attributes:
        scores: Correspondences in the filled region, summed over references. [N]
        per_reference: The same, for each reference. [N, R]
        confidence: Sum of the confidences of those correspondences. [N]
        order: Candidates, best first; ties by confidence, then by index. [N]
        coverage: Share of the hole's cells that at least one reference matches. [N]
        correspondences: For each reference, those in the filled region; ``pair`` is the candidate,
            points are in px of candidate and reference.
    """

    scores: Tensor
    per_reference: Tensor
    confidence: Tensor
    order: Tensor
    coverage: Tensor
    correspondences: tuple[Correspondences, ...]

    @property
    def best(self) -> int:
        """Index of the best candidate."""
        return int(self.order[0])

    @property
    def margin(self) -> float:
        """Score of the best candidate minus the median score."""
        scores = self.scores.double()
        return float(scores[self.order[0]] - scores.quantile(0.5))


@torch.no_grad()
def prepare_references(matcher: Matcher, references: Sequence[Tensor]) -> ReferenceFeatures:
    """Run the matcher's backbone once per reference, so that many rankings can share it.

    Args:
        matcher: Finds the correspondences.
        references: Photos in [0, 1], of any size. [3, H, W] or [1, H, W] each

    Returns:
        What ``rank_candidates`` takes in place of the photos.
    """
    sizes = [(int(photo.shape[-2]), int(photo.shape[-1])) for photo in references]
    features = [matcher.features(_working(matcher, photo[None])) for photo in references]
    return ReferenceFeatures(tuple(features), tuple(sizes))


@torch.no_grad()
def rank_candidates(
    matcher: Matcher,
    candidates: Tensor,
    mask: Tensor,
    references: Sequence[Tensor] | ReferenceFeatures,
) -> Ranking:
    """Rank candidates by the correspondences between their filled region and the references.

    The whole candidate is matched, so that the known region gives context; only then are matches
    outside the mask dropped.

    Args:
        matcher: Finds the correspondences.
        candidates: Completed images in [0, 1]. [N, 3, H, W] or [N, 1, H, W]
        mask: 1 where pixels were missing, else 0. [H, W]
        references: Photos in [0, 1], of any size, [3, H, W] each, or what ``prepare_references``
            made of them.

    Returns:
        The ranking, on the candidates' device.

    Raises:
        InvalidScene: No candidate, no reference, an empty mask, or a mask of another size.
    """
    _check(candidates, mask, references)
    if not isinstance(references, ReferenceFeatures):
        references = prepare_references(matcher, references)
    pixels = _working(matcher, candidates)
    features = matcher.features(pixels)
    found = [matcher.match(features, reference) for reference in references.features]

    count, device = len(candidates), found[0].pair.device
    hole = _hole(mask.to(device), (int(pixels.shape[-2]), int(pixels.shape[-1])))
    cells = hole[::CELL_PX, ::CELL_PX]
    matched = torch.zeros((count, *cells.shape), dtype=torch.long, device=device)
    per_reference, confidence = [], torch.zeros(count, dtype=torch.float64, device=device)
    inside = []
    for matches in found:
        x, y = matches.points0.long().unbind(1)
        keep = hole[y, x]
        zeros = torch.zeros(count, dtype=torch.long, device=device)
        per_reference.append(zeros.index_add(0, matches.pair, keep.long()))
        confidence.index_add_(0, matches.pair, matches.confidence.double() * keep)
        place = (matches.pair, y // CELL_PX, x // CELL_PX)
        matched.index_put_(place, keep.long(), accumulate=True)
        inside.append(keep)
    table = torch.stack(per_reference, 1)
    scores = table.sum(1)
    frame = (candidates.shape[-2] / pixels.shape[-2], candidates.shape[-1] / pixels.shape[-1])
    return Ranking(
        scores=scores.to(candidates.device),
        per_reference=table.to(candidates.device),
        confidence=confidence.float().to(candidates.device),
        order=_order(scores, confidence.float()).to(candidates.device),
        coverage=(((matched > 0) & cells).sum((1, 2)) / cells.sum()).to(candidates.device),
        correspondences=tuple(
            _in_photo_px(matches.where(keep), frame, size, reference)
            for matches, keep, size, reference in zip(
                found, inside, references.sizes, references.features, strict=True
            )
        ),
    )


def _check(
    candidates: Tensor, mask: Tensor, references: Sequence[Tensor] | ReferenceFeatures
) -> None:
    photos = references.features if isinstance(references, ReferenceFeatures) else references
    if candidates.dim() != 4 or len(candidates) == 0:
        raise InvalidScene(f"candidates {tuple(candidates.shape)}: pass at least one [N, 3, H, W]")
    if len(photos) == 0:
        raise InvalidScene("ranking has 0 references; pass 1 to 5 photos of the place")
    if mask.shape != candidates.shape[-2:]:
        raise InvalidScene(
            f"mask of {tuple(mask.shape)} px does not fit candidates of "
            f"{tuple(candidates.shape[-2:])} px; give both one size"
        )
    if not bool(mask.any()):
        raise InvalidScene("the mask is empty (0 px missing); mark the pixels that were filled")


def _working(matcher: Matcher, images: Tensor) -> Tensor:
    """Grey images at the matcher's long side, sides rounded to its multiple. [N, 1, h, w]"""
    height, width = images.shape[-2:]
    scale = matcher.working_px / max(height, width)
    multiple = matcher.size_multiple
    size = [max(1, round(side * scale / multiple)) * multiple for side in (height, width)]
    grey = images.float()
    if images.shape[1] == 3:
        grey = (grey * grey.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
    if size == [height, width]:
        return grey
    grey = F.interpolate(grey, size=size, mode="bilinear", align_corners=False, antialias=True)
    return grey.clamp(0, 1)


def _hole(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """The mask at working size, such that at least one cell's pixel lies in it. [h, w] bool"""
    missing = (mask > 0).float()[None, None]
    hole = F.interpolate(missing, size=size, mode="nearest-exact")
    # A hole between the cells' pixels, or lost in the reduction: count every cell that it touches.
    touched = F.adaptive_max_pool2d(missing, (size[0] // CELL_PX, size[1] // CELL_PX))
    touched = F.interpolate(touched, size=size, mode="nearest-exact")
    hit = hole[..., ::CELL_PX, ::CELL_PX].any()
    return torch.where(hit, hole, touched)[0, 0] > 0


def _order(scores: Tensor, confidence: Tensor) -> Tensor:
    """Best first; equal scores by confidence, equal confidence by index. [N]"""
    by_confidence = confidence.argsort(descending=True, stable=True)
    return by_confidence[scores[by_confidence].argsort(descending=True, stable=True)]


def _in_photo_px(
    matches: Correspondences,
    frame: tuple[float, float],
    size: tuple[int, int],
    reference: Features,
) -> Correspondences:
    """Points at working size, moved to pixels of the candidate and of the reference."""
    rows, columns = reference.grid
    scale0 = matches.points0.new_tensor((frame[1], frame[0]))
    scale1 = matches.points1.new_tensor((size[1] / columns, size[0] / rows)) / CELL_PX
    return Correspondences(
        matches.points0 * scale0, matches.points1 * scale1, matches.confidence, matches.pair
    )
