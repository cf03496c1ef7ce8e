"""Correspondences that move together are told from those that do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from realfill.rank.consistency import Model, consistent
from realfill.rank.correspondences import Correspondences


def together(points0: Tensor, points1: Tensor) -> Correspondences:
    """Correspondences of one pair."""
    ones = torch.ones(len(points0))
    return Correspondences(points0.float(), points1.float(), ones, torch.zeros_like(ones).long())


def grid(side: int = 7) -> Tensor:
    """Points of a grid over 240 px. [side ** 2, 2]"""
    steps = torch.linspace(0, 240, side, dtype=torch.float64)
    return torch.cartesian_prod(steps, steps)


def seen_from_the_side(points: Tensor) -> Tensor:
    """The points through a homography with perspective in it."""
    matrix = torch.tensor([[1.1, 0.1, 5], [-0.05, 0.9, 8], [2e-4, 1e-4, 1]], dtype=torch.float64)
    moved = torch.cat([points, torch.ones(len(points), 1, dtype=torch.float64)], 1) @ matrix.T
    return moved[:, :2] / moved[:, 2:]


def test_a_plane_is_found_among_wrong_matches() -> None:
    """All points of the plane agree, although a third of the matches are wrong."""
    points0 = grid()
    points1 = seen_from_the_side(points0)
    wrong = torch.arange(0, len(points0), 3)
    points1[wrong] = points1[wrong.flip(0)] + 40
    agree = consistent(together(points0, points1), within_px=2)
    right = torch.ones(len(points0), dtype=torch.bool)
    right[wrong] = False
    assert agree[right].all()
    assert agree[wrong].float().mean() < 0.2


def test_two_views_of_depth_agree_on_their_epipolar_lines() -> None:
    """Points at many depths move along one direction: no plane explains them, two views do."""
    points0 = grid()
    depth = torch.rand(len(points0), generator=torch.Generator().manual_seed(1)).double()
    points1 = points0 + torch.stack([10 + 90 * depth, torch.zeros_like(depth)], 1)
    pair = together(points0, points1)
    assert consistent(pair, model="fundamental", within_px=1).float().mean() > 0.95
    assert consistent(pair, model="homography", within_px=1).float().mean() < 0.6


@pytest.mark.parametrize(("model", "size"), [("homography", 4), ("fundamental", 8)])
def test_too_few_points_contradict_nothing(model: Model, size: int) -> None:
    """Points that every model fits are no evidence; no point at all is no error."""
    for count in (0, 1, size):
        points = grid()[:count]
        agree = consistent(together(points, points), model=model)
        assert agree.tolist() == [False] * count


def test_points_in_one_place_give_no_error() -> None:
    """A degenerate set has an answer of the right length."""
    points = torch.zeros(12, 2)
    assert consistent(together(points, points)).shape == (12,)
    assert consistent(together(points, points), model="fundamental").shape == (12,)


def test_equal_generators_give_equal_answers() -> None:
    """Without a generator the answer is the same every time."""
    noise = torch.rand((2, 30, 2), generator=torch.Generator().manual_seed(0)) * 240
    pair = together(*noise)
    assert torch.equal(consistent(pair), consistent(pair))
    again = consistent(pair, generator=torch.Generator().manual_seed(0))
    assert torch.equal(consistent(pair), again)
