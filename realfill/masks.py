"""Masks: 1 where pixels are missing, 0 in the known region."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from realfill.errors import InvalidScene

MAX_RECTANGLES = 29
SIDE_SHARE = (0.03, 0.25)
MARGIN_SHARE = 0.01


def random_mask(
    generator: torch.Generator, size_px: int, *, complement_share: float = 0.5
) -> Tensor:
    """Draw one training mask, as ``random_masks`` does. [size_px, size_px]"""
    return random_masks(generator, 1, size_px, complement_share=complement_share)[0]


def random_masks(
    generator: torch.Generator, count: int, size_px: int, *, complement_share: float = 0.5
) -> Tensor:
    """Draw training masks: several rectangles, either their union or all but their union.

    Between 1 and 29 rectangles have sides of 3 to 25 % of the image and stay 1 % (at least one
    pixel) clear of its border, so a mask is never empty and never full.

    Args:
        generator: Source of every draw; the masks lie on its device.
        count: Number of masks.
        size_px: Side of the square masks, at least 8.
        complement_share: How often one is all but the rectangles.

    Returns:
        Masks of zeros and ones. [count, size_px, size_px]

    Source: RealFill, arXiv:2309.16668, after LaMa, arXiv:2109.07161.
    """
    device = generator.device
    most = MAX_RECTANGLES
    drawn = torch.randint(1, most + 1, (count, 1), generator=generator, device=device)
    shares = torch.rand(4, count, most, 1, generator=generator, device=device)
    complement = torch.rand(count, 1, 1, generator=generator, device=device) < complement_share

    low, high = (max(1, round(share * size_px)) for share in SIDE_SHARE)
    margin = max(1, round(MARGIN_SHARE * size_px))
    sides = low + (shares[:2] * (high - low + 1)).floor()  # [2, count, most, 1]
    starts = margin + (shares[2:] * (size_px - 2 * margin - sides + 1)).floor()

    line = torch.arange(size_px, device=device)
    inside = (line >= starts) & (line < starts + sides)  # [2, count, most, size_px]
    inside &= (torch.arange(most, device=device) < drawn)[..., None]
    rows, columns = inside.float()
    union = torch.bmm(rows.mT, columns) > 0
    return (union ^ complement).float()


def dilate(mask: Tensor, px: int) -> Tensor:
    """Grow the missing region by a square of `px` pixels to every side.

    Args:
        mask: 1 where pixels are missing, else 0. [..., H, W]
        px: How far to grow, 0 or more.

    Returns:
        The grown mask. [..., H, W]
    """
    if px == 0:
        return mask.clone()
    planes = mask.reshape(-1, 1, *mask.shape[-2:])
    # A square is two lines: far cheaper than one large window.
    planes = F.max_pool2d(planes, (2 * px + 1, 1), stride=1, padding=(px, 0))
    planes = F.max_pool2d(planes, (1, 2 * px + 1), stride=1, padding=(0, px))
    return planes.reshape(mask.shape)


def latent_mask(mask: Tensor, cell_px: int, *, nearest: bool = False) -> Tensor:
    """Reduce a mask to latent cells: one missing pixel makes the whole cell missing.

    Args:
        mask: 1 where pixels are missing, else 0. [..., H, W]
        cell_px: Pixels along one latent cell.
        nearest: Ask the pixel in each cell's middle alone, as public code does: cells at the rim
            then count as known though some of their pixels are blank. For comparison.

    Returns:
        Mask over latent cells. [..., h, w]

    Raises:
        InvalidScene: The size is no multiple of the cell.
    """
    height, width = mask.shape[-2:]
    if height % cell_px or width % cell_px:
        raise InvalidScene(
            f"The mask is {width}x{height} pixels, which latent cells of {cell_px} pixels do not"
            f" tile: crop or resize it to a multiple of {cell_px}."
        )
    planes = mask.reshape(-1, 1, height, width)
    if nearest:
        planes = planes[..., cell_px // 2 :: cell_px, cell_px // 2 :: cell_px]
    else:
        planes = F.max_pool2d(planes, cell_px)
    return planes.reshape(*mask.shape[:-2], height // cell_px, width // cell_px)
