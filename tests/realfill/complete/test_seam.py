"""Seams: known pixels stay, the rim is met, and what lies between is the smoothest surface."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realfill.complete.seam import membrane, seamless


def hole(size_px: int, low: int, high: int) -> torch.Tensor:
    """A square hole. [size_px, size_px]"""
    mask = torch.zeros(size_px, size_px)
    mask[low:high, low:high] = 1
    return mask


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 1000), sides=st.tuples(st.integers(6, 20), st.integers(6, 20)), n=st.just(2)
)
def test_the_membrane_is_harmonic(seed: int, sides: tuple[int, int], n: int) -> None:
    """Every unknown value is the mean of its neighbours, every known one is kept."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(n, 3, *sides, generator=generator, dtype=torch.float64)
    known = torch.rand(sides, generator=generator) < 0.5
    known[0, 0] = True
    solved = membrane(values, known)
    assert torch.equal(solved[..., known], values[..., known])
    padded = torch.nn.functional.pad(solved, (1, 1, 1, 1), value=torch.nan)
    around = torch.stack(
        [
            padded[..., :-2, 1:-1],
            padded[..., 2:, 1:-1],
            padded[..., 1:-1, :-2],
            padded[..., 1:-1, 2:],
        ]
    ).nanmean(0)
    torch.testing.assert_close(solved[..., ~known], around[..., ~known], rtol=0, atol=1e-9)


def test_a_colour_cast_is_removed_whole() -> None:
    """A sample that is the truth but for a cast becomes the truth."""
    truth = 0.3 + 0.4 * torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(0))
    cast = torch.tensor([0.1, -0.2, 0.05])[:, None, None]
    made = seamless((truth + cast)[None], truth, hole(48, 12, 40))
    torch.testing.assert_close(made[0], truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size_px", [96, 300])
def test_known_pixels_are_the_targets_and_the_rim_is_met(size_px: int) -> None:
    """Also where the surface is solved on coarser cells, whose last ones are cut off."""
    rows = torch.linspace(0, 1, size_px)[None, :, None].expand(3, -1, size_px)
    target, samples = 0.2 + 0.6 * rows, torch.full((2, 3, size_px, size_px), 0.5)
    mask = hole(size_px, size_px // 3, size_px // 2)
    made = seamless(samples, target, mask)
    assert torch.equal(made[..., mask == 0], target[..., mask == 0].expand(2, -1, -1))
    assert float((made - target).abs().max()) < 0.02


def test_an_outpainted_side_is_continued_freely() -> None:
    """At the image's border nothing is prescribed: a constant error stays constant up to it."""
    target, mask = torch.full((3, 32, 32), 0.6), torch.zeros(32, 32)
    mask[:, 20:] = 1
    made = seamless(torch.full((1, 3, 32, 32), 0.4), target, mask)
    torch.testing.assert_close(made[0], target, rtol=0, atol=1e-6)


def test_without_known_pixels_samples_come_back() -> None:
    """There is no rim to meet."""
    samples = torch.rand(2, 3, 16, 16)
    assert torch.equal(seamless(samples, torch.zeros(3, 16, 16), torch.ones(16, 16)), samples)
