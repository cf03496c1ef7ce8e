"""Squares of photographs that nano was never trained on, with a hole each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from realfill.complete.windows import Window, crop
from realfill.nano.photographs import HELD_OUT, photograph
from realfill.scene import IMAGE_SUFFIXES, load_image

SIDE_SHARE = (0.2, 0.5)
ZOOM = 0.6


@dataclass(frozen=True)
class Photograph:
    """One photograph in [0, 1] and what to call it. [3, H, W]"""

    name: str
    pixels: Tensor


@dataclass(frozen=True)
class Trial:
    """A square to complete.

    Attributes:
        name: Of the photograph.
        truth: The square, in [0, 1]. [3, S, S]
        mask: 1 where its pixels are taken away. [S, S]
    """

    name: str
    truth: Tensor
    mask: Tensor


def held_out(scenes: Path | None) -> list[Photograph]:
    """The bundled photographs that nano's recipe leaves out, and the scenes' references."""
    found = [
        Photograph(Path(name).stem, torch.tensor(photograph(name)).permute(2, 0, 1) / 255)
        for name in HELD_OUT
    ]
    paths = sorted(scenes.glob("*/ref/*")) if scenes is not None else []
    for path in paths:
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            name = f"{path.parents[1].name} {path.stem[:12]}"
            found.append(Photograph(name, load_image(path)))
    return found


def random_hole(generator: torch.Generator, size_px: int) -> Tensor:
    """A rectangle or an ellipse whose sides are 20 to 50 % of the square.

    Returns:
        1 where pixels are missing. [size_px, size_px]
    """
    low, high = SIDE_SHARE
    height, width, down, across, kind = torch.rand(5, generator=generator).tolist()
    sides = [size_px * (low + (high - low) * share) for share in (height, width)]
    centres = [
        side / 2 + share * (size_px - side)
        for side, share in zip(sides, (down, across), strict=True)
    ]
    line = torch.arange(size_px) + 0.5
    y = ((line - centres[0]).abs() / (sides[0] / 2))[:, None]
    x = ((line - centres[1]).abs() / (sides[1] / 2))[None, :]
    inside = (y.square() + x.square() < 1) if kind < 0.4 else torch.maximum(y, x) < 1
    return inside.float()


def trials(
    photographs: Sequence[Photograph], count: int, size_px: int, *, seed: int = 0
) -> Iterator[Trial]:
    """Random squares of the photographs, one after the other, each with a random hole.

    Args:
        photographs: Taken in turn.
        count: How many trials.
        size_px: Side of the square.
        seed: The k-th trial depends on it and on k alone.
    """
    for k in range(count):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + k)
        chosen = photographs[k % len(photographs)]
        height, width = chosen.pixels.shape[-2:]
        size, top, left = torch.rand(3, generator=generator).tolist()
        side = round(min(height, width) * (ZOOM + (1 - ZOOM) * size))
        window = Window(round(top * (height - side)), round(left * (width - side)), side)
        truth = crop(chosen.pixels, window, size_px)
        yield Trial(chosen.name, truth, random_hole(generator, size_px))
