"""Candidates are ranked by what the references see in the filled region."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from realfill.errors import InvalidScene
from realfill.nano.pretrain_matcher import CONFIG
from realfill.rank.correspondences import Features, Matcher, Matches
from realfill.rank.matching import CoarseLoFTR, LoFTRMatcher, loftr
from realfill.rank.ranking import By, Ranking, rank_candidates
from realfill.rank.references import prepare_references

SIZE = 64
MOST_ROWS = 16


@dataclass
class ScriptedMatcher(Matcher):
    """Answers each ``match`` with the next of its scripted rows (pair, x, y, confidence)."""

    script: list[list[tuple[int, int, int, float]]]
    name: str = "scripted"
    size_multiple: int = 8
    working_px: int = SIZE
    threshold: float = 0.2
    digest: str = "scripted"
    seen: list[tuple[int, ...]] = field(default_factory=list)

    def features(self, images: Tensor) -> Features:
        self.seen.append(tuple(images.shape))
        grid = (images.shape[2] // 8, images.shape[3] // 8)
        return Features(torch.zeros(len(images), grid[0] * grid[1], 1), grid)

    def compare(
        self, features0: Features, features1: Features, *, threshold: float | None = None
    ) -> Matches:
        rows = self.script.pop(0)
        points = torch.zeros(len(features0), MOST_ROWS, 2)
        confidence = torch.zeros(points.shape[:2])
        for k, (pair, x, y, sure) in enumerate(rows):
            points[pair, k] = torch.tensor([x, y])
            confidence[pair, k] = sure
        found = Matches(points, points, confidence)
        return found.above(self.threshold if threshold is None else threshold)


def _mask(top: int, left: int, bottom: int, right: int) -> Tensor:
    mask = torch.zeros(SIZE, SIZE)
    mask[top:bottom, left:right] = 1
    return mask


def _rank(
    script: list[list[tuple[int, int, int, float]]],
    mask: Tensor,
    count: int = 3,
    by: By = "agreement",
) -> Ranking:
    candidates = torch.zeros(count, 3, SIZE, SIZE)
    references = [torch.zeros(3, SIZE, SIZE)] * len(script)
    return rank_candidates(ScriptedMatcher(script), candidates, mask, references, by=by)


def _small_loftr() -> LoFTRMatcher:
    config = {**CONFIG, "match_coarse": {**CONFIG["match_coarse"], "thr": 2e-2}}
    torch.manual_seed(0)
    return LoFTRMatcher(
        CoarseLoFTR(config), name="small", working_px=SIZE, device=torch.device("cpu")
    )


def _pictures(count: int) -> Tensor:
    return torch.rand((count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(3))


def test_only_matches_in_the_hole_count_and_references_add_up() -> None:
    """Scores sum over references what lies in the mask, and nothing else."""
    ranking = _rank(
        [
            [(0, 16, 16, 0.5), (0, 56, 56, 0.9), (1, 16, 24, 0.5), (1, 24, 24, 0.5)],
            [(0, 24, 16, 0.5), (1, 16, 16, 0.5), (2, 0, 0, 0.9)],
        ],
        _mask(16, 16, 32, 32),
        by="count",
    )
    assert ranking.per_reference.tolist() == [[1, 1], [2, 1], [0, 0]]
    assert ranking.scores.tolist() == [2, 3, 0]
    assert ranking.order.tolist() == [1, 0, 2]
    assert ranking.best == 1
    assert ranking.margin == 1.0


def test_candidates_are_ordered_by_what_was_asked_for() -> None:
    """Agreement by default, the count of sure matches on request; the margin is that of either."""
    known = [(k, x, 56, 0.9) for k in (0, 1, 2) for x in (0, 16, 32, 48)]
    sure = [(0, 16, 16, 0.5)]
    unsure = [(1, x, 16, 0.1) for x in (16, 24)]
    script = [[*known, *sure, *unsure]]
    agreed = _rank(list(script), _mask(16, 16, 32, 32))
    counted = _rank(list(script), _mask(16, 16, 32, 32), by="count")
    assert agreed.order.tolist() == [1, 0, 2]
    assert agreed.agreement.tolist() == pytest.approx([1, 2, 0])
    assert agreed.margin == pytest.approx(1)
    assert (counted.order.tolist(), counted.margin) == ([0, 1, 2], 1.0)
    assert agreed.scores.tolist() == counted.scores.tolist() == [1, 0, 0]


def test_where_nothing_known_matches_confidence_decides() -> None:
    """References that cannot be placed agree with nothing."""
    ranking = _rank([[(0, 16, 16, 0.5), (1, 16, 16, 0.75)]], _mask(16, 16, 32, 32))
    assert ranking.agreement.tolist() == [0, 0, 0]
    assert ranking.order.tolist() == [1, 0, 2]


def test_coverage_is_the_share_of_hole_cells_that_any_reference_matches() -> None:
    """A cell matched by two references counts once."""
    ranking = _rank(
        [[(0, 16, 16, 0.5)], [(0, 16, 16, 0.5), (0, 24, 24, 0.5)]], _mask(16, 16, 32, 32)
    )
    assert ranking.coverage.tolist() == [0.5, 0.0, 0.0]


def test_ties_are_broken_by_confidence_then_by_index() -> None:
    """Equal scores fall back on confidence, equal confidences on the order given."""
    rows = [(0, 16, 16, 0.5), (1, 16, 16, 0.75), (2, 16, 16, 0.5)]
    ranking = _rank([rows], _mask(16, 16, 32, 32))
    assert ranking.order.tolist() == [1, 0, 2]
    assert ranking.confidence.tolist() == [0.5, 0.75, 0.5]


def test_no_match_anywhere_gives_zeros_in_the_order_given() -> None:
    """Zero matches give zero scores, no NaN, and a stable order."""
    ranking = _rank([[], []], _mask(16, 16, 32, 32))
    assert ranking.scores.tolist() == [0, 0, 0]
    assert ranking.order.tolist() == [0, 1, 2]
    assert ranking.coverage.tolist() == [0.0, 0.0, 0.0]
    assert ranking.margin == 0.0
    assert [len(c) for c in ranking.correspondences] == [0, 0]


@pytest.mark.parametrize(("top", "left"), [(16, 16), (0, 0), (56, 56)])
def test_a_hole_of_one_cell_counts_that_cell(top: int, left: int) -> None:
    """The smallest aligned hole holds exactly one cell, at a corner too."""
    ranking = _rank([[(0, left, top, 0.5), (1, 32, 32, 0.5)]], _mask(top, left, top + 8, left + 8))
    assert ranking.scores.tolist() == [1, 0, 0]
    assert ranking.coverage.tolist() == [1.0, 0.0, 0.0]


def test_a_hole_between_cell_points_counts_the_cell_it_touches() -> None:
    """A hole too small to hold a cell's pixel still has a cell."""
    ranking = _rank([[(0, 16, 16, 0.5), (0, 24, 16, 0.5)]], _mask(18, 18, 21, 21))
    assert ranking.scores.tolist() == [1, 0, 0]
    assert ranking.coverage[0] == 1.0


