"""add_residual on the CPU: the definition, rounded once, formats kept, wrong input refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.add_residual import add_residual

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

FORMATS = [torch.contiguous_format, torch.channels_last]


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_small_case_is_as_by_hand() -> None:
    """Each channel has a bias of its own, the same for all samples and pixels."""
    residual = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 2, 1, 2)
    features = torch.tensor([10.0, 20.0, 30.0, 40.0]).view(1, 2, 1, 2)
    y = add_residual(residual, features, torch.tensor([100.0, 200.0]))
    assert torch.equal(y.flatten(), torch.tensor([111.0, 122.0, 233.0, 244.0]))


@pytest.mark.parametrize("other", FORMATS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_outcome_is_rounded_once_and_keeps_the_memory_format(
    dtype: torch.dtype, memory_format: torch.memory_format, other: torch.memory_format
) -> None:
    """That of the features, whatever the residual's; the bias may be of a wider type."""
    residual = draw(1, 3, 12, 5, 7).to(dtype).contiguous(memory_format=other)
    features = draw(2, 3, 12, 5, 7).to(dtype).contiguous(memory_format=memory_format)
    bias = draw(3, 12)
    y = add_residual(residual, features, bias)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    exact = residual.double() + features.double() + bias.double()[:, None, None]
    epsilon = torch.finfo(dtype).eps / 2
    inner = 1e-6 * (dtype != torch.float64) + 1e-15
    assert ((y.double() - exact).abs() <= epsilon * exact.abs() + inner).all()


def test_slices_give_what_their_copies_give() -> None:
    """Strides that are of no memory format are read, and the outcome is contiguous."""
    residual, features = draw(1, 2, 4, 5, 7).transpose(2, 3), draw(2, 2, 8, 14, 6)[:, ::2, ::2, 1:]
    bias = draw(3, 8)[::2]
    y = add_residual(residual, features, bias)
    assert y.is_contiguous()
    assert torch.equal(y, add_residual(residual.contiguous(), features.contiguous(), bias))
    assert add_residual(residual, residual, bias).is_contiguous()


def test_no_samples_give_none() -> None:
    """An empty batch is no fault."""
    y = add_residual(torch.zeros(0, 6, 4, 4), torch.zeros(0, 6, 4, 4), torch.zeros(6))
    assert y.shape == (0, 6, 4, 4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"features": torch.zeros(2, 6, 4)}, r"pass floating \[N, C, H, W\]"),
        ({"features": torch.zeros(2, 6, 4, 4, dtype=torch.int32)}, "features are torch.int32"),
        ({"residual": torch.zeros(6)}, r"pass torch.float32 of shape \(2, 6, 4, 4\)"),
        ({"residual": torch.zeros(2, 6, 4, 4, dtype=torch.half)}, "residual is torch.float16"),
        ({"residual": torch.zeros(2, 6, 4, 4, device="meta")}, "residual is on meta.* move it"),
        ({"bias": torch.zeros(5)}, r"bias is torch.float32 of shape \(5,\); pass floating \(6,\)"),
        ({"bias": torch.zeros(6, dtype=torch.int64)}, "bias is torch.int64"),
        ({"bias": torch.zeros(6, device="meta")}, "bias is on meta.* move it"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes: dict[str, Any], says: str) -> None:
    """Each fault is named with the value and what to pass."""
    arguments: dict[str, Any] = {
        "residual": torch.zeros(2, 6, 4, 4),
        "features": torch.zeros(2, 6, 4, 4),
        "bias": torch.zeros(6),
    }
    with pytest.raises(ValueError, match=says):
        add_residual(**{**arguments, **changes})
