"""Pictures to latents and back, so that their number does not show in any of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from realfill.base import Base
from service.engine.captures import Captures

# Pictures in one call, where several are quicker than one by one.
AT_ONCE = 4


class Pictures(Protocol):
    """The autoencoder's two ways."""

    def warm_up(self) -> None:
        """Do beforehand what the first picture would wait for."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of a picture in [0, 1]. [1, 3, S, S] to [1, C, h, w]"""
        ...

    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """Pictures in [0, 1] of one or more latents. [C, h, w] each to [N, 3, S, S]"""
        ...

    def release(self) -> None:
        """Give memory back; nothing can be encoded or decoded afterwards."""
        ...


class LoosePictures:
    """Always so many at once, the last repeated where there are fewer: they round by their number.

    Args:
        base: The resident model.
        one_by_one: Whether each is decoded in a call of its own.
    """

    def __init__(self, base: Base, *, one_by_one: bool) -> None:
        self._base, self._at_once = base, 1 if one_by_one else AT_ONCE

    def warm_up(self) -> None:
        """Nothing to do; see ``Pictures``, also for the others."""

    def encode(self, pixels: Tensor) -> Tensor:
        """By the base."""
        return self._base.encode(pixels)

    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """By the base, in calls of one size."""
        size = min(self._at_once, len(latents))
        filled = [*latents, *[latents[-1]] * (-len(latents) % size)]
        batches = [torch.stack(filled[k : k + size]) for k in range(0, len(filled), size)]
        return torch.cat([self._base.decode(batch) for batch in batches])[: len(latents)]

    def release(self) -> None:
        """Nothing to do."""


class StaticPictures:
    """One at a time in fixed memory, which a CUDA graph can replay.

    One picture fills a GPU, or nearly: sixteen take as long as in batches of four, and one does not
    take as long as four.

    Args:
        base: The resident model, its autoencoder fused.
        captures: Of its device.
    """

    def __init__(self, base: Base, captures: Captures) -> None:
        self._base, self._captures = base, captures
        pixels = (1, 3, base.size_px, base.size_px)
        side = base.size_px // base.cell_px
        device, shape = base.device, (1, base.latent_channels, side, side)
        self._pixels, self._decoded = (torch.zeros(pixels, device=device) for _ in "ab")
        self._latents = torch.zeros(shape, device=device)
        self._encoded = torch.zeros(shape, device=device, dtype=base.dtype)
        self._ways: dict[str, Callable[[], None]] = {}

    def warm_up(self) -> None:
        """Capture both ways, unless that is done."""
        for way in (self._encode, self._decode):
            if way.__name__ not in self._ways:
                self._ways[way.__name__] = self._captures.of(way)

    def encode(self, pixels: Tensor) -> Tensor:
        """By what was captured; see ``Pictures``."""
        self.warm_up()
        self._pixels.copy_(pixels)
        self._ways["_encode"]()
        return self._encoded.clone()

    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """By what was captured, one after the other."""
        self.warm_up()
        shape = (len(latents), *self._decoded.shape[1:])
        pictures = torch.empty(shape, device=self._decoded.device)
        for of_one, picture in zip(latents, pictures, strict=True):
            self._latents.copy_(of_one)
            self._ways["_decode"]()
            picture.copy_(self._decoded[0])
        return pictures

    def release(self) -> None:
        """Give the graphs' memory back."""
        self._captures.finish()
        self._ways.clear()

    def _encode(self) -> None:
        self._encoded.copy_(self._base.encode(self._pixels))

    def _decode(self) -> None:
        self._decoded.copy_(self._base.decode(self._latents))