def test_a_hole_at_all_borders_keeps_the_border_cells() -> None:
    """Outpainting: the frame is missing, and its outermost cells count."""
    frame = 1 - _mask(16, 16, 48, 48)
    rows = [(0, 0, 0, 0.5), (0, 56, 0, 0.5), (0, 0, 56, 0.5), (0, 56, 56, 0.5), (0, 24, 24, 0.5)]
    assert _rank([rows], frame).scores.tolist() == [4, 0, 0]


def test_points_come_back_in_px_of_candidate_and_reference() -> None:
    """Correspondences are scaled from working size to each image's own."""
    matcher = ScriptedMatcher([[(0, 32, 16, 0.5)]])
    mask = torch.ones(2 * SIZE, 2 * SIZE)
    candidates, reference = torch.zeros(1, 3, 2 * SIZE, 2 * SIZE), torch.zeros(3, 96, 192)
    ranking = rank_candidates(matcher, candidates, mask, [reference])
    assert matcher.seen == [(1, 1, 32, 64), (1, 1, 64, 64)]
    assert ranking.correspondences[0].points0.tolist() == [[64.0, 32.0]]
    assert ranking.correspondences[0].points1.tolist() == [[96.0, 48.0]]


def test_prepared_references_are_not_looked_at_again() -> None:
    """Features kept from one ranking serve the next, with equal counts."""
    matcher, pictures = _small_loftr(), _pictures(5)
    prepared = prepare_references(matcher, list(pictures[3:]))
    mask = _mask(8, 8, 56, 56)
    kept = rank_candidates(matcher, pictures[:3], mask, prepared)
    fresh = rank_candidates(matcher, pictures[:3], mask, list(pictures[3:]))
    assert torch.equal(kept.per_reference, fresh.per_reference)
    assert torch.equal(kept.correspondences[1].points1, fresh.correspondences[1].points1)


def test_a_ranking_moves_to_another_device_but_for_its_correspondences() -> None:
    """Meta is a device that is always there, and holds no numbers."""
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    ranking = rank_candidates(_small_loftr(), pictures[:2], _mask(8, 8, 56, 56), [pictures[2]])
    moved = ranking.to("meta")
    assert moved.scores.is_meta
    assert moved.order.is_meta
    assert moved.coverage.shape == ranking.coverage.shape
    assert moved.matches is ranking.matches
    assert moved.hole_cells == ranking.hole_cells


