"""What a training step draws from: crops of the scene with random holes, as latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from realfill.adapt.alignment import windows_in_references
from realfill.base import Base
from realfill.complete.windows import Window, crop, crop_mask, window_of
from realfill.config import TrainingConfig
from realfill.masks import latent_mask, random_mask
from realfill.scene import Scene

ENCODE_BATCH = 16
# Largest window of a reference that could not be aligned, in short sides.
WIDEST = 1.5
# Bounds of the change of colours, and the least that must be known of the target to tell its own.
MOST_CONTRAST = 2.0
LEAST_SPREAD = 0.02
LEAST_KNOWN = 64

# Mean and standard deviation of each channel. [3, 1, 1] twice
Colours = tuple[Tensor, Tensor]


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


class Views:
    """Crops of a scene's photographs, with the holes that they are to be completed in.

    Args:
        scene: The photographs.
        size_px: Resolution S of the base.
        config: Which windows, colours and holes are drawn.

    Attributes:
        nearest: Whether holes are reduced to cells by the pixel in each cell's middle.

    Source: RealFill, arXiv:2309.16668, section 3.3.
    """

    def __init__(self, scene: Scene, size_px: int, config: TrainingConfig) -> None:
        self._scene, self._size_px, self._config = scene, size_px, config
        self.nearest = config.mask_reduction == "nearest"
        self._window = window_of(scene.mask, size_px)
        self._hole = crop_mask(scene.mask, self._window, size_px)
        # Above 1 where the hole is wider than the target's short side.
        self._reach = self._window.side / min(scene.target.shape[-2:])
        self._aligned: list[Window | None] = [None] * len(scene.references)
        if config.align_share:
            self._aligned = windows_in_references(scene, self._window)
        known = crop(scene.target, self._window, size_px)[:, self._hole == 0]
        self._target_colours = _moments(known) if known.shape[1] >= LEAST_KNOWN else None
        self._colours = [self._colours_of(index) for index in range(len(scene.references))]

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A crop of a random photograph, its hole and its weights.

        The conditioning mask of the target is joined with its own hole: what lies in the hole is
        unwanted and must not be seen, and what is known must not always be given.

        Args:
            generator: Source of every random choice, on the CPU.

        Returns:
            Pixels in [0, 1] [3, S, S]; 1 where conditioning is missing [S, S]; 1 where the loss
            counts [S, S].
        """
        references = self._scene.references
        index = int(torch.randint(len(references) + 1, (), generator=generator))
        if index < len(references):
            image, unknown = references[index], torch.zeros(references[index].shape[-2:])
            window = self._reference_window(index, generator)
        else:
            image, unknown = self._scene.target, self._scene.mask
            window = _window(image, generator, 1 / self._config.zoom, self._reach)
        pixels = crop(image, window, self._size_px)
        if index < len(references):
            pixels = self._recoloured(pixels, index, generator)
        own_hole = crop_mask(unknown, window, self._size_px)
        mask = self._mask(generator)
        if self._config.target_union:
            mask = torch.maximum(mask, own_hole)
        return pixels, mask, 1 - own_hole

    def _reference_window(self, index: int, generator: torch.Generator) -> Window:
        config, image, aligned = self._config, self._scene.references[index], self._aligned[index]
        if _by_chance(config.align_share, generator):
            if aligned is not None:
                return _near(aligned, generator)
            # Nobody knows at what size the reference shows the place: at several, then.
            return _window(image, generator, 1 / config.zoom, WIDEST)
        return _window(image, generator, 1 / config.zoom, self._reach)

    def _recoloured(self, pixels: Tensor, index: int, generator: torch.Generator) -> Tensor:
        """A reference's pixels in colours between its own and the target's, varied. [3, S, S]"""
        if self._config.colour_match and self._target_colours is not None:
            share = self._config.colour_match * float(torch.rand((), generator=generator))
            pixels = pixels.lerp(
                _in_colours(pixels, self._colours[index], self._target_colours), share
            )
        if self._config.colour_jitter:
            pixels = _varied(pixels, self._config.colour_jitter, generator)
        return pixels.clamp(0, 1)

    def _colours_of(self, index: int) -> Colours:
        """A reference's, where it shows what the target's window shows, as far as that is known."""
        reference, aligned = self._scene.references[index], self._aligned[index]
        if aligned is not None:
            reference = crop(reference, aligned, self._size_px)
        return _moments(reference.flatten(1))

    def _mask(self, generator: torch.Generator) -> Tensor:
        """The shape of the target's hole, or random rectangles. [S, S]"""
        config = self._config
        if _by_chance(config.hole_share, generator):
            return _moved(self._hole, generator)
        return random_mask(generator, self._size_px, complement_share=config.complement_share)


