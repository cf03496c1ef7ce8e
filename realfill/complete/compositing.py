"""Compositing: what sampling put into the hole goes over the target, and nothing else changes.

The model sees a square window of the target at its own resolution; the candidates come back at the
target's resolution. Beyond the feather a candidate is bit-identical to the target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.ndimage import distance_transform_cdt
from torch import Tensor

from realfill.complete.windows import EMPTY, Window, extents_of, resized, to_floats
from realfill.errors import InvalidScene
from realfill.masks import dilate

# Known pixels around the hole that the colour fit looks at, and the gains it may answer with.
RING_PX = 16
GAIN_BOUNDS = (0.5, 2.0)


def composite(
    samples: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    feather_px: int,
    match_colour: bool = False,
) -> Tensor:
    """Paste the filled region of each sample over the target.

    Args:
        samples: Decoded images in [0, 1]. [N, 3, H, W]
        target: Image to complete, in [0, 1]. [3, H, W]
        mask: 1 where pixels are missing, else 0. [H, W]
        feather_px: Width of the blend around the mask, on the known side only.
        match_colour: Fit a gain and a bias per channel to the known pixels around the hole first.

    Returns:
        Candidates, equal to the target beyond the feather. [N, 3, H, W]

    Raises:
        InvalidScene: Sizes differ, the mask is empty, or the feather is negative.

    Source: RealFill, arXiv:2309.16668.
    """
    if samples.shape[1:] != target.shape or target.shape[-2:] != mask.shape:
        raise InvalidScene(
            f"Samples {list(samples.shape)}, target {list(target.shape)} and mask"
            f" {list(mask.shape)} differ in size: bring them to one height and width."
        )
    blend = Blend.around(mask, feather_px)
    return blend.of(_match_colour(samples, target, mask) if match_colour else samples, target)


@dataclass(frozen=True)
class Blend:
    """How candidates pass from samples to the target around one mask, found before any is there.

    Attributes:
        alpha: Weight of the sample, 1 in the hole and 0 beyond the feather. [H, W]
    """

    alpha: Tensor

    @staticmethod
    def around(mask: Tensor, feather_px: int) -> Blend:
        """The blend of a mask and a feather; arguments and errors as for ``composite``.

        A mask on a GPU is waited for.
        """
        if feather_px < 0:
            raise InvalidScene(f"The feather is {feather_px} px wide: give 0 or more.")
        if not mask.any():
            raise InvalidScene(EMPTY)
        return Blend(_alpha(mask, feather_px))

    def of(self, samples: Tensor, target: Tensor) -> Tensor:
        """Candidates of samples, on their device. [N, 3, H, W] and [3, H, W] to [N, 3, H, W]"""
        target, alpha = target.to(samples), self.alpha.to(samples)
        # Selecting, not only weighting, keeps known pixels even where a sample is not finite.
        return torch.where(alpha > 0, torch.lerp(target, samples, alpha), target)


def _alpha(mask: Tensor, feather_px: int) -> Tensor:
    """Weight of the sample: 1 on the hole and one pixel around it, 0 beyond the feather. [H, W]"""
    if feather_px == 0:
        return mask
    known = (mask == 0).cpu().numpy()
    # Of every pixel to the hole, by steps to any of the eight neighbours.
    distance = torch.from_numpy(distance_transform_cdt(known, metric="chessboard")).to(mask)
    return (feather_px + 1 - distance.clamp(min=1)).clamp(min=0) / feather_px


def _match_colour(samples: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Least-squares gain and bias per sample and channel, fit on the ring of known pixels."""
    ring = (dilate(mask, RING_PX) - mask).bool()
    if not ring.any():
        return samples
    seen, wanted = samples[..., ring], target[..., ring]  # [N, 3, pixels], [3, pixels]
    seen_mean, wanted_mean = seen.mean(-1, keepdim=True), wanted.mean(-1, keepdim=True)
    covariance = ((seen - seen_mean) * (wanted - wanted_mean)).mean(-1, keepdim=True)
    variance = (seen - seen_mean).square().mean(-1, keepdim=True)
    # A flat ring says nothing about the gain: shift only.
    gain = torch.where(variance > 1e-4, covariance / variance.clamp(min=1e-4), 1.0)
    gain = gain.clamp(*GAIN_BOUNDS)
    shifted = (samples - seen_mean[..., None]) * gain[..., None] + wanted_mean[..., None]
    return shifted.clamp(0, 1)


