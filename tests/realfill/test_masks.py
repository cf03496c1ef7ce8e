"""Masks: random ones, growing them, reducing them to latent cells."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realfill.errors import InvalidScene
from realfill.masks import dilate, latent_mask, random_mask, random_masks


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), size_px=st.sampled_from([8, 32, 100, 128, 512]))
def test_random_mask_is_never_empty_or_full(seed: int, size_px: int) -> None:
    """Every draw leaves something to fill and something to see, and holds only zeros and ones."""
    mask = random_mask(_generator(seed), size_px)

    assert mask.shape == (size_px, size_px)
    assert set(mask.unique().tolist()) == {0.0, 1.0}


@given(seed=st.integers(0, 2**32))
def test_random_mask_border_is_of_one_kind(seed: int) -> None:
    """Rectangles stay clear of the border: it is wholly known, or wholly missing."""
    mask = random_mask(_generator(seed), 100)

    border = torch.cat([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    assert border.min() == border.max()


def test_random_mask_draws_unions_and_complements() -> None:
    """About half of many draws are complements, whose border is missing."""
    generator = _generator(0)
    complements = sum(float(random_mask(generator, 64)[0, 0]) for _ in range(400))

    assert 160 < complements < 240


def test_random_mask_sides_are_within_bounds() -> None:
    """A union's rectangles are 3 to 25 % of the image: one rectangle alone shows both ends."""
    generator = _generator(3)
    sides = []
    for _ in range(600):
        mask = random_mask(generator, 100)
        mask = mask if mask[0, 0] == 0 else 1 - mask
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        height = int(rows[-1] - rows[0]) + 1
        width = int(columns[-1] - columns[0]) + 1
        if mask.sum() == height * width and max(height, width) <= 25:
            sides += [height, width]

    assert min(sides) >= 3
    assert min(sides) < 8
    assert max(sides) > 20


def test_random_mask_follows_the_generator() -> None:
    """The same seed gives the same mask, another seed another one."""
    assert torch.equal(random_mask(_generator(5), 64), random_mask(_generator(5), 64))
    assert not torch.equal(random_mask(_generator(5), 64), random_mask(_generator(6), 64))


def test_many_masks_are_as_one_is() -> None:
    """As often the complement, of rectangles as large and as many, and never empty or full."""
    many = random_masks(torch.Generator().manual_seed(0), 400, 64)
    assert many.shape == (400, 64, 64)
    assert set(many.unique().tolist()) == {0.0, 1.0}
    shares = many.mean((1, 2))
    assert float(shares.min()) > 0
    assert float(shares.max()) < 1
    ones = [random_mask(torch.Generator().manual_seed(k), 64) for k in range(400)]
    single = torch.stack(ones).mean((1, 2))
    border = many[:, 0, 0].bool()
    assert 0.4 < float(border.float().mean()) < 0.6
    covered = torch.where(border, 1 - shares, shares)
    apart = torch.where(torch.stack(ones)[:, 0, 0].bool(), 1 - single, single)
    assert float(covered.mean()) == pytest.approx(float(apart.mean()), abs=0.03)
    assert torch.equal(many, random_masks(torch.Generator().manual_seed(0), 400, 64))


def test_dilate_grows_by_a_square() -> None:
    """One pixel grown by two becomes a square of five."""
    mask = torch.zeros(9, 11)
    mask[4, 5] = 1
    expected = torch.zeros(9, 11)
    expected[2:7, 3:8] = 1

    assert torch.equal(dilate(mask, 2), expected)


def test_dilate_stops_at_the_border() -> None:
    """A corner grows inward only."""
    mask = torch.zeros(1, 4, 4)
    mask[0, 0, 0] = 1

    assert dilate(mask, 1)[0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]


def test_dilate_by_nothing_is_a_copy() -> None:
    """Growing by zero pixels returns an equal mask that is not the same memory."""
    mask = torch.eye(3)
    grown = dilate(mask, 0)
    grown[0, 0] = 0

    assert torch.equal(mask, torch.eye(3))


def test_latent_mask_one_pixel_makes_the_cell_missing() -> None:
    """Max-pooling never calls a cell known that holds a missing pixel."""
    mask = torch.zeros(2, 16, 24)
    mask[0, 7, 8] = 1
    mask[1, 15, 23] = 1

    assert latent_mask(mask, 8).tolist() == [[[0, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 1]]]


def test_latent_mask_nearest_asks_the_middle_alone() -> None:
    """A missing pixel beside a cell's middle is overlooked, the one in the middle is not."""
    mask = torch.zeros(16, 16)
    mask[3, 3] = mask[4, 12] = mask[15, 15] = 1

    assert latent_mask(mask, 8, nearest=True).tolist() == [[0, 1], [0, 0]]
    assert latent_mask(mask, 8).tolist() == [[1, 1], [0, 1]]


def test_latent_mask_refuses_a_size_that_cells_do_not_tile() -> None:
    """The message names size, cell and remedy."""
    with pytest.raises(InvalidScene, match=r"20x16 pixels.*8 pixels.*multiple of 8"):
        latent_mask(torch.zeros(16, 20), 8)
