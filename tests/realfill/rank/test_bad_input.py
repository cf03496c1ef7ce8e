"""Whatever is asked of the ranking, the answer is right, finite and in a stable order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from realfill.rank import Matcher, Ranking, judge, load_matcher, rank_candidates
from tests.realfill.rank.pictures import grey_photo

pytestmark = pytest.mark.weights
HEIGHT, WIDTH = 160, 208


@pytest.fixture(scope="module", params=["torch:nano", "onnx:nano"])
def matcher(request: pytest.FixtureRequest) -> Matcher:
    return load_matcher(request.param)


def photo(name: str, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """A photograph in grey, as three channels. [3, height, width]"""
    return grey_photo(name, height, width)[0].expand(3, -1, -1)


LEFT, RIGHT = (photo(f"motorcycle_{side}.png") for side in ("left", "right"))


def hole(top: int, left: int, bottom: int, right: int) -> Tensor:
    mask = torch.zeros(HEIGHT, WIDTH)
    mask[top:bottom, left:right] = 1
    return mask


def assert_sound(ranking: Ranking, count: int) -> None:
    """Numbers are finite and agree with each other, and each candidate has one place."""
    assert ranking.scores.tolist() == ranking.per_reference.sum(1).tolist()
    for numbers in (ranking.confidence, ranking.coverage):
        assert numbers.isfinite().all()
        assert (numbers >= 0).all()
    assert (ranking.coverage <= 1).all()
    assert sorted(ranking.order.tolist()) == list(range(count))
    found = [matches.pair for matches in ranking.correspondences]
    counts = sum(torch.bincount(pair, minlength=count) for pair in found)
    assert ranking.scores.tolist() == torch.as_tensor(counts).tolist()


def test_a_reference_identical_to_the_target(matcher: Matcher) -> None:
    """The truth then covers nearly the whole hole and wins; an invention does not."""
    mask = hole(48, 56, 112, 152)
    invented = torch.where(mask > 0, photo("coffee.png"), LEFT)
    ranking = rank_candidates(matcher, torch.stack([invented, LEFT]), mask, [LEFT])
    assert_sound(ranking, 2)
    assert ranking.best == 1
    assert ranking.coverage[1] > 0.9
    assert judge(ranking) == ("unsupported", "supported")


def test_a_blank_candidate(matcher: Matcher) -> None:
    """Black, white and grey images score nothing and come last, in the order given."""
    blank = [torch.full_like(LEFT, level) for level in (0.0, 1.0, 0.5)]
    candidates = torch.stack([*blank, RIGHT])
    ranking = rank_candidates(matcher, candidates, torch.ones(HEIGHT, WIDTH), [LEFT])
    assert_sound(ranking, 4)
    assert ranking.order[0] == 3
    assert ranking.scores[:3].max() <= 0.05 * ranking.scores[3]


@pytest.mark.parametrize("corner", [(0, 0), (HEIGHT - 8, WIDTH - 8), (75, 101)])
def test_a_hole_of_one_cell(matcher: Matcher, corner: tuple[int, int]) -> None:
    """Wherever it lies, the hole has cells, and one match never counts as support."""
    top, left = corner
    mask = hole(top, left, top + 8, left + 8)
    ranking = rank_candidates(matcher, torch.stack([LEFT, RIGHT]), mask, [LEFT])
    assert_sound(ranking, 2)
    assert 1 <= ranking.hole_cells <= 4
    assert ranking.scores.max() <= ranking.hole_cells
    assert "supported" not in judge(ranking)


def test_a_hole_at_all_borders(matcher: Matcher) -> None:
    """Outpainting: the frame is missing, its corner cells included, and only it is counted."""
    frame = 1 - hole(40, 48, 120, 160)
    ranking = rank_candidates(matcher, torch.stack([RIGHT, LEFT]), frame, [LEFT])
    assert_sound(ranking, 2)
    assert ranking.best == 1
    points = ranking.correspondences[0].of_pair(1).points0
    assert points.min() == 0
    outside = (
        (points[:, 0] < 48) | (points[:, 0] >= 160) | (points[:, 1] < 40) | (points[:, 1] >= 120)
    )
    assert outside.all()


def test_grey_images(matcher: Matcher) -> None:
    """One channel ranks as three equal ones, candidates and references alike."""
    mask = hole(48, 56, 112, 152)
    colour = rank_candidates(matcher, torch.stack([LEFT, RIGHT]), mask, [LEFT])
    one = torch.stack([LEFT, RIGHT])[:, :1]
    grey = rank_candidates(matcher, one, mask, [LEFT[:1]])
    assert torch.equal(grey.scores, colour.scores)


@pytest.mark.parametrize("size", [(161, 203), (45, 300), (300, 45), (9, 9)])
def test_sizes_that_8_does_not_divide(matcher: Matcher, size: tuple[int, int]) -> None:
    """Odd, long, tall and tiny images of candidates and references, in any combination."""
    odd = photo("motorcycle_left.png", *size)
    ranking = rank_candidates(matcher, odd[None], torch.ones(size), [odd, RIGHT])
    assert_sound(ranking, 1)
    points = ranking.correspondences[0].points0
    assert (points < torch.tensor([size[1], size[0]])).all()
    assert ranking.per_reference[0, 0] >= ranking.per_reference[0, 1]


def test_zero_matches_everywhere(matcher: Matcher) -> None:
    """Nothing to count gives zeros, the order given, no margin, and no support."""
    blank = torch.zeros(4, 3, HEIGHT, WIDTH)
    ranking = rank_candidates(matcher, blank, hole(48, 56, 112, 152), [torch.ones_like(LEFT)])
    assert_sound(ranking, 4)
    assert ranking.scores.tolist() == [0, 0, 0, 0]
    assert ranking.order.tolist() == [0, 1, 2, 3]
    assert ranking.margin == 0
    assert judge(ranking) == ("unsupported",) * 4


def test_equal_candidates_keep_their_order(matcher: Matcher) -> None:
    """Copies tie in score and confidence, whatever their number, and stay as given."""
    candidates = torch.stack([RIGHT] * 5 + [LEFT])
    ranking = rank_candidates(matcher, candidates, hole(48, 56, 112, 152), [LEFT])
    assert_sound(ranking, 6)
    assert ranking.order.tolist() == [5, 0, 1, 2, 3, 4]
