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
    """Draw a training mask: several rectangles, either their union or all but their union.

    Between 1 and 29 rectangles have sides of 3 to 25 % of the image and stay 1 % (at least one
    pixel) clear of its border, so a mask is never empty and never full.

    Args:
        generator: Source of every draw; the mask lies on its device.
        size_px: Side of the square mask, at least 8.
        complement_share: How often it is all but the rectangles.

    Returns:
        Mask of zeros and ones. [size_px, size_px]

    Source: RealFill, arXiv:2309.16668, after LaMa, arXiv:2109.07161.
    """
    device = generator.device
    count = int(torch.randint(1, MAX_RECTANGLES + 1, (1,), generator=generator, device=device))
    shares = torch.rand(4, 1, count, 1, generator=generator, device=device)
    complement = torch.rand(1, 1, 1, generator=generator, device=device) < complement_share
    return (_union(_spans(shares, size_px)) ^ complement)[0].float()


def random_masks(
    generator: torch.Generator, count: int, size_px: int, *, complement_share: float = 0.5
) -> Tensor:
    """Draw many masks as ``random_mask`` draws one, by other draws and without asking a GPU.

    Returns:
        Masks of zeros and ones. [count, size_px, size_px]
    """
    device, most = generator.device, MAX_RECTANGLES
    drawn = torch.randint(1, most + 1, (count, 1), generator=generator, device=device)
    shares = torch.rand(4, count, most, 1, generator=generator, device=device)
    complement = torch.rand(count, 1, 1, generator=generator, device=device) < complement_share
    used = torch.arange(most, device=device) < drawn  # [count, most]
    return (_union(_spans(shares, size_px) & used[..., None]) ^ complement).float()


def _spans(shares: Tensor, size_px: int) -> Tensor:
    """Rows and columns of rectangles, by the shares of what their sides and places may be.

    Args:
        shares: Height, width, top and left, in [0, 1]. [4, N, K, 1]

    Returns:
        [2, N, K, size_px], bool
    """
    low, high = (max(1, round(share * size_px)) for share in SIDE_SHARE)
    margin = max(1, round(MARGIN_SHARE * size_px))
    sides = low + (shares[:2] * (high - low + 1)).floor()  # [2, N, K, 1]
    starts = margin + (shares[2:] * (size_px - 2 * margin - sides + 1)).floor()
    line = torch.arange(size_px, device=shares.device)
    return (line >= starts) & (line < starts + sides)


def _union(spans: Tensor) -> Tensor:
    """Where some rectangle is. [2, N, K, S] to [N, S, S], bool"""
    rows, columns = spans.float()
    return torch.bmm(rows.mT, columns) > 0


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
