"""What a training step draws from: crops of the scene with random holes, as latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from realfill.base import Base
from realfill.complete.compositing import Window, crop, crop_mask, window_of
from realfill.masks import latent_mask, random_mask
from realfill.scene import Scene

ENCODE_BATCH = 16


@dataclass(frozen=True)
class Draws:
    """Training pictures as the U-Net meets them.

    Attributes:
        latents: Whole crops. [K, C, h, w]
        masked: The same crops with their holes greyed out before encoding. [K, C, h, w]
        masks: 1 where a cell has a missing pixel. [K, 1, h, w]
        weights: 1 where the loss counts: nowhere in the target's own hole. [K, 1, h, w]
    """

    latents: Tensor
    masked: Tensor
    masks: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, chosen: Tensor) -> Draws:
        """The draws of some indices. [N]"""
        return Draws(
            *(part[chosen] for part in (self.latents, self.masked, self.masks, self.weights))
        )


def draw(
    base: Base,
    scene: Scene,
    count: int,
    generator: torch.Generator,
    *,
    zoom: float,
    hole_share: float = 0.0,
) -> Draws:
    """Draw crops of references and target with replacement, mask them and encode them.

    The conditioning mask of the target is the random mask joined with its own hole: what lies in
    the hole is unwanted and must not be seen, and what is known must not always be given.

    Args:
        base: The model that encodes.
        scene: The photographs.
        count: Number of draws K.
        generator: Source of every random choice, on the CPU.
        zoom: Crops show 1 / ``zoom`` of the short side up to all of it.
        hole_share: Share of draws whose mask is joined with the shape of the target's hole.

    Source: RealFill, arXiv:2309.16668, section 3.3.
    """
    size_px = base.size_px
    pixels, masks, weights = [], [], []
    wide = _reach(scene, size_px)
    shape = crop_mask(scene.mask, window_of(scene.mask, size_px), size_px)
    for _ in range(count):
        index = int(torch.randint(len(scene.references) + 1, (), generator=generator))
        is_target = index == len(scene.references)
        image = scene.target if is_target else scene.references[index]
        unknown = scene.mask if is_target else torch.zeros(image.shape[-2:])
        window = _window(image, generator, 1 / zoom, wide)
        own_hole = crop_mask(unknown, window, size_px)
        pixels.append(crop(image, window, size_px))
        random = torch.maximum(random_mask(generator, size_px), own_hole)
        if float(torch.rand((), generator=generator)) < hole_share:
            random = torch.maximum(random, _moved(shape, generator))
        masks.append(random)
        weights.append(1 - own_hole)
    holes = torch.stack(masks)[:, None]
    return encode(base, torch.stack(pixels), holes, torch.stack(weights)[:, None])


def encode(base: Base, pixels: Tensor, holes: Tensor, weights: Tensor) -> Draws:
    """Encode crops and their masked selves in batches.

    Args:
        pixels: Crops in [0, 1]. [K, 3, S, S]
        holes: 1 where conditioning is missing. [K, 1, S, S]
        weights: 1 where the loss counts. [K, 1, S, S]
    """
    greyed = pixels * (1 - holes) + 0.5 * holes
    latents = torch.cat([base.encode(part) for part in pixels.split(ENCODE_BATCH)])
    masked = torch.cat([base.encode(part) for part in greyed.split(ENCODE_BATCH)])
    # A cell counts only if all of its pixels are known.
    cells = 1 - latent_mask(1 - weights, base.cell_px)
    masks = latent_mask(holes, base.cell_px)
    device = latents.device
    return Draws(latents.float(), masked.float(), masks.to(device), cells.to(device))


def blank(base: Base) -> Tensor:
    """Latents of the picture in which everything is missing. [1, C, h, w]"""
    return base.encode(torch.full((1, 3, base.size_px, base.size_px), 0.5)).float()


def _moved(mask: Tensor, generator: torch.Generator) -> Tensor:
    """The mask, half the time where it is and half the time anywhere, around the edges. [H, W]"""
    size_px = mask.shape[-1]
    draws = torch.rand(3, generator=generator).tolist()
    if draws[0] < 0.5:
        return mask
    return mask.roll([round(size_px * share) for share in draws[1:]], (0, 1))


def _reach(scene: Scene, size_px: int) -> float:
    """Side of the target's window over its short side; above 1 where the hole is wider."""
    window = window_of(scene.mask, size_px)
    return window.side / min(scene.target.shape[-2:])


def _window(image: Tensor, generator: torch.Generator, smallest: float, largest: float) -> Window:
    """A random square, inside the image where it fits and around it where it does not."""
    height, width = image.shape[-2:]
    u = torch.rand(3, generator=generator).tolist()
    side = max(8, round(min(height, width) * (smallest + (largest - smallest) * u[0])))
    top, left = (
        round(v * (length - side)) for v, length in zip(u[1:], (height, width), strict=True)
    )
    return Window(top=top, left=left, side=side)
