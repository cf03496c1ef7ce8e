"""add_layernorm on the CPU: the definition, both outcomes rounded, wrong input refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.add_layernorm import add_layernorm

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_small_case_is_as_by_hand() -> None:
    """Sum, mean, deviation, factor, addition."""
    residual, addend = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]])
    summed, normed = add_layernorm(
        residual, addend, torch.tensor([2.0, 3.0]), torch.tensor([1.0, -1.0]), 3.0
    )
    torch.testing.assert_close(summed, torch.tensor([[1.0, 3.0]]))
    torch.testing.assert_close(normed, torch.tensor([[0.0, 0.5]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sum_is_rounded_and_its_norm_is_rounded_once(dtype: torch.dtype) -> None:
    """What is normalised is the sum as it is handed on."""
    residual, addend = draw(1, 2, 5, 14).to(dtype), draw(2, 2, 5, 14).to(dtype)
    weight, bias = draw(3, 14).to(dtype), draw(4, 14).to(dtype)
    summed, normed = add_layernorm(residual, addend, weight, bias, 1e-5)
    assert torch.equal(summed, residual + addend)
    assert normed.dtype == dtype
    exact = F.layer_norm(summed.double(), (14,), weight.double(), bias.double(), 1e-5)
    epsilon = torch.finfo(dtype).eps / 2 + 1e-6 * (dtype != torch.float64)
    assert ((normed.double() - exact).abs() <= epsilon * exact.abs() + 4e-6).all()


@pytest.mark.parametrize("affine", ["both", "weight", "none"])
def test_nothing_added_is_a_layer_norm_of_the_residual(affine: str) -> None:
    """Which is handed on as it is; weight and bias may be left out."""
    residual = draw(1, 3, 7)
    weight = None if affine == "none" else draw(2, 7)
    bias = draw(3, 7) if affine == "both" else None
    summed, normed = add_layernorm(residual, None, weight, bias, 1e-5)
    assert summed is residual
    torch.testing.assert_close(normed, F.layer_norm(residual, (7,), weight, bias, 1e-5))


def test_slices_give_what_their_copies_give() -> None:
    """Rows and values may lie apart; both outcomes are contiguous."""
    residual, addend = draw(1, 4, 6, 30)[::2, 1:, ::3], draw(2, 2, 10, 5).transpose(1, 2)
    outcomes = add_layernorm(residual, addend, None, None, 1e-5)
    copies = add_layernorm(residual.contiguous(), addend.contiguous(), None, None, 1e-5)
    for outcome, copy in zip(outcomes, copies, strict=True):
        assert outcome.is_contiguous()
        torch.testing.assert_close(outcome, copy)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"residual": torch.tensor(1.0)}, r"pass floating \[\.\.\., C\]"),
        ({"residual": torch.zeros(2, 6, dtype=torch.int32)}, "pass floating"),
        ({"addend": torch.zeros(6)}, r"pass torch.float32 of shape \(2, 6\)"),
        ({"addend": torch.zeros(2, 6, dtype=torch.half)}, "addend is torch.float16"),
        ({"addend": torch.zeros(2, 6, device="meta")}, "move it"),
        ({"weight": torch.ones(5)}, r"weight is torch.float32 of shape \(5,\)"),
        ({"bias": torch.ones(6, dtype=torch.int64)}, "bias is torch.int64"),
        ({"bias": torch.ones(6, device="meta")}, "move it"),
        ({"eps": -1.0}, "eps is -1.0; use at least 0"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes: dict[str, Any], says: str) -> None:
    """Each fault is named with the value and what to pass."""
    arguments: dict[str, Any] = {
        "residual": torch.zeros(2, 6),
        "addend": torch.zeros(2, 6),
        "weight": torch.ones(6),
        "bias": torch.zeros(6),
        "eps": 1e-5,
    }
    with pytest.raises(ValueError, match=says):
        add_layernorm(**{**arguments, **changes})