def draw(base: Base, views: Views, count: int, generator: torch.Generator) -> Draws:
    """Draw crops with replacement, mask them and encode them.

    Args:
        base: The model that encodes.
        views: What to draw from.
        count: Number of draws K.
        generator: Source of every random choice, on the CPU.
    """
    drawn = [views.draw(generator) for _ in range(count)]
    pixels, holes, weights = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    return encode(base, pixels, holes[:, None], weights[:, None], nearest=views.nearest)


def encode(
    base: Base, pixels: Tensor, holes: Tensor, weights: Tensor, *, nearest: bool = False
) -> Draws:
    """Encode crops and their masked selves in batches.

    Args:
        pixels: Crops in [0, 1]. [K, 3, S, S]
        holes: 1 where conditioning is missing. [K, 1, S, S]
        weights: 1 where the loss counts. [K, 1, S, S]
        nearest: Reduce the holes to cells as ``latent_mask`` does when asked so.
    """
    greyed = pixels * (1 - holes) + 0.5 * holes
    latents = torch.cat([base.encode(part) for part in pixels.split(ENCODE_BATCH)])
    masked = torch.cat([base.encode(part) for part in greyed.split(ENCODE_BATCH)])
    # A cell counts only if all of its pixels are known.
    cells = 1 - latent_mask(1 - weights, base.cell_px)
    masks = latent_mask(holes, base.cell_px, nearest=nearest)
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


def _near(window: Window, generator: torch.Generator) -> Window:
    """The window, up to a twelfth larger, smaller or moved."""
    u = torch.rand(3, generator=generator).mul(2).sub(1).tolist()
    side = max(8, round(window.side * 1.08 ** u[0]))
    top, left = (
        round(start + (window.side - side) / 2 + side / 12 * v)
        for start, v in zip((window.top, window.left), u[1:], strict=True)
    )
    return Window(top=top, left=left, side=side)


def _by_chance(probability: float, generator: torch.Generator) -> bool:
    return float(torch.rand((), generator=generator)) < probability


def _in_colours(pixels: Tensor, own: Colours, wanted: Colours) -> Tensor:
    """The pixels with another mean and spread in each channel. [3, S, S]

    Source: Reinhard et al., "Color Transfer between Images", 2001; here in RGB.
    """
    gain = (wanted[1] / own[1]).clamp(1 / MOST_CONTRAST, MOST_CONTRAST)
    return (pixels - own[0]) * gain + wanted[0]


def _moments(values: Tensor) -> Colours:
    """Mean and standard deviation of each channel. [3, N] to [3, 1, 1] twice"""
    spread = values.std(1).clamp(min=LEAST_SPREAD)
    return values.mean(1)[:, None, None], spread[:, None, None]


def _varied(pixels: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Another exposure, gamma and white balance of the pixels. [3, S, S]"""
    draws = amount * (2 * torch.rand(5, generator=generator) - 1)
    gains = torch.exp(draws[0] + 0.3 * draws[1:4])[:, None, None]
    return gains * pixels.clamp(min=1e-4) ** float(torch.exp(draws[4]))


def _window(image: Tensor, generator: torch.Generator, smallest: float, largest: float) -> Window:
    """A random square, inside the image where it fits and around it where it does not."""
    height, width = image.shape[-2:]
    u = torch.rand(3, generator=generator).tolist()
    side = max(8, round(min(height, width) * (smallest + (largest - smallest) * u[0])))
    top, left = (
        round(v * (length - side)) for v, length in zip(u[1:], (height, width), strict=True)
    )
    return Window(top=top, left=left, side=side)
