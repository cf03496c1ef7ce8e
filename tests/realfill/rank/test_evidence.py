"""Correspondences are drawn where they are."""

from __future__ import annotations

import torch

from realfill.rank.evidence import draw_correspondences
from realfill.rank.matching import Correspondences


def _correspondences(*rows: tuple[float, float, float, float, float]) -> Correspondences:
    table = torch.tensor(rows).view(-1, 5)
    pair = torch.zeros(len(table), dtype=torch.long)
    return Correspondences(table[:, :2], table[:, 2:4], table[:, 4], pair)


def _saturation(picture: torch.Tensor) -> torch.Tensor:
    return picture.amax(0) - picture.amin(0)


def test_both_images_stand_side_by_side_at_one_height() -> None:
    """Small images are enlarged to 256 px, and the reference keeps its shape."""
    picture = draw_correspondences(
        torch.full((3, 64, 64), 0.5),
        torch.full((3, 32, 64), 0.25),
        _correspondences(),
        torch.zeros(64, 64),
    )
    assert picture.shape == (3, 256, 256 + 8 + 512)
    torch.testing.assert_close(picture[:, 128, 128], torch.full((3,), 0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(picture[:, 128, 500], torch.full((3,), 0.25), atol=0.01, rtol=0)


def test_a_line_joins_the_two_points() -> None:
    """On grey images only the line and its ends have colour, and they are where the points are."""
    picture = draw_correspondences(
        torch.full((3, 64, 64), 0.5),
        torch.full((3, 64, 64), 0.5),
        _correspondences((16, 32, 48, 32, 0.9)),
        torch.zeros(64, 64),
    )
    coloured = _saturation(picture) > 0.2
    assert coloured[128, 64]
    assert coloured[128, 260]
    assert coloured[128, 256 + 8 + 192]
    assert not coloured[128, 30]
    assert not coloured[60].any()


def test_the_rim_of_the_hole_is_white() -> None:
    """The hole is outlined, and its inside is left as it is."""
    mask = torch.zeros(64, 64)
    mask[16:48, 16:48] = 1
    picture = draw_correspondences(
        torch.full((3, 64, 64), 0.2), torch.full((3, 64, 64), 0.2), _correspondences(), mask
    )
    assert picture[:, 64, 128].min() > 0.9
    assert picture[:, 128, 64].min() > 0.9
    assert picture[:, 128, 128].max() < 0.3


def test_only_the_most_confident_lines_are_drawn() -> None:
    """With room for one line, the surer of two is drawn."""
    picture = draw_correspondences(
        torch.full((3, 64, 64), 0.5),
        torch.full((3, 64, 64), 0.5),
        _correspondences((16, 16, 48, 16, 0.3), (16, 48, 48, 48, 0.8)),
        torch.zeros(64, 64),
        most=1,
    )
    coloured = _saturation(picture) > 0.2
    assert coloured[192].any()
    assert not coloured[64].any()


def test_grey_images_can_be_drawn() -> None:
    """One channel is shown as grey."""
    picture = draw_correspondences(
        torch.zeros(1, 64, 64), torch.ones(1, 300, 300), _correspondences(), torch.zeros(64, 64)
    )
    assert picture.shape == (3, 256, 256 + 8 + 256)
