"""Evidence that a person can look at: the correspondences, drawn."""

from __future__ import annotations

import colorsys

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from realfill.rank.correspondences import Correspondences

SMALLEST_HEIGHT_PX = 256
GAP_PX = 8
# Lines are drawn larger and then reduced, since PIL draws them without smoothing.
OVERSAMPLING = 3
RIM = (255, 255, 255)


def draw_correspondences(
    candidate: Tensor,
    reference: Tensor,
    correspondences: Correspondences,
    mask: Tensor,
    *,
    most: int = 80,
) -> Tensor:
    """Candidate and reference side by side, with a line for each correspondence.

    A line's hue tells how far down it starts, so that neighbours can be followed; its strength is
    the confidence.

    Args:
        candidate: Completed image in [0, 1]. [3, H, W]
        reference: Photo in [0, 1], of any size. [3, H1, W1]
        correspondences: Of this pair, in px of the two images.
        mask: 1 where pixels were missing; its rim is drawn. [H, W]
        most: Number of lines at most, the most confident ones.

    Returns:
        Picture in [0, 1], both images at the candidate's height, at least 256 px. [3, h, w]
    """
    height = max(SMALLEST_HEIGHT_PX, int(candidate.shape[-2]))
    left, scale0 = _shown(candidate, height)
    right, scale1 = _shown(reference, height)
    shift = left.width + GAP_PX * OVERSAMPLING
    canvas = Image.new("RGB", (shift + right.width, left.height), (24, 24, 28))
    canvas.paste(_rimmed(left, mask), (0, 0))
    canvas.paste(right, (shift, 0))

    strongest = correspondences.confidence.argsort(descending=True, stable=True)[:most].flip(0)
    shown = correspondences.where(strongest)
    starts = (shown.points0.cpu() * scale0).tolist()
    ends = (shown.points1.cpu() * scale1).tolist()
    overlay = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(overlay)
    for (x0, y0), (x1, y1), sure in zip(starts, ends, shown.confidence.tolist(), strict=True):
        hue = 0.85 * y0 / left.height
        colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.75, 1.0))
        strength = round(90 + 150 * min(max(sure, 0.0), 1.0))
        pen.line((x0, y0, x1 + shift, y1), fill=(*colour, strength), width=OVERSAMPLING)
        for x, y in ((x0, y0), (x1 + shift, y1)):
            radius = 2.5 * OVERSAMPLING
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(*colour, 255))
    canvas.paste(overlay, (0, 0), overlay)
    size = (canvas.width // OVERSAMPLING, canvas.height // OVERSAMPLING)
    pixels = np.asarray(canvas.resize(size, Image.Resampling.BOX), np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _shown(image: Tensor, height: int) -> tuple[Image.Image, Tensor]:
    """The image at drawing size, and the factor from its px to those of the drawing, x first."""
    pixels = (image.detach().cpu().clamp(0, 1) * 255 + 0.5).to(torch.uint8)
    picture = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())
    width = max(1, round(height * picture.width / picture.height))
    size = (width * OVERSAMPLING, height * OVERSAMPLING)
    scale = torch.tensor([size[0] / picture.width, size[1] / picture.height])
    return picture.resize(size, Image.Resampling.BICUBIC), scale


def _rimmed(picture: Image.Image, mask: Tensor) -> Image.Image:
    """The picture with a thin line around the hole."""
    hole = Image.fromarray(((mask > 0).to(torch.uint8) * 255).cpu().numpy())
    hole = hole.resize(picture.size, Image.Resampling.NEAREST)
    inside = np.asarray(hole) > 0
    wide = OVERSAMPLING
    padded = np.pad(inside, wide)
    height, width = inside.shape
    shifts = ((0, wide), (2 * wide, wide), (wide, 0), (wide, 2 * wide))
    core = np.logical_and.reduce([padded[y : y + height, x : x + width] for y, x in shifts])
    pixels = np.array(picture)
    pixels[inside & ~core] = RIM
    return Image.fromarray(pixels)
