"""The two classical fills that a model has to beat."""

from __future__ import annotations

from collections.abc import Callable

import torch
from skimage.restoration import inpaint_biharmonic
from torch import Tensor

from realfill.masks import dilate

RING_SHARE = 1 / 16


def ring_mean(target: Tensor, mask: Tensor) -> Tensor:
    """Fill the hole with the mean colour of the known pixels around it.

    Args:
        target: Image to complete, in [0, 1]; what lies in its hole is not looked at. [3, H, W]
        mask: 1 where pixels are missing, else 0; not full. [H, W]

    Returns:
        The completed image. [3, H, W]
    """
    width_px = max(1, round(RING_SHARE * max(mask.shape)))
    ring = (dilate(mask, width_px) - mask).bool()
    colour = target[:, ring].mean(1)[:, None, None]
    return torch.where(mask > 0, colour, target)


def biharmonic(target: Tensor, mask: Tensor) -> Tensor:
    """Fill the hole with the smoothest surface that continues its rim; as ``ring_mean``.

    Source: Damelin and Hoang, arXiv:1707.04832, as scikit-image implements it.
    """
    known = (target * (1 - mask)).permute(1, 2, 0).double().cpu().numpy()
    filled = inpaint_biharmonic(known, mask.bool().cpu().numpy(), channel_axis=-1)
    surface = torch.from_numpy(filled).permute(2, 0, 1).to(target).clamp(0, 1)
    return torch.where(mask > 0, surface, target)


CLASSICAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ring mean": ring_mean,
    "biharmonic": biharmonic,
}
