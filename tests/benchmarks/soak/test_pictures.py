"""Repeated pictures: equal, off by one level, or different."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.soak.pictures import Gallery, Kind, largest_difference
from tests.fakes import encoded

PLAIN = np.full((4, 6, 3), 100, np.uint8)
KIND = Kind("tower", "ab", 2, 0)


def shifted(levels: int) -> bytes:
    pixels = PLAIN.copy()
    pixels[2, 3, 1] = 100 + levels
    return encoded(pixels)


def test_one_level_is_counted_and_two_are_reported() -> None:
    """The first picture of a kind is what all later ones are held against."""
    gallery = Gallery()
    for file in (encoded(PLAIN), encoded(PLAIN), shifted(1), shifted(2), shifted(-7)):
        gallery.add(KIND, file)
    assert len(gallery) == 1
    assert (gallery.repeated, gallery.near) == (4, 1)
    assert gallery.far == [(KIND, 2), (KIND, 7)]


def test_another_file_of_the_same_pixels_is_equal() -> None:
    """Bytes may differ where levels do not."""
    gallery = Gallery()
    gallery.add(KIND, encoded(PLAIN))
    gallery.add(KIND, encoded(PLAIN, "BMP"))
    assert (gallery.repeated, gallery.near, gallery.far) == (1, 0, [])


def test_pictures_of_two_sizes_are_as_different_as_can_be() -> None:
    """No pixel of one belongs to a pixel of the other."""
    assert largest_difference(encoded(PLAIN), encoded(PLAIN[:3])) == 255


def test_a_file_that_is_no_picture_is_refused() -> None:
    """An answer may be cut off."""
    with pytest.raises(ValueError, match="3 bytes are no picture"):
        Gallery().add(KIND, b"png")


def test_versions_that_look_alike_are_told() -> None:
    """Only among the same scene, steps and seed."""
    gallery = Gallery()
    other = Kind("tower", "cd", 2, 0)
    gallery.add(KIND, encoded(PLAIN))
    gallery.add(Kind("tower", "cd", 2, 1), encoded(PLAIN))
    gallery.add(Kind("bridge", "ef", 2, 0), encoded(PLAIN))
    assert gallery.alike() == []
    gallery.add(other, shifted(1))
    assert gallery.alike() == [(KIND, other)]
