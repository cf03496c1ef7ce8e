"""add_layernorm in Triton: whole rows, held while their mean and variance are taken."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Values of one program, in whole rows, and those that a warp should hold of a row.
TILE = 4096
WARP_VALUES = 1024
WARPS = 4
MOST_WARPS = 16


@triton.jit
def _add_layernorm(
    residual: tl.tensor,  # [rows, width], rows residual_row apart
    addend: tl.tensor,  # [rows, width] or None, rows addend_row apart
    weight: tl.tensor,  # [width] or None
    bias: tl.tensor,  # [width] or None
    summed: tl.tensor,  # [rows, width] or None
    normed: tl.tensor,  # [rows, width]
    eps: tl.tensor,
    n_rows: tl.tensor,
    width: tl.tensor,
    residual_row: tl.tensor,
    addend_row: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Rows along 0."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < n_rows) & (column < width)
    values = tl.load(residual + row * residual_row + column, mask=inside, other=0.0)
    values = values.to(tl.float32)
    if addend is not None:
        other = tl.load(addend + row * addend_row + column, mask=inside, other=0.0)
        rounded = (values + other.to(tl.float32)).to(summed.dtype.element_ty)
        tl.store(summed + row * width + column, rounded, mask=inside)
        values = rounded.to(tl.float32)
    mean = tl.sum(values, axis=1) / width
    apart = tl.where(inside, values - mean[:, None], 0.0)
    # A mean far from zero is only as exact as its size allows: what it missed is made good.
    missed = tl.sum(apart, axis=1) / width
    apart = tl.where(inside, apart - missed[:, None], 0.0)
    variance = tl.sum(apart * apart, axis=1) / width
    outcome = apart * tl.div_rn(1.0, tl.sqrt_rn(variance + eps))[:, None]
    known = column < width
    if weight is not None:
        outcome *= tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
    if bias is not None:
        outcome += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
    tl.store(normed + row * width + column, outcome.to(normed.dtype.element_ty), mask=inside)


def tiling(width: int) -> dict[str, int]:
    """Rows and columns of a program and its warps, which depend on the width of a row alone."""
    columns = triton.next_power_of_2(width)
    return {
        "ROWS": max(1, TILE // columns),
        "COLUMNS": columns,
        "num_warps": min(MOST_WARPS, max(WARPS, columns // WARP_VALUES)),
    }


def add_layernorm_kernel(
    residual: Tensor,
    addend: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """One launch; rows that are not evenly spaced, value beside value, are copied first.

    Args:
        residual, addend, weight, bias, eps: As in `kernels.add_layernorm.add_layernorm`, which has
            checked them.
    """
    width = residual.shape[-1]
    rows, others = _rows(residual), None if addend is None else _rows(addend)
    summed, normed = residual, torch.empty_like(residual, memory_format=torch.contiguous_format)
    if others is not None:
        summed = torch.empty_like(normed)
    launch: Any = _add_layernorm[(triton.cdiv(len(rows), tiling(width)["ROWS"]),)]
    with torch.cuda.device(residual.device) if residual.is_cuda else torch.no_grad():
        launch(
            rows,
            others,
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            None if others is None else summed,
            normed,
            float(eps),
            len(rows),
            width,
            rows.stride(0),
            0 if others is None else others.stride(0),
            **tiling(width),
        )
    return summed, normed


def _rows(x: Tensor) -> Tensor:
    """x as rows whose values lie side by side. [rows, C]"""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
