"""match_count in torch over tiles of rows: the definition's arithmetic, a tile at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Two tiles are alive at a time, and both should stay in a core's second-level cache.
TILE_BYTES = 2**20
# A matrix up to this size is kept from the first pass to the second, not computed again.
KEPT_BYTES = 2**22
# Rows and columns whose largest logits lie within this span are summed with one exponential for
# both: the smallest such sum, exp(-60), is far above what float32 loses.
SPAN = 60.0


def match_count_tiled(
    tokens0: Tensor, tokens1: Tensor, scale: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Matches as `kernels.match_count.match_count` defines them, in two passes over tiles.

    The first pass sums rows and columns, the second finds the best of each. The second computes
    every confidence once and compares it along its row and its column, so that equal means equal.

    Args:
        tokens0, tokens1, scale, threshold: As there; the threshold is at least 0.
    """
    inner = torch.promote_types(tokens0.dtype, torch.float32)
    count, rows, columns = len(tokens0), tokens0.shape[1], tokens1.shape[1]
    height = min(rows, max(1, TILE_BYTES // (columns * inner.itemsize)))
    keep = rows * columns * inner.itemsize <= KEPT_BYTES
    logits = tokens0.new_empty((rows if keep else height, columns), dtype=inner)
    spare = logits.new_empty((height, columns))
    parts = [slice(begin, min(begin + height, rows)) for begin in range(0, rows, height)]
    # Rows below this cannot be matched; the bound is lower by far more than rounding.
    least = math.log(threshold) - 1e-3 if threshold > 0 else -math.inf
    best = logits.new_empty((count, rows))
    partner = torch.zeros_like(best, dtype=torch.long)
    for k in range(count):
        cells0, cells1 = tokens0[k].to(inner), tokens1[k].to(inner).T
        log_rows = logits.new_empty(rows)
        log_columns = logits.new_full((columns,), -torch.inf)
        for part in parts:
            tile = _products(cells0[part], cells1, logits[part] if keep else logits).mul_(scale)
            log_rows[part], of_tile = _log_sums(tile, spare)
            log_columns = torch.logaddexp(log_columns, of_tile)
        column_best = torch.full_like(log_columns, -torch.inf)
        for part in parts:
            if keep:
                tile = logits[part].mul_(2)
            else:
                tile = _products(cells0[part], cells1, logits).mul_(2 * scale)
            tile.sub_(log_columns).sub_(log_rows[part, None])
            best[k, part] = tile.amax(1)
            torch.maximum(column_best, tile.amax(0), out=column_best)
            able = torch.where(best[k, part] > least)[0]
            partner[k, part.start + able] = tile[able].argmax(1)
        matched = column_best.gather(0, partner[k]) == best[k]
        best[k] = torch.where(matched, best[k], -torch.inf)
    confidence = best.exp_()
    return torch.where(confidence > threshold, confidence, 0.0), partner


def _log_sums(tile: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the sum of exponentials of each row and of each column. [rows] and [S]"""
    top_rows, top_columns = tile.amax(1), tile.amax(0)
    top = top_rows.max()
    if top - torch.minimum(top_rows.min(), top_columns.min()) < SPAN:
        powers = torch.sub(tile, top, out=spare[: len(tile)]).exp_()
        return powers.sum(1).log_().add_(top), powers.sum(0).log_().add_(top)
    return tile.logsumexp(1), tile.logsumexp(0)


def _products(cells0: Tensor, cells1: Tensor, out: Tensor) -> Tensor:
    """Products of some rows with all columns, written where they fit. [rows, S]"""
    return torch.mm(cells0, cells1, out=out[: len(cells0)])
