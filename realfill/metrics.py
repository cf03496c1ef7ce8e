"""Metrics: how close a filled region is to the truth, measured inside the hole only.

Source: RealFill, arXiv:2309.16668, section 4; SSIM after Wang et al., 2004.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from realfill.errors import InvalidScene

WINDOW_RADIUS = 5
SIGMA = 1.5
STABILISERS = (0.01**2, 0.03**2)


def psnr(image: Tensor, truth: Tensor, mask: Tensor) -> float:
    """Peak signal-to-noise ratio of the missing pixels in dB; infinite if they are equal.

    Args:
        image: Completed image in [0, 1]. [3, H, W]
        truth: What it should be, in [0, 1]. [3, H, W]
        mask: 1 where pixels were missing, else 0. [H, W]

    Raises:
        InvalidScene: Sizes differ or the mask is empty.
    """
    _check(image, truth, mask)
    errors = (image.double() - truth.double()).square()
    return float(-10 * errors[..., mask.bool()].mean().log10())


def ssim(image: Tensor, truth: Tensor, mask: Tensor) -> float:
    """Structural similarity, averaged over the missing pixels; 1 if images are equal.

    Args:
        image: Completed image in [0, 1]. [3, H, W]
        truth: What it should be, in [0, 1]. [3, H, W]
        mask: 1 where pixels were missing, else 0. [H, W]

    Raises:
        InvalidScene: Sizes differ or the mask is empty.
    """
    _check(image, truth, mask)
    return float(ssim_map(image, truth)[..., mask.bool()].mean())


def ssim_map(image: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity around every pixel: 11x11 Gaussian of sigma 1.5, edges mirrored.

    Args:
        image: In [0, 1], sides of at least 5 pixels. [3, H, W]
        truth: In [0, 1]. [3, H, W]

    Returns:
        Similarity in [-1, 1], float64. [3, H, W]
    """
    x, y = image.double(), truth.double()
    moments = _blur(torch.stack([x, y, x * x, y * y, x * y]))
    mean_x, mean_y = moments[0], moments[1]
    variance_x, variance_y = moments[2] - mean_x**2, moments[3] - mean_y**2
    covariance = moments[4] - mean_x * mean_y
    c1, c2 = STABILISERS
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return luminance * structure


def _blur(planes: Tensor) -> Tensor:
    """Gaussian mean around every pixel. [..., H, W]"""
    offsets = torch.arange(-WINDOW_RADIUS, WINDOW_RADIUS + 1, device=planes.device)
    kernel = torch.exp(-offsets.double().square() / (2 * SIGMA**2))
    kernel = kernel / kernel.sum()
    height, width = planes.shape[-2:]
    padded = planes[..., _mirrored(height, planes.device), :]
    padded = padded[..., _mirrored(width, planes.device)].flatten(0, -3).unsqueeze(1)
    blurred = F.conv2d(F.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return blurred.view(planes.shape)


def _mirrored(length: int, device: torch.device) -> Tensor:
    """Places along an axis that continues mirrored, border pixel included, at both ends."""
    places = torch.arange(-WINDOW_RADIUS, length + WINDOW_RADIUS, device=device)
    places = torch.where(places < 0, -1 - places, places)
    return torch.where(places >= length, 2 * length - 1 - places, places)


def _check(image: Tensor, truth: Tensor, mask: Tensor) -> None:
    if image.shape != truth.shape or image.shape[-2:] != mask.shape:
        raise InvalidScene(
            f"Image {list(image.shape)}, truth {list(truth.shape)} and mask {list(mask.shape)}"
            " differ in size: bring them to one height and width."
        )
    if not mask.any():
        raise InvalidScene("The mask is empty, so there is nothing to compare: mark the hole.")
