"""geglu on the CPU: the definition, rounded once, any strides, wrong input refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.geglu import geglu

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


def draw(*shape: int) -> Tensor:
    """Normal numbers around zero, large enough that gates close."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3


def test_small_case_is_as_by_hand() -> None:
    """Features come first, gates behind them; the GELU is the exact one."""
    x = torch.tensor([[2.0, -3.0, 5.0, 1.0, -1.0, 0.0]])
    by_hand = [2 * 0.841345, -3 * -0.158655, 0.0]
    torch.testing.assert_close(geglu(x), torch.tensor([by_hand]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_outcome_is_rounded_once(dtype: torch.dtype) -> None:
    """Half precision in, half precision out, float32 between."""
    x = draw(3, 5, 14).to(dtype)
    y = geglu(x)
    assert (y.dtype, y.shape) == (dtype, (3, 5, 7))
    features, gates = x.double().chunk(2, dim=-1)
    exact = features * gates * (1 + torch.erf(gates / math.sqrt(2))) / 2
    epsilon = torch.finfo(dtype).eps / 2 + 1e-6 * (dtype != torch.float64)
    assert ((y.double() - exact).abs() <= epsilon * exact.abs() + 4e-6).all()


def test_a_slice_gives_what_its_copy_gives() -> None:
    """Rows and values may lie apart; the outcome is contiguous."""
    x = draw(4, 6, 30)[::2, 1:, ::3]
    y = geglu(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y, geglu(x.contiguous()))


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.int32), torch.tensor(1.0)]
)
def test_what_has_no_halves_is_refused(x: Tensor) -> None:
    """An odd last dimension, integers, a single number."""
    with pytest.raises(ValueError, match=r"pass floating \[\.\.\., 2 H\]"):
        geglu(x)
