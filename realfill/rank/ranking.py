"""Correspondence-based ranking: the references vouch for the best candidate's filled region.

Source: RealFill, arXiv:2309.16668, section 3.4, which counts correspondences in the filled region.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from realfill.errors import InvalidScene
from realfill.rank.correspondences import CELL_PX, Correspondences, Matcher, Matches
from realfill.rank.placement import agreement
from realfill.rank.references import ReferenceFeatures, at_working_size, prepare_references

By = Literal["agreement", "count"]


@dataclass(frozen=True)
class Ranking:
    """Candidates by what the references say of them, with the evidence.

    Attributes:
        scores: Correspondences in the filled region, summed over references. [N]
        agreement: Correspondences in the filled region, however unsure, that lie where the known
            region puts them (``realfill.rank.placement``), likewise. [N]
        by: Which of the two candidates are ordered by; ``count`` is the scores.
        per_reference: The same, for each reference. [N, R]
        confidence: Sum of the confidences of those correspondences. [N]
        order: Candidates, best first; ties by confidence in the filled region, then by index. [N]
        coverage: Share of the hole's cells that at least one reference matches. [N]
        hole_cells: Number of those cells.
        matches: For each reference, those in the filled region, in px of candidate and reference.
    """

    scores: Tensor
    agreement: Tensor
    by: By
    per_reference: Tensor
    confidence: Tensor
    order: Tensor
    coverage: Tensor
    hole_cells: int
    matches: tuple[Matches, ...]

    @cached_property
    def correspondences(self) -> tuple[Correspondences, ...]:
        """For each reference, the matches in the filled region; ``pair`` is the candidate."""
        return tuple(matches.correspondences() for matches in self.matches)

    @property
    def best(self) -> int:
        """Index of the best candidate."""
        return int(self.order[0])

    def to(self, device: str | torch.device) -> Ranking:
        """The same on another device; the correspondences stay where they are."""
        return replace(
            self,
            scores=self.scores.to(device),
            agreement=self.agreement.to(device),
            per_reference=self.per_reference.to(device),
            confidence=self.confidence.to(device),
            order=self.order.to(device),
            coverage=self.coverage.to(device),
        )

    @property
    def ordered_by(self) -> Tensor:
        """Agreement or scores. [N]"""
        return self.agreement if self.by == "agreement" else self.scores

    @property
    def margin(self) -> float:
        """What candidates are ordered by: the best one's minus the median."""
        values = self.ordered_by.double()
        return float(values[self.order[0]] - values.quantile(0.5))


