"""Contact sheets: size, place and captions of the pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from realfill.sheet import GAP_PX, MARGIN_PX, PAPER, contact_sheet, with_hole


def test_a_sheet_is_as_wide_as_its_longest_row() -> None:
    """Columns are counted over all rows, and every row adds to the height."""
    picture = torch.rand(3, 16, 16)
    short = contact_sheet([("", [("a", picture)])], tile_px=64)
    long = contact_sheet([("", [("a", picture)]), ("", [("b", picture)] * 3)], tile_px=64)
    assert short.width == 2 * MARGIN_PX + 64
    assert long.width == 2 * MARGIN_PX + 3 * 64 + 2 * GAP_PX
    assert long.height > short.height + 64


def test_a_picture_stands_in_its_tile_in_its_own_colours() -> None:
    """A red picture without captions fills the tile at the margin, and nothing beyond."""
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 8, 8)
    page = np.asarray(contact_sheet([("", [("", red)])], tile_px=32))
    inside = page[MARGIN_PX : MARGIN_PX + 32, MARGIN_PX : MARGIN_PX + 32]
    assert (inside == (255, 0, 0)).all()
    assert (page[:MARGIN_PX] == PAPER).all()


def test_a_wide_picture_keeps_its_aspect_ratio() -> None:
    """A picture twice as wide as high stands at the foot of its row."""
    red = torch.tensor([1.0, 0, 0])[:, None, None]
    tiles = [("", red.expand(3, 8, 16)), ("", red.expand(3, 8, 8))]
    page = np.asarray(contact_sheet([("", tiles)], tile_px=32))
    column = page[MARGIN_PX : MARGIN_PX + 32, MARGIN_PX + 16]
    assert (column[:16] == PAPER).all()
    assert (column[16:] == (255, 0, 0)).all()


def test_a_row_of_low_pictures_takes_no_more_height_than_they_do() -> None:
    """No blank band stands above a row whose pictures are all wide."""
    page = contact_sheet([("", [("", torch.rand(3, 8, 16))])], tile_px=32)
    assert page.height == 2 * MARGIN_PX + 16


def test_captions_are_written_and_kept_within_their_tile() -> None:
    """A caption far too long leaves the margin right of the only tile blank."""
    grey = torch.full((8, 8), 0.5)
    page = np.asarray(contact_sheet([("scene", [("word " * 50 + "\n21.3 dB", grey)])], tile_px=96))
    captions = page[-MARGIN_PX - 30 : -MARGIN_PX]
    assert (captions < 100).any()
    assert (captions[:, -MARGIN_PX:] == PAPER).all()


def test_values_that_are_no_number_are_drawn_as_black() -> None:
    """A sample that diverged still makes a sheet."""
    page = contact_sheet([("", [("", torch.full((3, 8, 8), float("nan")))])], tile_px=16)
    assert page.getpixel((MARGIN_PX + 8, MARGIN_PX + 8)) == (0, 0, 0)


def test_a_sheet_without_pictures_is_refused() -> None:
    """Nothing to look at is a mistake of the caller, as is a picture of another shape."""
    with pytest.raises(ValueError, match="no picture"):
        contact_sheet([("empty", [])])
    with pytest.raises(ValueError, match=r"\[4, 8, 8\]"):
        contact_sheet([("", [("", torch.rand(4, 8, 8))])])


def test_the_hatched_hole_hides_the_target_and_leaves_the_rest() -> None:
    """Old content of the hole is invisible; known pixels are the target's."""
    target, mask = torch.rand(3, 32, 32) * 0.5, torch.zeros(32, 32)
    mask[8:24, 8:24] = 1
    shown = with_hole(target, mask)
    assert torch.equal(shown[:, mask == 0], target[:, mask == 0])
    assert bool((shown[:, mask == 1] > 0.8).all())
