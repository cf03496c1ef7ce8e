"""Geometric consistency: how many correspondences one camera movement, or one plane, explains.

Counts say that cells look alike; that they also move alike is evidence of another kind.

Source: Fischler and Bolles, Random sample consensus, 1981; kornia's minimal solvers.
"""

from __future__ import annotations

from typing import Literal

import torch
from kornia.geometry.epipolar import find_fundamental, sampson_epipolar_distance
from kornia.geometry.homography import find_homography_dlt
from torch import Tensor

from realfill.rank.correspondences import CELL_PX, Correspondences

Model = Literal["homography", "fundamental"]
# Points that fix a model: four on a plane, eight for two views of anything.
SAMPLE = {"homography": 4, "fundamental": 8}


@torch.no_grad()
def consistent(
    correspondences: Correspondences,
    *,
    model: Model = "homography",
    within_px: float = CELL_PX,
    trials: int = 512,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which correspondences of one pair agree on one model, the one that most agree on.

    Args:
        correspondences: Of one pair.
        model: ``homography`` for a plane or a turning camera, ``fundamental`` for any two views.
        within_px: How far a point may lie from where the model puts it, or from its line.
        trials: Number of random samples.
        generator: Of the samples; seed 0 unless given.

    Returns:
        Whether each agrees; none where there are too few points to contradict a model. [K] bool
    """
    size = SAMPLE[model]
    device = correspondences.points0.device
    count = len(correspondences)
    if count <= size:
        return torch.zeros(count, dtype=torch.bool, device=device)
    generator = generator or torch.Generator().manual_seed(0)
    order = torch.rand((trials, count), generator=generator).argsort(1)[:, :size].to(device)
    points0, points1 = correspondences.points0.double(), correspondences.points1.double()
    sample0, sample1 = points0[order], points1[order]
    if model == "homography":
        models = find_homography_dlt(sample0, sample1)
        distance = _moved(models, points0, points1)
    else:
        models = find_fundamental(sample0, sample1)
        every0, every1 = (points.expand(trials, -1, -1) for points in (points0, points1))
        distance = sampson_epipolar_distance(every0, every1, models).sqrt()
    agree = distance.nan_to_num(nan=torch.inf) <= within_px
    return agree[agree.sum(1).argmax()]


def _moved(models: Tensor, points0: Tensor, points1: Tensor) -> Tensor:
    """Distance of each moved point from its partner, for each of the models. [trials, K]"""
    homogeneous = torch.cat([points0, torch.ones_like(points0[:, :1])], 1)
    moved = homogeneous @ models.transpose(1, 2)
    return (moved[..., :2] / moved[..., 2:] - points1).norm(dim=2)