def paste(
    samples: Tensor,
    window: Window,
    target: Tensor,
    mask: Tensor,
    feather_px: int,
    *,
    match_colour: bool = False,
) -> Tensor:
    """Bring samples of a window back to the target's own resolution and composite them there.

    Args:
        samples: Decoded images of the window, in [0, 1]. [N, 3, S, S]
        window: Where they belong; it covers the hole.
        target: Image to complete, in [0, 1]. [3, H, W]
        mask: 1 where pixels are missing, else 0. [H, W]
        feather_px: Width of the blend in pixels of the target; narrower where the window ends.
        match_colour: As in `composite`.

    Returns:
        Candidates, equal to the target beyond the feather. [N, 3, H, W]

    Raises:
        InvalidScene: The mask is empty or the window does not cover the hole.
    """
    patch = Patch.around(window, mask, feather_px, match_colour=match_colour)
    candidates = target.expand(len(samples), -1, -1, -1).clone()
    candidates[..., patch.rows, patch.columns] = patch.of(samples, target)
    return candidates


@dataclass(frozen=True)
class Patch:
    """The part of a target that samples of a window change, found before any sample is there.

    Attributes:
        rows: Of the target; elsewhere a candidate is the target.
        columns: Likewise.
        blend: Of the part.
        ring: The part's mask, if colours are to be matched around it. [h, w]
    """

    window: Window
    rows: slice
    columns: slice
    blend: Blend
    ring: Tensor | None = None

    @staticmethod
    def around(
        window: Window, mask: Tensor, feather_px: int, *, match_colour: bool = False
    ) -> Patch:
        """The part that a mask and its feather reach over; arguments and errors as for ``paste``.

        Args:
            mask: True, or 1, where pixels are missing. [H, W]
        """
        height, width = mask.shape
        extent_down, extent_across = extents_of(mask)
        # The colour fit needs its ring, the blend its feather; nothing further out is touched.
        pad = max(feather_px, RING_PX if match_colour else 0)
        top, bottom, room_down = _span(extent_down, window.top, window.side, height, pad)
        left, right, room_across = _span(extent_across, window.left, window.side, width, pad)
        rows, columns = slice(top, bottom), slice(left, right)
        part = mask[rows, columns].float()
        blend = Blend.around(part, min(feather_px, room_down, room_across))
        return Patch(window, rows, columns, blend, part if match_colour else None)

    def of(self, samples: Tensor, target: Tensor) -> Tensor:
        """What candidates hold there, in [0, 1].

        Args:
            samples: Decoded images of the window, in [0, 1]. [N, 3, S, S]
            target: Pixels in [0, 1], or 8-bit numbers. [3, H, W]

        Returns:
            [N, 3, h, w]
        """
        window = self.window
        rows = slice(self.rows.start - window.top, self.rows.stop - window.top)
        columns = slice(self.columns.start - window.left, self.columns.stop - window.left)
        native = _resized_part(samples, window.side, rows, columns)
        part = to_floats(target[:, self.rows, self.columns])
        if self.ring is not None:
            native = _match_colour(native, part, self.ring.to(samples.dtype))
        return self.blend.of(native, part)


def _resized_part(samples: Tensor, side: int, rows: slice, columns: slice) -> Tensor:
    """A part of samples after an antialiased bicubic resize to a side, within [0, 1].

    One axis after the other, that of which less is wanted first: a part of a long image has far
    fewer pixels than the square.

    Returns:
        [N, 3, h, w]
    """
    size = samples.shape[-1]
    if size == side:
        return samples[..., rows, columns]
    for axis in sorted((-1, -2), key=lambda axis: _length(columns if axis == -1 else rows)):
        if axis == -1:
            samples = resized(samples, samples.shape[-2], side, "bicubic")[..., columns]
        else:
            samples = resized(samples, side, samples.shape[-1], "bicubic")[..., rows, :]
    return samples.clamp(0, 1)


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _span(
    hole: tuple[int, int], start: int, side: int, length: int, pad: int
) -> tuple[int, int, int]:
    """Along one axis: begin and end of what is pasted, and the known pixels the feather may use.

    A feather that a window's edge cuts off inside the image would be a seam; at the image's own
    border there is nothing to blend with, so the room there is unlimited.
    """
    low, high = max(start, 0), min(start + side, length)
    if hole[0] < low or hole[1] > high:
        raise InvalidScene(
            f"The window covers pixels {low} to {high} of {length}, the hole {hole[0]} to"
            f" {hole[1]}: take the window from window_of(mask, size_px)."
        )
    room_before = hole[0] - low if low > 0 else length
    room_after = high - hole[1] if high < length else length
    return max(low, hole[0] - pad), min(high, hole[1] + pad), min(room_before, room_after)
