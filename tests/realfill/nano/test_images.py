"""What nano learns from."""

from __future__ import annotations

import numpy as np
import pytest

from realfill.nano.images import draw
from realfill.nano.photographs import HELD_OUT, PHOTOGRAPHS, photograph, to_bytes, view


def test_drawing_follows_from_its_generator() -> None:
    """Equal seeds draw equal pictures, others differ."""
    first, again, other = (draw(np.random.default_rng(seed), 64) for seed in (3, 3, 4))
    assert first[0] == again[0]
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])


@pytest.mark.parametrize("seed", range(8))
def test_drawing_looks_like_a_photograph(seed: int) -> None:
    """Full size, neither flat nor noise: neighbours resemble each other."""
    _, picture = draw(np.random.default_rng(seed), 96)
    assert picture.shape == (96, 96, 3)
    assert picture.dtype == np.uint8
    grey = picture.mean(2)
    assert grey.std() > 3
    assert np.corrcoef(grey[:, 1:].ravel(), grey[:, :-1].ravel())[0, 1] > 0.6


def test_all_families_are_drawn() -> None:
    """Leaves, facades, landscapes and workshops all occur."""
    captions = {draw(np.random.default_rng(seed), 32)[0] for seed in range(40)}
    kinds = ("leaves", "facade", "landscape", "workshop")
    assert captions == {f"a photo of {'a ' if kind != 'leaves' else ''}{kind}" for kind in kinds}


def test_demo_photographs_are_held_out() -> None:
    """The motorcycle and the coffee are never learned from."""
    assert not set(PHOTOGRAPHS) & set(HELD_OUT)
    assert {"motorcycle_left.png", "motorcycle_right.png", "coffee.png"} == set(HELD_OUT)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_view_stays_inside_the_photograph(name: str) -> None:
    """A crop of a bright frame never shows the black beyond it."""
    bright = np.full_like(photograph(name), 200)
    for seed in range(5):
        crop = view(np.random.default_rng(seed), bright, 40, zoom=0.4)
        assert crop.shape == (40, 40, 3)
        assert crop.min() > 40


def test_bytes_are_rounded_and_clipped() -> None:
    """0.5 becomes 128, what is out of range its nearest bound."""
    assert to_bytes(np.array([-1.0, 0.5, 2.0])).tolist() == [0, 128, 255]