@torch.no_grad()
def rank_candidates(
    matcher: Matcher,
    candidates: Tensor,
    mask: Tensor,
    references: Sequence[Tensor] | ReferenceFeatures,
    *,
    by: By = "agreement",
) -> Ranking:
    """Rank candidates by their correspondences with the references.

    The whole candidate is matched, so that the known region gives context and tells where the
    hole's content lies in each reference; for the evidence, matches outside the mask are dropped.
    The paper counts what matches in the hole, wherever it matches; docs/ranking.md has the
    measurement by which the default was chosen.

    Args:
        matcher: Finds the correspondences.
        candidates: Completed images in [0, 1]. [N, 3, H, W] or [N, 1, H, W]
        mask: 1 where pixels were missing, else 0. [H, W]
        references: Photos in [0, 1], of any size, [3, H, W] each, or what ``prepare_references``
            made of them.
        by: What orders the candidates.

    Returns:
        The ranking, on the candidates' device.

    Raises:
        InvalidScene: No candidate, no reference, an empty mask, or a mask of another size.
    """
    _check(candidates, mask, references)
    if not isinstance(references, ReferenceFeatures):
        references = prepare_references(matcher, references)
    pixels = at_working_size(matcher, candidates)
    hole = _hole(mask.cpu(), (int(pixels.shape[-2]), int(pixels.shape[-1])))
    features = matcher.features(pixels)
    everywhere = matcher.compare_each(features, references.features, threshold=0.0)
    missing = [_missing(matches, hole) for matches in everywhere]
    agreeing = agreement(everywhere, missing, max(pixels.shape[-2:]))
    found = [
        replace(sure, confidence=sure.confidence * inside)
        for sure, inside in zip(
            (matches.above(matcher.threshold) for matches in everywhere), missing, strict=True
        )
    ]
    table = torch.stack([(matches.confidence > 0).sum(1) for matches in found], 1)
    sums = [matches.confidence.sum(1, dtype=torch.float64) for matches in found]
    confidence = torch.stack(sums).sum(0).float()
    scores = table.sum(1)
    hole_cells = int(hole[::CELL_PX, ::CELL_PX].sum())
    frame = (candidates.shape[-2] / pixels.shape[-2], candidates.shape[-1] / pixels.shape[-1])
    device = candidates.device
    return Ranking(
        scores=scores.to(device),
        agreement=agreeing.to(device),
        by=by,
        per_reference=table.to(device),
        confidence=confidence.to(device),
        order=_order(agreeing if by == "agreement" else scores, confidence).to(device),
        coverage=_coverage(found, hole).to(device),
        hole_cells=hole_cells,
        matches=tuple(
            _in_photo_px(matches, frame, size, reference.grid)
            for matches, size, reference in zip(
                found, references.sizes, references.features, strict=True
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


def _hole(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """The mask at working size, such that at least one cell's pixel lies in it. [h, w] bool"""
    missing = (mask > 0).float()[None, None]
    hole = F.interpolate(missing, size=size, mode="nearest-exact")
    # A hole between the cells' pixels, or lost in the reduction: count every cell that it touches.
    touched = F.adaptive_max_pool2d(missing, (size[0] // CELL_PX, size[1] // CELL_PX))
    touched = F.interpolate(touched, size=size, mode="nearest-exact")
    hit = hole[..., ::CELL_PX, ::CELL_PX].any()
    return torch.where(hit, hole, touched)[0, 0] > 0


def _missing(matches: Matches, hole: Tensor) -> Tensor:
    """Whether each match begins in the hole, [h, w] bool. [N, L] bool"""
    x, y = matches.points0.long().unbind(2)
    # A matcher's absent points are negative, and have no match.
    return hole.to(x.device, non_blocking=True)[y.clamp(min=0), x.clamp(min=0)]


def _coverage(found: Sequence[Matches], hole: Tensor) -> Tensor:
    """Share of the hole's cells in which a match with any reference begins. [N]"""
    cells = hole[::CELL_PX, ::CELL_PX].flatten()
    columns = -(-hole.shape[1] // CELL_PX)
    first = found[0].confidence
    matched = torch.zeros((len(first), len(cells)), dtype=torch.int32, device=first.device)
    for matches in found:
        place = matches.points0.long().clamp(min=0) // CELL_PX
        matched.scatter_add_(
            1, place[..., 1] * columns + place[..., 0], (matches.confidence > 0).int()
        )
    inside = cells.to(first.device, non_blocking=True)
    return ((matched > 0) & inside).sum(1) / inside.sum().clamp(min=1)


def _order(scores: Tensor, confidence: Tensor) -> Tensor:
    """Best first; equal scores by confidence, equal confidence by index. [N]"""
    by_confidence = confidence.argsort(descending=True, stable=True)
    return by_confidence[scores[by_confidence].argsort(descending=True, stable=True)]


def _in_photo_px(
    matches: Matches,
    frame: tuple[float, float],
    size: tuple[int, int],
    grid: tuple[int, int],
) -> Matches:
    """Points at working size, moved to pixels of the candidate and of the reference."""
    scale1 = (size[1] / (grid[1] * CELL_PX), size[0] / (grid[0] * CELL_PX))
    return replace(
        matches,
        points0=_scaled(matches.points0, (frame[1], frame[0])),
        points1=_scaled(matches.points1, scale1),
    )


def _scaled(points: Tensor, scale: tuple[float, float]) -> Tensor:
    """Points with columns and rows multiplied. [..., 2]"""
    return torch.stack([points[..., 0] * scale[0], points[..., 1] * scale[1]], -1)
