"""The photographs that ship inside the scikit-image wheel."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image

# Photographs that ship inside the scikit-image wheel. The stereo motorcycle and the cup of coffee
# are held out: they are the demo scenes, and the motorcycle is the ground truth of the
# correspondence tests.
PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "rocket.jpg",
    "retina.jpg",
    "hubble_deep_field.jpg",
    "ihc.png",
    "camera.png",
    "brick.png",
    "grass.png",
    "gravel.png",
    "coins.png",
    "moon.png",
)
HELD_OUT = ("motorcycle_left.png", "motorcycle_right.png", "coffee.png")


@cache
def photograph(name: str) -> NDArray[np.uint8]:
    """One photograph of the scikit-image wheel, in sRGB. [H, W, 3]"""
    path = Path(skimage.data.__file__).parent / name
    return np.asarray(Image.open(path).convert("RGB"))


def view(
    rng: np.random.Generator, image: NDArray[np.uint8], size_px: int, *, zoom: float = 1.0
) -> NDArray[np.uint8]:
    """A crop under a mild random similarity, flip, light and colour cast.

    Args:
        rng: Source of every random choice.
        image: Picture to look at. [H, W, 3]
        size_px: Height and width of the crop.
        zoom: Least share of the image's short side that the crop shows, 1 for the whole of it.

    Returns:
        The crop. [size_px, size_px, 3]
    """
    height, width = image.shape[:2]
    side = min(height, width) * rng.uniform(min(zoom, 0.999), 1.0)
    angle = rng.normal(0, 0.12)
    reach = side * (abs(np.cos(angle)) + abs(np.sin(angle))) / 2
    if 2 * reach > min(height, width):
        side *= min(height, width) / (2 * reach)
        reach = min(height, width) / 2
    centre = np.array([rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)])
    flip = rng.choice((-1.0, 1.0))
    right = side / size_px * np.array([np.cos(angle), np.sin(angle)]) * flip
    down = side / size_px * np.array([-np.sin(angle), np.cos(angle)])
    origin = centre - (right + down) * size_px / 2
    # Shrink first, so that the affine resampling does not alias.
    shrink = max(1, int(side / size_px))
    picture = Image.fromarray(image)
    if shrink > 1:
        picture = picture.reduce(shrink)
    matrix = np.array([right[0], down[0], origin[0], right[1], down[1], origin[1]]) / shrink
    crop = picture.transform(
        (size_px, size_px), Image.Transform.AFFINE, tuple(matrix), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(crop, np.float32) / 255
    grey = np.ptp(pixels, axis=2).mean() < 0.004
    cast = rng.normal(1, 0.12 if grey else 0.06, 3) * rng.uniform(0.75, 1.15)
    pixels = np.clip(pixels * cast, 0, 1) ** rng.uniform(0.8, 1.25)
    return to_bytes(pixels)


def to_bytes(pixels: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Pixels in [0, 1], clipped and rounded to 8 bit."""
    return (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)
