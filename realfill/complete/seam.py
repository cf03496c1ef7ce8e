"""Seams: a sample meets the target around the hole, however its colours drifted.

An autoencoder gives known pixels back a little off, and a sample's colours may be off by more; cut
out and pasted, both show as an edge. Poisson blending removes it: the sample keeps its gradients
and takes the target's values on the rim. With the sample's own gradients as guidance, that is the
sample plus the smoothest surface that equals the error on the rim (the membrane).

Source: Pérez, Gangnet and Blake, "Poisson Image Editing", SIGGRAPH 2003.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import solveh_banded
from torch import Tensor
from torch.nn import functional as F

# The surface is smooth: beyond this size it is solved for coarser cells and interpolated.
GRID = 128


def seamless(samples: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Shift the filled region of each sample so that it continues the known pixels around it.

    Where nothing is known, samples come back as they are.

    Args:
        samples: Decoded images in [0, 1]. [N, 3, H, W]
        target: Image to complete, in [0, 1]. [3, H, W]
        mask: 1 where pixels are missing, else 0. [H, W]

    Returns:
        Images in [0, 1] that equal the target where it is known. [N, 3, H, W]
    """
    known = (1 - mask).to(samples)
    if not known.any() or not mask.any():
        return samples
    target = target.to(samples)
    cell = -(-max(mask.shape) // GRID)
    weight = _pooled(known[None, None], cell)
    error = _pooled((target - samples) * known, cell) / weight.clamp(min=1e-6)
    surface = membrane(error, weight[0, 0] > 0)
    if cell > 1:
        surface = F.interpolate(surface, scale_factor=cell, mode="bilinear")
    height, width = mask.shape
    shifted = (samples + surface[..., :height, :width]).clamp(0, 1)
    return torch.where(known > 0, target, shifted)


def membrane(values: Tensor, known: Tensor) -> Tensor:
    """The smoothest continuation: each unknown value is the mean of its neighbours'.

    At the borders of the grid nothing is prescribed.

    Args:
        values: Read where they are known. [N, C, h, w]
        known: True where a value is given; at least one is. [h, w]

    Returns:
        The given values, and the solution of Laplace's equation between them. [N, C, h, w]
    """
    unknown = ~known.cpu().numpy()
    count = int(unknown.sum())
    if count == 0:
        return values
    flat = values.detach().double().cpu().numpy().reshape(-1, *unknown.shape)
    is_wide = unknown.any(0).sum() > unknown.any(1).sum()
    if is_wide:
        # Numbered along the hole's shorter side, neighbours have the closest numbers.
        unknown, flat = unknown.T, flat.transpose(0, 2, 1)
    number = np.full(unknown.shape, -1)
    number[unknown] = np.arange(count)
    diagonal = np.zeros(count)
    given = np.zeros((count, len(flat)))
    links = []
    for here, there in _neighbours(unknown.shape):
        row = number[here][unknown[here]]
        diagonal[row] += 1
        column = number[there][unknown[here]]
        inner, lower = column >= 0, (column >= 0) & (column < row)
        links.append((row[lower], column[lower]))
        given[row[~inner]] += flat[:, *there][:, unknown[here]][:, ~inner].T
    rows, columns = (np.concatenate(part) for part in zip(*links, strict=True))
    # Symmetric and positive definite, and within a band that is no wider than the grid's side: for
    # that, Cholesky in a band takes a half to four fifths of a general sparse solver's time.
    band = np.zeros((int((rows - columns).max(initial=0)) + 1, count))
    band[0] = diagonal
    band[rows - columns, columns] = -1
    flat[:, unknown] = solveh_banded(
        band, given, lower=True, overwrite_ab=True, overwrite_b=True, check_finite=False
    ).T
    solved = flat.transpose(0, 2, 1) if is_wide else flat
    return torch.from_numpy(solved.reshape(values.shape)).to(values)


def _neighbours(
    shape: tuple[int, ...],
) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """For each of four directions: the cells that have a neighbour there, and these neighbours."""
    whole, first, rest = slice(None), slice(None, -1), slice(1, None)
    down, across = ((first, whole), (rest, whole)), ((whole, first), (whole, rest))
    return [down, (down[1], down[0]), across, (across[1], across[0])]


def _pooled(planes: Tensor, cell: int) -> Tensor:
    """Sums over cells, the last ones of a side perhaps cut off. [N, C, ceil(H / cell), ...]"""
    if cell == 1:
        return planes
    height, width = planes.shape[-2:]
    padded = F.pad(planes, (0, -width % cell, 0, -height % cell))
    return F.avg_pool2d(padded, cell) * cell**2
