"""Seams: a sample meets the target around the hole, in values and in slopes.

An autoencoder gives known pixels back a little off, and a sample's colours may be off by more; cut
out and pasted, both show as an edge. So the error, which is known around the hole, is continued
into it and taken away. Poisson blending continues it by the surface that solves Laplace's equation
(the membrane), which meets the rim in its values alone. A spline in tension meets it in its slopes
too and is a membrane further inside; near the rim, where the known pixels tell the most, it is
closer to the truth (``docs/training.md``).

Sources: Pérez, Gangnet and Blake, "Poisson Image Editing", SIGGRAPH 2003; Smith and Wessel,
"Gridding with continuous curvature splines in tension", Geophysics 55, 1990.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import cho_solve_banded, cholesky_banded
from torch import Tensor
from torch.nn import functional as F

# The surface is smooth: beyond this size it is solved for coarser cells and interpolated.
GRID = 128
# Of the membrane against the stiff plate: slopes are carried on for 1/sqrt(TENSION) cells.
TENSION = 0.5
# How far the equation of one cell reaches.
REACH = 2


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
    return Seam(mask).close(samples, target)


class Seam:
    """The seam around one hole, with what needs no sample done already: most of the work.

    Args:
        mask: 1 where pixels are missing, else 0. [H, W]
    """

    def __init__(self, mask: Tensor) -> None:
        self._known = (1 - mask).float()
        self._cell = -(-max(mask.shape) // GRID)
        self._weight = _pooled(self._known[None, None], self._cell)
        some = bool(self._known.any()) and bool(mask.any())
        self._continuation = Continuation(self._weight[0, 0] > 0) if some else None

    def close(self, samples: Tensor, target: Tensor) -> Tensor:
        """The samples, shifted; arguments and outcome as for ``seamless``."""
        if self._continuation is None:
            return samples
        known, weight = self._known.to(samples), self._weight.to(samples)
        target = target.to(samples)
        error = _pooled((target - samples) * known, self._cell) / weight.clamp(min=1e-6)
        surface = self._continuation.of(error)
        if self._cell > 1:
            surface = F.interpolate(surface, scale_factor=self._cell, mode="bilinear")
        height, width = known.shape
        shifted = (samples + surface[..., :height, :width]).clamp(0, 1)
        return torch.where(known > 0, target, shifted)


class Continuation:
    """The spline in tension through what is known of a grid.

    With the grid's Laplacian L it solves L(L + tension) u = 0 at every unknown cell. At the borders
    of the grid nothing is prescribed.

    Args:
        known: True where values are given; at least one is. [h, w]
    """

    def __init__(self, known: Tensor) -> None:
        unknown = ~known.cpu().numpy()
        self._is_whole = not unknown.any()
        if self._is_whole:
            return
        self._down, self._across = (_window(places) for places in np.nonzero(unknown))
        unknown = unknown[self._down, self._across]
        # Numbered along the hole's shorter side, cells of one equation have the closest numbers.
        self._is_wide = unknown.shape[1] > unknown.shape[0]
        self._unknown = unknown.T if self._is_wide else unknown
        # Symmetric and positive definite, and within a band that is no wider than twice the hole:
        # Cholesky in a band takes less time than a general sparse solver.
        self._factor = cholesky_banded(
            _equations(self._unknown), lower=True, overwrite_ab=True, check_finite=False
        )

    def of(self, values: Tensor) -> Tensor:
        """The given values, and the continuation between them.

        Args:
            values: Read where they are known. [N, C, h, w]
        """
        if self._is_whole:
            return values
        unknown = self._unknown
        within = values[..., self._down, self._across].detach().double().cpu().numpy()
        flat = within.reshape(-1, *within.shape[2:])
        if self._is_wide:
            flat = flat.transpose(0, 2, 1)
        given = np.where(unknown, 0, flat)
        given = _laplacian(_laplacian(given) + TENSION * given)[:, unknown]
        solved = cho_solve_banded((self._factor, True), -given.T, check_finite=False)
        flat = flat.copy()
        flat[:, unknown] = solved.T
        filled = (flat.transpose(0, 2, 1) if self._is_wide else flat).reshape(within.shape)
        continued = values.clone()
        continued[..., self._down, self._across] = torch.from_numpy(filled).to(values)
        return continued


def _equations(unknown: NDArray[np.bool_]) -> NDArray[np.float64]:
    """L(L + tension) between the unknown cells: diagonals below the main one. [band, cells]"""
    height, width = unknown.shape
    degree = np.full((height + 2 * REACH, width + 2 * REACH), 4.0)
    for border in (REACH, -REACH - 1):
        degree[border] -= 1
        degree[:, border] -= 1
    rows, columns = (places + REACH for places in np.nonzero(unknown))
    here, own = np.arange(len(rows)), degree[rows, columns]
    number = np.full(degree.shape, -1)
    number[rows, columns] = here
    entries = [(here, here, own * (own + 1 + TENSION))]
    for down, across in ((-1, 0), (0, -1), (-1, -1), (-1, 1), (-2, 0), (0, -2)):
        there = number[rows + down, columns + across]
        among = there >= 0
        if abs(down) + abs(across) == 1:
            value = -(own + degree[rows + down, columns + across] + TENSION)[among]
        else:
            # The ways of two steps from one cell to the other.
            value = np.full(among.sum(), 2.0 if down and across else 1.0)
        entries.append((here[among], there[among], value))
    reach = max(int((row - column).max(initial=0)) for row, column, _ in entries)
    band = np.zeros((reach + 1, len(rows)), order="F")
    for row, column, value in entries:
        band[row - column, column] = value
    return band


def _laplacian(planes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of every cell, the sum of its differences from its neighbours. [N, h, w]"""
    down, across = np.diff(planes, axis=1), np.diff(planes, axis=2)
    summed = np.zeros_like(planes)
    summed[:, :-1] -= down
    summed[:, 1:] += down
    summed[:, :, :-1] -= across
    summed[:, :, 1:] += across
    return summed


def _window(places: NDArray[np.intp]) -> slice:
    """What the equations of unknown cells reach along an axis, whose numbers there these are."""
    return slice(max(int(places.min()) - REACH, 0), int(places.max()) + 1 + REACH)


def _pooled(planes: Tensor, cell: int) -> Tensor:
    """Sums over cells, the last ones of a side perhaps cut off. [N, C, ceil(H / cell), ...]"""
    if cell == 1:
        return planes
    height, width = planes.shape[-2:]
    padded = F.pad(planes, (0, -width % cell, 0, -height % cell))
    return F.avg_pool2d(padded, cell) * cell**2
