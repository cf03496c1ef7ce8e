"""Seams: known pixels stay, the rim is met, and the error is continued by a spline in tension."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realfill.complete.seam import TENSION, Continuation, seamless


def hole(size_px: int, low: int, high: int) -> torch.Tensor:
    """A square hole. [size_px, size_px]"""
    mask = torch.zeros(size_px, size_px)
    mask[low:high, low:high] = 1
    return mask


def laplacian(height: int, width: int) -> torch.Tensor:
    """Of a grid, cell by cell: degree on the diagonal, -1 between neighbours. [cells, cells]"""
    rows, columns = torch.arange(height * width) // width, torch.arange(height * width) % width
    apart = (rows[:, None] - rows).abs() + (columns[:, None] - columns).abs()
    linked = (apart == 1).double()
    return torch.diag(linked.sum(1)) - linked


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    sides=st.tuples(st.integers(1, 14), st.integers(2, 14)),
    share=st.sampled_from((0.02, 0.5, 0.9)),
)
def test_the_continuation_solves_the_splines_equation(
    seed: int, sides: tuple[int, int], share: float
) -> None:
    """As the dense equations of the whole grid say, whatever the shape of what is unknown."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(2, 3, *sides, generator=generator, dtype=torch.float64)
    known = torch.rand(sides, generator=generator) < share
    known[0, 0] = True
    solved = Continuation(known).of(values)
    assert torch.equal(solved[..., known], values[..., known])
    grid = laplacian(*sides)
    equations = grid @ (grid + TENSION * torch.eye(len(grid)))
    unknown, flat = ~known.flatten(), values.flatten(2)
    given = -(equations[unknown][:, ~unknown] @ flat[..., ~unknown].flatten(0, 1).T)
    expected = torch.linalg.solve(equations[unknown][:, unknown], given)
    torch.testing.assert_close(solved.flatten(0, 1)[:, ~known], expected.T, rtol=0, atol=1e-7)


def test_slopes_are_carried_on_into_the_hole() -> None:
    """Between two rising sides a membrane would be flat; the spline goes on rising at first."""
    line = 0.01 * torch.arange(24.0)
    tent = torch.minimum(line, line.flip(0)).expand(1, 1, 24, -1)
    known = torch.ones(24, 24, dtype=torch.bool)
    known[:, 8:16] = False
    solved = Continuation(known).of(tent)
    rim = float(tent[0, 0, 0, 7])
    assert float(solved[..., 8:16].min()) > rim + 0.002
    assert float(solved[..., 8:16].max()) < float(tent.max())


def test_whoever_is_beside_a_sample_its_seam_is_the_same() -> None:
    """To the bit, so that a seed gives one picture in every batch."""
    generator = torch.Generator().manual_seed(3)
    samples = torch.rand(5, 3, 64, 64, generator=generator)
    target = torch.rand(3, 64, 64, generator=generator)
    mask = hole(64, 20, 50)
    together = seamless(samples, target, mask)
    for k in range(5):
        assert torch.equal(seamless(samples[k : k + 1], target, mask)[0], together[k])


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


@pytest.mark.gpu
def test_a_seam_is_closed_where_the_samples_are() -> None:
    """On a GPU as on a CPU, but for roundings; the surface alone goes to the CPU and back."""
    generator = torch.Generator().manual_seed(5)
    samples = torch.rand(4, 3, 300, 300, generator=generator)
    target, mask = torch.rand(3, 300, 300, generator=generator), hole(300, 90, 210)
    made = seamless(samples.cuda(), target, mask)
    assert made.is_cuda
    torch.testing.assert_close(made.cpu(), seamless(samples, target, mask), rtol=0, atol=1e-5)
