"""The pool of pictures that nano learns from: drawn ones, and views of the bundled photographs."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from realfill.nano.images import draw
from realfill.nano.photographs import PHOTOGRAPHS, photograph, view

POOL_PX = 160


def _drawn(span: tuple[int, int, int]) -> tuple[list[str], NDArray[np.uint8]]:
    start, stop, seed = span
    drawn = [draw(np.random.default_rng((seed, k)), POOL_PX) for k in range(start, stop)]
    return [caption for caption, _ in drawn], np.stack([picture for _, picture in drawn])


def _photographed(span: tuple[int, int, int]) -> tuple[list[str], NDArray[np.uint8]]:
    start, stop, seed = span
    views = []
    for k in range(start, stop):
        rng = np.random.default_rng((seed, 1, k))
        name = PHOTOGRAPHS[k % len(PHOTOGRAPHS)]
        views.append(view(rng, photograph(name), POOL_PX, zoom=0.45))
    names = [Path(PHOTOGRAPHS[k % len(PHOTOGRAPHS)]).stem for k in range(start, stop)]
    return [f"a photo of {name.replace('_', ' ')}" for name in names], np.stack(views)


def picture_pool(
    folder: Path, *, drawn: int, photographed: int, seed: int
) -> tuple[list[str], NDArray[np.uint8]]:
    """Captions and pictures to learn from, drawn once and kept in ``folder``. [K, 160, 160, 3]"""
    path = folder / f"pool-{drawn}-{photographed}-{seed}.npz"
    if not path.exists():
        spans = [(k, min(k + 50, drawn), seed) for k in range(0, drawn, 50)]
        shots = [(k, min(k + 50, photographed), seed) for k in range(0, photographed, 50)]
        with ProcessPoolExecutor() as workers:
            parts = list(workers.map(_drawn, spans)) + list(workers.map(_photographed, shots))
        captions = [caption for part in parts for caption in part[0]]
        folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".part.npz")
        np.savez(draft, captions=np.array(captions), pictures=np.concatenate([p for _, p in parts]))
        draft.replace(path)
    with np.load(path) as kept:
        return [str(c) for c in kept["captions"]], kept["pictures"]


def crops(pictures: Tensor, chosen: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Random crops, pixel for pixel, half of them mirrored.

    Args:
        pictures: The pool. [K, H, W, 3], uint8
        chosen: Which pictures to cut, on their device. [N]
        side: Height and width of the crops.
        generator: Source of every random choice, on the pictures' device.

    Returns:
        In [0, 1]. [N, 3, side, side]
    """
    device = pictures.device
    height, width = pictures.shape[1:3]
    room = torch.tensor([height - side + 1, width - side + 1], device=device)
    corners = torch.rand(len(chosen), 2, generator=generator, device=device) * room
    mirrored = torch.rand(len(chosen), 1, generator=generator, device=device) < 0.5
    line = torch.arange(side, device=device)
    rows = corners[:, :1].long() + line
    columns = corners[:, 1:].long() + torch.where(mirrored, line.flip(0), line)
    cut = pictures[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2).float() / 255


def shrunk(pictures: Tensor, side: int) -> Tensor:
    """Whole pictures, made smaller. [K, side, side, 3], uint8"""
    parts = []
    for some in pictures.split(512):
        pixels = some.permute(0, 3, 1, 2).float()
        small = F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True)
        parts.append(small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(parts)


def views(pictures: Tensor, small: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Crops in one half, whole pictures in the other, each in a light of its own.

    Args:
        pictures: The pool. [K, H, W, 3], uint8
        small: The same, shrunk to the crops' size. [K, S, S, 3], uint8
        chosen: Which pictures to show, on their device. [N]
        generator: Source of every random choice, on the pictures' device.

    Returns:
        In [0, 1]. [N, 3, S, S]
    """
    device, side = pictures.device, int(small.shape[1])
    half = len(chosen) // 2
    near = crops(pictures, chosen[:half], side, generator)
    far = crops(small, chosen[half:], side, generator)
    pixels = torch.cat([near, far])

    def each(channels: int, low: float, high: float) -> Tensor:
        share = torch.rand(len(chosen), channels, 1, 1, generator=generator, device=device)
        return low + (high - low) * share

    lit = pixels * each(1, 0.8, 1.12) * each(3, 0.93, 1.07)
    return lit.clamp(0, 1) ** each(1, 0.85, 1.2)
