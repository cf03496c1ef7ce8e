"""merge_lora on the CPU: the exact sum, rounded once, and wrong input refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.merge_lora import merge_lora, merge_lora_

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_sum_of_small_integers_is_exact() -> None:
    """A case small enough to follow by hand."""
    pristine = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    lora_A, lora_B = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[2.0], [3.0]])
    out = torch.empty(2, 3)
    assert merge_lora(out, pristine, lora_A, lora_B, 0.5) is out
    assert out.tolist() == [[2.0, 2.0, 2.0], [5.5, 5.0, 4.5]]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 20),
    dtype=st.sampled_from(TYPES),
    factor=st.sampled_from(TYPES),
    scale=st.sampled_from([0.0, 1.0, 2.0, -0.3]),
)
def test_merge_is_the_sum_rounded_once(
    rows: int, columns: int, rank: int, dtype: torch.dtype, factor: torch.dtype, scale: float
) -> None:
    """Whatever the sizes and types, the error is that of one rounding."""
    pristine = draw(1, rows, columns).to(dtype)
    lora_A, lora_B = draw(2, rank, columns).to(factor), draw(3, rows, rank).to(factor)
    untouched = pristine.clone()
    out = merge_lora(torch.full_like(pristine, torch.nan), pristine, lora_A, lora_B, scale)
    exact = pristine.double() + scale * lora_B.double() @ lora_A.double()
    inner = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    magnitude = pristine.double().abs() + abs(scale) * lora_B.double().abs() @ lora_A.double().abs()
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + (rank + 2) * inner * magnitude + 1e-7
    assert ((out.double() - exact).abs() <= bound).all()
    assert torch.equal(pristine, untouched)


def test_merge_into_a_view_writes_only_there() -> None:
    """A weight that is a view of something larger leaves the rest alone."""
    field = torch.full((10, 12), 7.0)
    out = field[1:9:2, 2:12:3].T
    pristine, lora_A, lora_B = draw(1, 4, 4), draw(2, 2, 4), draw(3, 4, 2)
    merge_lora(out, pristine, lora_A, lora_B, 1.0)
    torch.testing.assert_close(out, pristine + lora_B @ lora_A)
    field[1:9:2, 2:12:3] = 7.0
    assert torch.equal(field, torch.full((10, 12), 7.0))


def test_group_equals_each_module_alone() -> None:
    """Modules of different sizes and ranks do not mix."""
    sizes = [(3, 5, 1), (8, 2, 4), (1, 1, 9)]
    pristines = [draw(k, rows, columns) for k, (rows, columns, _) in enumerate(sizes)]
    lora_As = [draw(9 + k, rank, columns) for k, (_, columns, rank) in enumerate(sizes)]
    lora_Bs = [draw(99 + k, rows, rank) for k, (rows, _, rank) in enumerate(sizes)]
    outs = [torch.empty_like(pristine) for pristine in pristines]
    merge_lora_(outs, pristines, lora_As, lora_Bs, 2.0)
    for out, *module in zip(outs, pristines, lora_As, lora_Bs, strict=True):
        assert torch.equal(out, merge_lora(torch.empty_like(out), *module, 2.0))
    merge_lora_([], [], [], [], 1.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora_A": torch.zeros(2, 7)}, r"lora_A \(2, 7\)"),
        ({"lora_B": torch.zeros(4, 3)}, r"lora_B \(4, 3\)"),
        ({"pristine": torch.zeros(5, 4)}, r"pristine \(5, 4\)"),
        ({"pristine": torch.zeros(4, 6, dtype=torch.float16)}, "use one type"),
        ({"lora_B": torch.zeros(4, 2, dtype=torch.float16)}, "use one type"),
        ({"lora_A": torch.zeros(2, 6, dtype=torch.int32)}, "pass a floating matrix"),
        ({"out": torch.zeros(24)}, "pass a floating matrix"),
        ({"lora_A": torch.zeros(0, 6), "lora_B": torch.zeros(4, 0)}, "use 1 to 128"),
        ({"lora_A": torch.zeros(129, 6), "lora_B": torch.zeros(4, 129)}, "use 1 to 128"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"lora_A": torch.zeros(2, 6, device="meta")}, "move them to one device"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes: dict[str, Any], says: str) -> None:
    """Each fault is named with the module, the value and what to pass."""
    arguments: dict[str, Any] = {
        "out": torch.zeros(4, 6),
        "pristine": torch.ones(4, 6),
        "lora_A": torch.ones(2, 6),
        "lora_B": torch.ones(4, 2),
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=says):
        merge_lora(**{**arguments, **changes})


def test_merging_onto_the_pristine_copy_is_refused() -> None:
    """Without a copy the base could not be had back."""
    weight = torch.ones(4, 6)
    with pytest.raises(ValueError, match="same memory"):
        merge_lora(weight, weight, torch.ones(2, 6), torch.ones(4, 2), 1.0)
    with pytest.raises(ValueError, match="one of each per module"):
        merge_lora_([weight], [], [], [], 1.0)