def test_the_reference_itself_beats_noise_and_blank() -> None:
    """A candidate identical to the reference wins; a blank one has finite numbers."""
    pictures = _pictures(3)
    candidates = torch.stack([pictures[1], torch.zeros(3, SIZE, SIZE), pictures[0]])
    ranking = rank_candidates(_small_loftr(), candidates, _mask(8, 8, 56, 56), [pictures[0]])
    assert ranking.best == 2
    assert ranking.scores[2] > ranking.scores[:2].max()
    assert ranking.confidence.isfinite().all()
    assert ranking.coverage.isfinite().all()


def test_grey_images_rank_like_grey_colours() -> None:
    """One channel means what three equal channels mean."""
    grey, mask = _pictures(4)[:, :1], _mask(8, 8, 56, 56)
    one = rank_candidates(_small_loftr(), grey[:3], mask, [grey[3]])
    colour = grey.expand(-1, 3, -1, -1)
    three = rank_candidates(_small_loftr(), colour[:3], mask, [colour[3]])
    assert torch.equal(one.scores, three.scores)


def test_awkward_sizes_are_resized_to_the_matchers_multiple() -> None:
    """Sides that are no multiple of 8 are accepted."""
    pictures = torch.rand((2, 3, 61, 43), generator=torch.Generator().manual_seed(3))
    ranking = rank_candidates(
        _small_loftr(), pictures, torch.ones(61, 43), [pictures[0], torch.rand(3, 33, 90)]
    )
    assert ranking.best == 0
    assert ranking.correspondences[0].points0[:, 0].max() < 43
    assert ranking.correspondences[1].points1[:, 0].max() < 90


def test_a_candidates_score_does_not_depend_on_the_others() -> None:
    """Ranked alone, a candidate scores what it scores among others."""
    matcher, pictures, mask = _small_loftr(), _pictures(5), _mask(8, 8, 56, 56)
    together = rank_candidates(matcher, pictures[:4], mask, [pictures[4], pictures[1]])
    alone = [
        rank_candidates(matcher, pictures[k, None], mask, [pictures[4], pictures[1]]).scores[0]
        for k in range(4)
    ]
    assert together.scores.tolist() == [int(score) for score in alone]


@pytest.mark.parametrize(
    ("candidates", "mask", "references", "message"),
    [
        (torch.zeros(0, 3, 64, 64), torch.ones(64, 64), [torch.zeros(3, 64, 64)], "at least one"),
        (torch.zeros(1, 3, 64, 64), torch.ones(64, 64), [], "0 references"),
        (torch.zeros(1, 3, 64, 64), torch.zeros(64, 64), [torch.zeros(3, 64, 64)], "is empty"),
        (torch.zeros(1, 3, 64, 64), torch.ones(32, 64), [torch.zeros(3, 64, 64)], "does not fit"),
    ],
)
def test_what_cannot_be_ranked_is_refused(
    candidates: Tensor, mask: Tensor, references: list[Tensor], message: str
) -> None:
    """No candidate, no reference, an empty mask and a mask of another size are refused."""
    with pytest.raises(InvalidScene, match=message):
        rank_candidates(ScriptedMatcher([[]]), candidates, mask, references)


def _photo(name: str) -> Tensor:
    """A photograph of the scikit-image wheel, reduced to 192x128 px. [3, 128, 192]"""
    with Image.open(Path(skimage.data.__file__).parent / name) as photo:
        small = photo.convert("RGB").resize((192, 128), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(small, np.float32) / 255).permute(2, 0, 1)


@pytest.mark.weights
def test_nano_ranks_the_true_filling_before_invented_ones() -> None:
    """The truth beats another photo, a mirrored one, and a plain filling, and covers the hole."""
    target, reference = _photo("motorcycle_right.png"), _photo("motorcycle_left.png")
    mask = torch.zeros(128, 192)
    mask[40:96, 64:136] = 1
    fillings = [
        _photo("coffee.png"),
        target.mean((1, 2), keepdim=True).expand_as(target),
        target.flip(2),
        F.avg_pool2d(target[None], 5, 1, 2)[0],
        target,
    ]
    candidates = torch.stack([torch.where(mask > 0, filling, target) for filling in fillings])
    ranking = rank_candidates(loftr("nano"), candidates, mask, [reference])
    assert ranking.best in (3, 4)
    assert ranking.coverage[4] > 0.6
    assert ranking.scores[3:].min() > 3 * ranking.scores[:3].max()
