"""match_count in torch over tiles of rows: the definition's arithmetic, a tile at a time."""

from __future__ import annotations

import torch
from torch import Tensor

# Two tiles are alive at a time, and both should stay in a core's second-level cache.
TILE_BYTES = 2**20


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
    tiles = tokens0.new_empty((2, height, columns), dtype=inner)
    best = tokens0.new_empty((count, rows), dtype=inner)
    partner = best.new_empty((count, rows), dtype=torch.long)
    for k in range(count):
        cells0, cells1 = tokens0[k].to(inner), tokens1[k].to(inner).T
        log_rows, log_columns = _log_sums(cells0, cells1, scale, tiles)
        column_best = torch.full_like(log_columns, -torch.inf)
        for begin in range(0, rows, height):
            part = slice(begin, begin + height)
            tile = _logits(cells0[part], cells1, 2 * scale, tiles[0])
            tile.sub_(log_columns).sub_(log_rows[part, None])
            torch.max(tile, 1, out=(best[k, part], partner[k, part]))
            torch.maximum(column_best, tile.amax(0), out=column_best)
        matched = column_best.gather(0, partner[k]) == best[k]
        best[k] = torch.where(matched, best[k], -torch.inf)
    confidence = best.exp_()
    return torch.where(confidence > threshold, confidence, 0.0), partner


def _log_sums(cells0: Tensor, cells1: Tensor, scale: float, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the sum of exponentials of each row and of each column. [L] and [S]"""
    height = tiles.shape[1]
    log_rows = cells0.new_empty(len(cells0))
    largest = cells0.new_full((cells1.shape[1],), -torch.inf)
    total = torch.zeros_like(largest)
    for begin in range(0, len(cells0), height):
        part = slice(begin, begin + height)
        tile = _logits(cells0[part], cells1, scale, tiles[0])
        top = tile.amax(1)
        powers = torch.sub(tile, top[:, None], out=tiles[1][: len(tile)]).exp_()
        log_rows[part] = powers.sum(1).log_().add_(top)
        raised = torch.maximum(largest, tile.amax(0))
        total.mul_(largest.sub_(raised).exp_()).add_(tile.sub_(raised).exp_().sum(0))
        largest = raised
    return log_rows, total.log_().add_(largest)


def _logits(cells0: Tensor, cells1: Tensor, scale: float, tile: Tensor) -> Tensor:
    """Scaled products of some rows with all columns, written into the tile. [rows, S]"""
    return torch.mm(cells0, cells1, out=tile[: len(cells0)]).mul_(scale)
