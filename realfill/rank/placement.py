"""Do matches in the hole lie where the known region says that they should?

Cells that look alike match also where they do not belong; where the matcher knows a place badly,
most matches of invented content do. But the known region around the hole matches too, and tells
where in each reference the hole's content has to lie. To the known region's matches of a candidate
with a reference an affine map is fitted; a match in the hole counts by how near its partner is to
where that map puts it.

The fit weights matches by confidence and is robust: those far from the map of the round before
count less, and what "far" means shrinks from half the frame to one cell. Nothing in it waits for
the device.

Sources: Geman and McClure, "Statistical Methods for Tomographic Image Reconstruction", 1987 (the
weights); Blake and Zisserman, "Visual Reconstruction", 1987 (the shrinking scale).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from realfill.rank.correspondences import CELL_PX, Matches

# Standard deviation, in px at working size, of what still counts as the same place.
SLACK_PX = 2.0 * CELL_PX
# How many sure matches outweigh the assumption of a mere shift, without turn or scale.
STIFFNESS = 0.1


@torch.no_grad()
def agreement(matches: Sequence[Matches], missing: Sequence[Tensor], extent_px: int) -> Tensor:
    """How many matches in the hole lie where the known region puts them, over all references.

    A match in the right place counts 1, one that is ``SLACK_PX`` off 0.61, twice that 0.14. A
    reference that matches nothing of a candidate's known region cannot be placed and adds nothing.

    Args:
        matches: Of the candidates with each reference, however unsure. R of [N, L]
        missing: Whether each of their points lies in the hole. R of [N, L] bool
        extent_px: Long side of the candidates at working size.

    Returns:
        On the matches' device. [N]
    """
    points0 = torch.stack([found.points0 for found in matches])
    shift = torch.stack([found.points1 for found in matches]) - points0
    confidence = torch.stack([found.confidence for found in matches])
    inside = torch.stack(list(missing))
    known = torch.where(inside, 0.0, confidence)
    frame = torch.cat([torch.ones_like(points0[..., :1]), 2 * points0 / extent_px - 1], -1)
    off = _off(frame, shift, known)
    far_px = extent_px / 2
    while far_px >= CELL_PX:
        off = _off(frame, shift, known / (1 + (off / far_px).square()).square())
        far_px /= 2
    counted = inside & (confidence > 0) & (known.sum(-1, keepdim=True) > 0)
    return (torch.exp(-(off / SLACK_PX).square() / 2) * counted).sum(-1).sum(0)


def _off(frame: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    """Distance of every partner from where the weighted least-squares map puts it, in px.

    Args:
        frame: 1 and the place in the candidate, from -1 to 1. [R, N, L, 3]
        shift: From there to the partner, in px. [R, N, L, 2]
        weight: [R, N, L]

    Returns:
        [R, N, L]
    """
    weighted = (frame * weight[..., None]).transpose(-1, -2)
    normal = (weighted @ frame).double()
    stiff = STIFFNESS * torch.eye(3, dtype=normal.dtype, device=normal.device)
    # Nothing is assumed of the shift, but it stays determined where nothing matches. Filled: to
    # assign a number is to copy it from the host, which waits.
    stiff[0, 0].fill_(1e-9)
    solved = _inverse(normal + stiff) @ (weighted @ shift).double()
    return (shift - frame @ solved.to(frame)).norm(dim=-1)


def _inverse(matrices: Tensor) -> Tensor:
    """Of positive definite matrices, in closed form: solvers check for errors, and the host waits.

    [..., 3, 3]
    """
    rows = matrices.unbind(-2)
    columns = [torch.linalg.cross(rows[k - 2], rows[k - 1]) for k in range(3)]
    determinant = (rows[0] * columns[0]).sum(-1)
    return torch.stack(columns, -1) / determinant[..., None, None]
