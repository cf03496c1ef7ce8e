"""match_count in Triton: two launches sum rows and columns, a third finds the best of each."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 64
BLOCK_COLUMNS = 64
BLOCK_CHANNELS = 32


@triton.jit
def _logits(
    cells0: tl.tensor,  # First element of the pair's cells 0, [L, C]
    cells1: tl.tensor,  # First element of the pair's cells 1, [S, C]
    row: tl.tensor,
    column: tl.tensor,
    n_rows: tl.tensor,
    n_columns: tl.tensor,
    n_channels: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> tl.tensor:
    """One tile of scaled products, minus infinity beyond the last column. [ROWS, COLUMNS]"""
    products = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for begin in range(0, n_channels, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)
        a = tl.load(
            cells0 + row[:, None] * n_channels + channel[None, :],
            mask=(row[:, None] < n_rows) & (channel[None, :] < n_channels),
            other=0.0,
        )
        b = tl.load(
            cells1 + column[None, :] * n_channels + channel[:, None],
            mask=(column[None, :] < n_columns) & (channel[:, None] < n_channels),
            other=0.0,
        )
        products += tl.dot(a, b, input_precision="ieee")
    return tl.where(column[None, :] < n_columns, scale * products, float("-inf"))


@triton.jit
def _log_sums(
    tokens0: tl.tensor,  # [N, L, C]
    tokens1: tl.tensor,  # [N, S, C]
    log_rows: tl.tensor,  # [N, L], written
    n_rows: tl.tensor,
    n_columns: tl.tensor,
    n_channels: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Logarithm of the sum of exponentials of some rows: rows along axis 0, pairs along axis 1."""
    pair = tl.program_id(1).to(tl.int64)
    cells0 = tokens0 + pair * n_rows * n_channels
    cells1 = tokens1 + pair * n_columns * n_channels
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    largest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for begin in range(0, n_columns, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        tile = _logits(
            cells0,
            cells1,
            row,
            column,
            n_rows,
            n_columns,
            n_channels,
            scale,
            ROWS,
            COLUMNS,
            CHANNELS,
        )
        raised = tl.maximum(largest, tl.max(tile, 1))
        powers = tl.exp(tile - raised[:, None])
        total = total * tl.exp(largest - raised) + tl.sum(powers, 1)
        largest = raised
    tl.store(log_rows + pair * n_rows + row, largest + tl.log(total), mask=row < n_rows)


@triton.jit
def _best(
    tokens0: tl.tensor,  # [N, L, C]
    tokens1: tl.tensor,  # [N, S, C]
    log_rows: tl.tensor,  # [N, L]
    log_columns: tl.tensor,  # [N, S]
    row_best: tl.tensor,  # [N, L], written
    partner: tl.tensor,  # [N, L], written
    column_best: tl.tensor,  # [N, S], raised
    n_rows: tl.tensor,
    n_columns: tl.tensor,
    n_channels: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Largest log confidence of some rows, its first column, and what they give to columns."""
    pair = tl.program_id(1).to(tl.int64)
    cells0 = tokens0 + pair * n_rows * n_channels
    cells1 = tokens1 + pair * n_columns * n_channels
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < n_rows
    log_row = tl.load(log_rows + pair * n_rows + row, mask=inside, other=0.0)
    best = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    first = tl.zeros((ROWS,), dtype=tl.int32)
    for begin in range(0, n_columns, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        within = column < n_columns
        log_column = tl.load(log_columns + pair * n_columns + column, mask=within, other=0.0)
        tile = _logits(
            cells0,
            cells1,
            row,
            column,
            n_rows,
            n_columns,
            n_channels,
            2 * scale,
            ROWS,
            COLUMNS,
            CHANNELS,
        )
        tile = tile - log_column[None, :] - log_row[:, None]
        tile = tl.where(inside[:, None], tile, float("-inf"))
        top = tl.max(tile, 1)
        place = tl.argmax(tile, 1, tie_break_left=True)
        # Only a larger value moves the partner: of equal ones the first stays.
        first = tl.where(top > best, begin + place, first)
        best = tl.maximum(best, top)
        # A maximum is the same in every order, so that atomics leave it deterministic.
        tl.atomic_max(
            column_best + pair * n_columns + column, tl.max(tile, 0), mask=within, sem="relaxed"
        )
    tl.store(row_best + pair * n_rows + row, best, mask=inside)
    tl.store(partner + pair * n_rows + row, first.to(tl.int64), mask=inside)


def match_count_kernel(
    tokens0: Tensor, tokens1: Tensor, scale: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Matches as `kernels.match_count.match_count` defines them, summed in float32.

    Args:
        tokens0, tokens1, scale, threshold: As there; checked, the threshold at least 0.
    """
    tokens0, tokens1 = tokens0.contiguous(), tokens1.contiguous()
    count, rows, channels = tokens0.shape
    columns = tokens1.shape[1]
    log_rows = tokens0.new_empty((count, rows), dtype=torch.float32)
    log_columns = tokens0.new_empty((count, columns), dtype=torch.float32)
    best = torch.empty_like(log_rows)
    partner = torch.empty_like(log_rows, dtype=torch.long)
    if count == 0:
        return best, partner
    column_best = torch.full_like(log_columns, -torch.inf)
    blocks = {"ROWS": BLOCK_ROWS, "COLUMNS": BLOCK_COLUMNS, "CHANNELS": BLOCK_CHANNELS}
    along_rows = (triton.cdiv(rows, BLOCK_ROWS), count)
    along_columns = (triton.cdiv(columns, BLOCK_ROWS), count)
    sum_up: Any = _log_sums
    find: Any = _best
    with torch.cuda.device(tokens0.device) if tokens0.is_cuda else torch.no_grad():
        sum_up[along_rows](
            tokens0, tokens1, log_rows, rows, columns, channels, float(scale), **blocks
        )
        sum_up[along_columns](
            tokens1, tokens0, log_columns, columns, rows, channels, float(scale), **blocks
        )
        find[along_rows](
            tokens0,
            tokens1,
            log_rows,
            log_columns,
            best,
            partner,
            column_best,
            rows,
            columns,
            channels,
            float(scale),
            **blocks,
        )
    mutual = column_best.gather(1, partner) == best
    confidence = best.exp()
    return torch.where(mutual & (confidence > threshold), confidence, 0.0), partner
