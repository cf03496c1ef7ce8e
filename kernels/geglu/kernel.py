"""geglu in Triton: tiles of rows by columns, each value read and written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of one program: 16 bytes of half precision for each thread of a warp, and a few rows of them.
COLUMNS = 256
ROWS = 8
HALF_ROOT = 0.7071067811865476  # sqrt(1/2)


@triton.jit
def _geglu(
    x: tl.tensor,  # [rows, 2 * width], rows x_row apart
    y: tl.tensor,  # [rows, width]
    n_rows: tl.tensor,
    width: tl.tensor,
    x_row: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALF_ROOT: tl.constexpr,
) -> None:
    """Rows along 0, columns along 1."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < n_rows) & (column < width)
    place = x + row * x_row + column
    features = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    gates = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
    opened = 0.5 * gates * (1.0 + tl.erf(gates * HALF_ROOT))
    tl.store(y + row * width + column, (features * opened).to(y.dtype.element_ty), mask=inside)


def geglu_kernel(x: Tensor) -> Tensor:
    """One launch; features whose rows are not evenly spaced, value beside value, are copied first.

    Args:
        x: As in `kernels.geglu.geglu`, which has checked it.
    """
    width = x.shape[-1] // 2
    rows = x.reshape(-1, 2 * width)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(len(rows), ROWS), triton.cdiv(width, COLUMNS))
    launch: Any = _geglu[grid]
    with torch.cuda.device(x.device) if x.is_cuda else torch.no_grad():
        launch(
            rows,
            y,
            len(rows),
            width,
            rows.stride(0),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            HALF_ROOT=HALF_ROOT,
        )
    return y
