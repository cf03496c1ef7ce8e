"""groupnorm_silu on the CPU: the definition, every memory format kept, wrong input refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.groupnorm_silu import groupnorm_silu

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_small_case_is_as_by_hand() -> None:
    """Two groups of two values each, one constant: mean, deviation, factor, addition, SiLU."""
    x = torch.tensor([1.0, 3.0, 5.0, 5.0]).view(1, 2, 1, 2)
    weight, bias = torch.tensor([2.0, 7.0]), torch.tensor([1.0, -1.0])
    plain = groupnorm_silu(x, 2, weight, bias, 3.0, silu=False)
    torch.testing.assert_close(plain.flatten(), torch.tensor([0.0, 2.0, -1.0, -1.0]))
    wanted = plain * torch.sigmoid(plain)
    torch.testing.assert_close(groupnorm_silu(x, 2, weight, bias, 3.0), wanted)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("silu", [True, False])
def test_outcome_is_rounded_once_and_keeps_the_memory_format(
    dtype: torch.dtype, memory_format: torch.memory_format, silu: bool
) -> None:
    """Half precision in, half precision out, float32 between; parameters may be wider."""
    x = (draw(1, 3, 12, 5, 7) * 3 + 1).to(dtype).contiguous(memory_format=memory_format)
    weight, bias = draw(2, 12), draw(3, 12)
    y = groupnorm_silu(x, 4, weight, bias, 1e-5, silu=silu)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    groups = x.double().reshape(3, 4, -1)
    mean, variance = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, correction=0)
    wanted = ((groups - mean) / (variance + 1e-5).sqrt()).view(x.shape)
    wanted = wanted * weight.double()[:, None, None] + bias.double()[:, None, None]
    wanted = wanted * wanted.sigmoid() if silu else wanted
    epsilon = torch.finfo(dtype).eps / 2 + 1e-6 * (dtype != torch.float64)
    assert ((y.double() - wanted).abs() <= epsilon * wanted.abs() + 4e-6).all()


def test_a_slice_gives_what_its_copy_gives() -> None:
    """Strides that are of no memory format are read, and the outcome is contiguous."""
    x = draw(1, 2, 8, 9, 14)[:, ::2, 1:8, ::3]
    weight, bias = draw(2, 4), draw(3, 4)
    y = groupnorm_silu(x, 2, weight, bias, 1e-5)
    assert y.is_contiguous()
    torch.testing.assert_close(y, groupnorm_silu(x.contiguous(), 2, weight, bias, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_added_is_not_rounded_before_the_normalisation(dtype: torch.dtype) -> None:
    """The sum is taken in the wider type; what is added may be of another."""
    x, added = draw(1, 2, 8, 5, 7).to(dtype), draw(4, 2, 8)
    weight, bias = draw(2, 8), draw(3, 8)
    y = groupnorm_silu(x, 2, weight, bias, 1e-5, added=added)
    summed = x.double() + added.double()[:, :, None, None]
    exact = groupnorm_silu(summed, 2, weight, bias, 1e-5)
    torch.testing.assert_close(y, exact.to(dtype))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": torch.zeros(2, 6, 4)}, r"pass floating \[N, C, H, W\]"),
        ({"x": torch.zeros(2, 6, 4, 4, dtype=torch.int32)}, "pass floating"),
        ({"groups": 4}, "use a divisor of the 6 channels"),
        ({"groups": 0}, "use a divisor"),
        ({"weight": torch.ones(5)}, r"weight is torch.float32 of shape \(5,\)"),
        ({"bias": torch.ones(6, dtype=torch.int64)}, "bias is torch.int64"),
        ({"bias": torch.ones(6, device="meta")}, "move it"),
        ({"added": torch.ones(6)}, r"added is .* pass floating \(2, 6\)"),
        ({"added": torch.ones(2, 6, device="meta")}, "move it"),
        ({"eps": -1.0}, "eps is -1.0; use at least 0"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes: dict[str, Any], says: str) -> None:
    """Each fault is named with the value and what to pass."""
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 6, 4, 4),
        "groups": 3,
        "weight": torch.ones(6),
        "bias": torch.zeros(6),
        "eps": 1e-5,
    }
    with pytest.raises(ValueError, match=says):
        groupnorm_silu(**{**arguments, **changes})


@pytest.mark.parametrize("side", [8, 32, 40])
def test_bits_depend_neither_on_neighbours_nor_on_threads(side: int) -> None:
    """Channels-last, whose pixels torch shares among threads where there are many of them.

    Threads are powers of two: others cut SiLU at places that are no multiple of 32.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, side, side, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 64, generator=generator)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for samples in (x, x[:2], x[:1]):
                y = groupnorm_silu(samples, 32, weight, bias, 1e-5)
                assert y.is_contiguous(memory_format=torch.channels_last)
                found.append(y[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)
