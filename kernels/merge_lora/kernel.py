"""merge_lora in Triton: one launch for all modules of an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 64
BLOCK_COLUMNS = 64
# tl.dot takes no fewer than 16 along the summed dimension; smaller ranks are padded with zeros.
SMALLEST_BLOCK_RANK = 16
FIELDS = 9
# Where addresses and rows are multiples of so many bytes, several values are moved at once.
ALIGNMENT = 16

_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@triton.jit
def _merge_lora(
    table: tl.tensor,  # [L, FIELDS] addresses, sizes and strides of each module
    scale: tl.tensor,
    WEIGHT: tl.constexpr,
    FACTOR: tl.constexpr,
    N_FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """One tile of one module: tiles along axis 0, modules along axis 1.

    What is ALIGNED has addresses and sizes that are multiples of 16, and rows without gaps.
    """
    fields = table + tl.program_id(1) * N_FIELDS
    n_rows = tl.load(fields + 4)
    n_columns = tl.load(fields + 5)
    rank = tl.load(fields + 6)
    tiles_across = (n_columns + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0).to(tl.int64)
    # Modules smaller than the largest have fewer tiles than the grid.
    if tile < tiles_across * ((n_rows + ROWS - 1) // ROWS):
        out = tl.load(fields + 0).to(tl.pointer_type(WEIGHT))
        pristine = tl.load(fields + 1).to(tl.pointer_type(WEIGHT))
        lora_A = tl.load(fields + 2).to(tl.pointer_type(FACTOR))
        lora_B = tl.load(fields + 3).to(tl.pointer_type(FACTOR))
        row = (tile // tiles_across) * ROWS + tl.arange(0, ROWS)[:, None]
        column = (tile % tiles_across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        stride_row = tl.load(fields + 7)
        stride_column = tl.load(fields + 8)
        if ALIGNED:
            # The compiler cannot know this of what it finds in a table.
            out, pristine = tl.multiple_of(out, 16), tl.multiple_of(pristine, 16)
            lora_A = tl.multiple_of(lora_A, 16)
            n_columns = tl.multiple_of(n_columns, 16)
            stride_row, stride_column = tl.multiple_of(stride_row, 16), 1
        along = tl.arange(0, RANK)
        a = tl.load(
            lora_A + along[:, None] * n_columns + column,
            mask=(along[:, None] < rank) & (column < n_columns),
            other=0.0,
        )
        b = tl.load(
            lora_B + row * rank + along[None, :],
            mask=(row < n_rows) & (along[None, :] < rank),
            other=0.0,
        )
        product = tl.dot(b.to(tl.float32), a.to(tl.float32), input_precision="ieee")
        inside = (row < n_rows) & (column < n_columns)
        weight = tl.load(pristine + row * n_columns + column, mask=inside, other=0.0)
        fused = weight.to(tl.float32) + scale * product
        tl.store(out + row * stride_row + column * stride_column, fused.to(WEIGHT), mask=inside)


@dataclass(frozen=True)
class PreparedMerge:
    """One launch for all modules, as often as called.

    Attributes:
        held: All tensors that the table names, which itself keeps none of them alive.
        table: See the kernel.
        tiles: Of the largest module.
        settings: Of the launch.
    """

    held: tuple[Sequence[Tensor], ...]
    table: Tensor
    tiles: int
    settings: dict[str, Any]

    def __call__(self, scale: float) -> None:
        """Fuse with this scale."""
        if self.tiles == 0:
            return
        table = self.table
        launch: Any = _merge_lora[(self.tiles, len(table))]
        with torch.cuda.device(table.device) if table.is_cuda else torch.no_grad():
            launch(table, float(scale), **self.settings)


def prepared_kernel(
    outs: Sequence[Tensor],
    pristines: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
) -> PreparedMerge:
    """Look up where everything lies.

    Args:
        outs, pristines, lora_As, lora_Bs: As in `kernels.merge_lora.prepared_merge`, which has
            checked them.
    """
    held = [[t.contiguous() for t in tensors] for tensors in (pristines, lora_As, lora_Bs)]
    rows = [
        (
            out.data_ptr(),
            pristine.data_ptr(),
            lora_A.data_ptr(),
            lora_B.data_ptr(),
            out.shape[0],
            out.shape[1],
            lora_A.shape[0],
            out.stride(0),
            out.stride(1),
        )
        for out, pristine, lora_A, lora_B in zip(outs, *held, strict=True)
    ]
    table = torch.tensor(rows, dtype=torch.int64).to(outs[0].device)
    tiles = max(
        triton.cdiv(out.shape[0], BLOCK_ROWS) * triton.cdiv(out.shape[1], BLOCK_COLUMNS)
        for out in outs
    )
    rank = max(lora_A.shape[0] for lora_A in lora_As)
    settings = {
        "WEIGHT": _TYPES[outs[0].dtype],
        "FACTOR": _TYPES[lora_As[0].dtype],
        "N_FIELDS": FIELDS,
        "ROWS": BLOCK_ROWS,
        "COLUMNS": BLOCK_COLUMNS,
        "RANK": max(SMALLEST_BLOCK_RANK, triton.next_power_of_2(rank)),
        "ALIGNED": all(_is_aligned(row) for row in rows),
        # Round after the product and after the sum, as the definition does.
        "enable_fp_fusion": False,
    }

    return PreparedMerge((tuple(outs), *held), table, tiles, settings)


def _is_aligned(row: tuple[int, ...]) -> bool:
    """Whether one module's line of the table is as ALIGNED says."""
    *addresses, _, columns, _, stride_row, stride_column = row
    numbers = (*addresses, columns, stride_row)
    return stride_column == 1 and all(number % ALIGNMENT == 0 for number in numbers)
