"""Matches in the hole count by how near they lie to where the known region puts them."""

from __future__ import annotations

import math

import pytest
import torch

from realfill.rank import loftr, rank_candidates
from realfill.rank.correspondences import CELL_PX, Matches, cell_points
from realfill.rank.placement import SLACK_PX, agreement
from tests.realfill.rank.pictures import grey_photo

SIDE = 16
PLACES = cell_points(torch.arange(SIDE * SIDE), SIDE)
HOLE = ((PLACES >= 40) & (PLACES < 88)).all(1)
CELLS = int(HOLE.sum())
EXTENT_PX = SIDE * CELL_PX
# Turned by a fifth of a radian, three quarters of the size, and moved.
TURN = 0.75 * torch.tensor([[math.cos(0.2), math.sin(0.2)], [-math.sin(0.2), math.cos(0.2)]])
MOVED = torch.tensor([31.0, -12.0])


def matched(candidates: int = 2) -> Matches:
    """Every cell of every candidate matches exactly where a turned reference has it."""
    partners = (PLACES @ TURN + MOVED).expand(candidates, -1, -1).clone()
    confidence = torch.full((candidates, len(PLACES)), 0.5)
    return Matches(PLACES.expand(candidates, -1, -1), partners, confidence)


def agreed(*matches: Matches) -> list[float]:
    missing = [HOLE.expand(len(found.confidence), -1) for found in matches]
    return agreement(matches, missing, EXTENT_PX).tolist()


def test_what_lies_where_it_belongs_counts_in_full_and_references_add_up() -> None:
    """Turn, scale and shift are found; the known region itself does not count."""
    assert agreed(matched()) == pytest.approx([CELLS] * 2, rel=1e-3)
    assert agreed(matched(), matched()) == pytest.approx([2 * CELLS] * 2, rel=1e-3)


def test_what_lies_beside_it_counts_less() -> None:
    """By a Gaussian of its distance, for the candidate that is off alone."""
    matches = matched()
    matches.points1[1, HOLE, 0] += SLACK_PX
    whole, off = agreed(matches)
    assert whole == pytest.approx(CELLS, rel=1e-3)
    assert off == pytest.approx(CELLS * math.exp(-0.5), rel=1e-2)


def test_wrong_matches_of_the_known_region_do_not_move_the_map() -> None:
    """Two in five lie anywhere in the reference."""
    generator = torch.Generator().manual_seed(0)
    matches = matched()
    wrong = (torch.rand(matches.confidence.shape, generator=generator) < 0.4) & ~HOLE
    anywhere = torch.rand(matches.points1.shape, generator=generator) * EXTENT_PX
    matches.points1[wrong] = anywhere[wrong]
    assert agreed(matches) == pytest.approx([CELLS] * 2, rel=2e-2)


def test_cells_without_a_match_do_not_count() -> None:
    """However well their partner's place would fit."""
    matches = matched()
    matches.confidence[0, HOLE] = 0
    nothing, everything = agreed(matches)
    assert (nothing, everything) == (0, pytest.approx(CELLS, rel=1e-3))


@pytest.mark.parametrize("known", [0, 1, 2])
def test_few_known_matches_are_no_error(known: int) -> None:
    """None places nothing; one or two place a reference by its shift, for what that is worth."""
    matches = matched()
    matches.confidence[:, ~HOLE] = 0
    matches.confidence[:, torch.where(~HOLE)[0][:known]] = 0.5
    found = agreed(matches)
    assert all(math.isfinite(value) for value in found)
    assert (found == [0, 0]) == (known == 0)


def test_a_candidate_does_not_depend_on_the_others() -> None:
    """Each has its own map, to the bit the same alone and among others."""
    matches = matched(4)
    for k in range(4):
        matches.points1[k, :, 1] += 6 * k * HOLE + 20 * k
    found = agreed(matches)
    alone = [
        agreed(Matches(*(part[k, None] for part in vars(matches).values())))[0] for k in range(4)
    ]
    assert alone == found == sorted(found, reverse=True)


@pytest.mark.weights
def test_true_content_in_the_wrong_place_is_found_out() -> None:
    """A fill that shows the place four cells too high still matches, and agrees with little."""
    left, right = (
        grey_photo(f"motorcycle_{side}.png", 168, 256)[0].expand(3, -1, -1)
        for side in ("left", "right")
    )
    mask = torch.zeros(left.shape[1:])
    mask[48:112, 96:160] = 1
    moved = left.clone()
    moved[:, 48:112, 96:160] = left[:, 80:144, 96:160]
    ranking = rank_candidates(loftr(), torch.stack([moved, left]), mask, [right])
    wrong, true = ranking.scores.tolist()
    assert wrong > 0.5 * true
    assert ranking.agreement[0] < 0.2 * ranking.agreement[1]
    assert ranking.best == 1
