"""Pairs show what their truth says."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from realfill.nano.pairs import UNKNOWN, UNMATCHED, _pictures, make_pairs, worlds
from tests.realfill.nano.pairs import little_pool


def _patches(images: Tensor, size_px: int = 160) -> Tensor:
    """The 3x3 px around each cell's pixel, beyond the edge mirrored. [N, L, 9]"""
    columns = F.unfold(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, stride=8)
    assert columns.shape[2] == (size_px // 8) ** 2
    return columns.transpose(1, 2)


def test_partners_show_the_same_point() -> None:
    """Hardly moved and lit alike, matched cells look alike and other cells do not."""
    pairs = make_pairs(*little_pool(), 16, 160, 0.0, torch.Generator().manual_seed(1))
    matched = pairs.partner >= 0
    assert 0.3 < matched.float().mean() < 0.95
    centres0, centres1 = (_patches(i).mean(2) for i in (pairs.images0, pairs.images1))
    partner = pairs.partner.clamp(min=0)
    true = (centres0 - centres1.gather(1, partner))[matched].abs().median()
    shifted = (centres0 - centres1.gather(1, (partner + 7) % 400))[matched].abs().median()
    assert true < 0.5 * shifted


def test_no_two_cells_share_a_partner() -> None:
    """Truth is one to one, as the matcher's mutual nearest cells are."""
    pairs = make_pairs(*little_pool(), 16, 160, 1.0, torch.Generator().manual_seed(2))
    for row in pairs.partner:
        partners = row[row >= 0]
        assert len(partners.unique()) == len(partners)
        assert (row >= UNKNOWN).all()
        assert (row < 400).all()


def test_some_pairs_show_different_places() -> None:
    """The matcher also sees pairs in which no cell has a partner, about one in three."""
    pairs = make_pairs(*little_pool(), 96, 80, 0.5, torch.Generator().manual_seed(3))
    empty = (pairs.partner < 0).all(1)
    assert 0.2 < empty.float().mean() < 0.45
    assert (pairs.partner == UNMATCHED).any()


def test_different_places_are_never_one_photograph() -> None:
    """The worlds of a pair that are photographs are of different ones."""
    soft = torch.zeros((1, 1, 160, 160), dtype=torch.uint8)
    views = torch.arange(1, 25, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 320, 320)
    generator = torch.Generator().manual_seed(6)
    roles = _pictures(soft, views, 5, 16, generator)
    shown = torch.stack([(role[:, 0, 0, 0] * 255).round() for role in roles]).long()
    for pair in shown.T:
        photographs = (pair[pair > 0] - 1) % 12
        assert len(photographs.unique()) == len(photographs)
    assert 0.2 < (shown > 0).float().mean() < 0.6


def test_pairs_depend_on_the_generator_alone() -> None:
    """Equal seeds give equal pairs, in [0, 1]."""
    one, two = (
        make_pairs(*little_pool(), 4, 80, 0.7, torch.Generator().manual_seed(4)) for _ in "ab"
    )
    assert torch.equal(one.images1, two.images1)
    assert torch.equal(one.partner, two.partner)
    assert one.images0.min() >= 0
    assert one.images0.max() <= 1


def test_worlds_are_grey_and_leave_the_held_out_photos_alone() -> None:
    """Pool and sharp views become grey bytes; the held-out motorcycle is not among the photos."""
    pictures = np.full((2, 160, 160, 3), (255, 0, 0), np.uint8)
    pool, sharp = worlds(pictures, seed=0, sharp=3)
    assert pool.shape == (2, 1, 160, 160)
    assert pool.unique().tolist() == [76]
    assert sharp.shape == (3, 1, 320, 320)
    assert sharp.float().std() > 10
