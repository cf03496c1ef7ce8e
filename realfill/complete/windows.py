"""Windows: the square of an image that the model sees, cut out and shrunk, with its mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from realfill.errors import InvalidScene
from realfill.photographs import MAX_PIXELS, to_pixels

EMPTY = "The mask is empty, so there is nothing to fill: mark the hole with 1."


@dataclass(frozen=True)
class Window:
    """A square of the target, in its pixels; it may reach beyond the image."""

    top: int
    left: int
    side: int


def window_of(mask: Tensor, size_px: int) -> Window:
    """Choose the square that the model sees: the hole with as much context as possible.

    The side is the image's short side, as in training, or what the hole with a rim of context
    needs, but never more than the long side. The window stays inside the image where it fits.

    Args:
        mask: 1 where pixels are missing, else 0. [H, W]
        size_px: Resolution of the base; the rim is at least an eighth of it, at most 16 px of it.

    Raises:
        InvalidScene: The mask is empty, or the window so much longer than the image is wide that a
            strip of it would be too large.
    """
    rows, columns = extents_of(mask)
    hole = max(rows[1] - rows[0], columns[1] - columns[0])
    rim = min(16, size_px // 8)
    with_rim = -(-hole * size_px // (size_px - 2 * rim))  # rounded up
    height, width = mask.shape
    side = min(max(height, width), max(min(height, width), with_rim))
    if side * size_px > MAX_PIXELS:
        raise InvalidScene(
            f"The hole in the image of {width}x{height} pixels needs a window of {side} pixels a "
            f"side, and this base takes {MAX_PIXELS // size_px}: crop the image around the hole, "
            "or scale it down."
        )
    return Window(_start(rows, side, height), _start(columns, side, width), side)


def extents_of(mask: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns that the hole reaches over; refused where there is none."""
    rows, columns = mask.any(dim=1), mask.any(dim=0)
    if not rows.any():
        raise InvalidScene(EMPTY)
    return _extent(rows), _extent(columns)


def _extent(line: Tensor) -> tuple[int, int]:
    """First and one past the last true element. [L]"""
    places = line.nonzero()
    return int(places[0]), int(places[-1]) + 1


def _start(extent: tuple[int, int], side: int, length: int) -> int:
    """Where `side` pixels begin that are centred on `extent` and, if they can, stay inside."""
    if side >= length:
        return -((side - length) // 2)
    return min(max((sum(extent) - side) // 2, 0), length - side)


def crop(image: Tensor, window: Window, size_px: int) -> Tensor:
    """Cut the window out of an image and resize it, antialiased.

    Beyond the image its border pixels repeat; `crop_mask` calls them missing.

    Args:
        image: Pixels in [0, 1], or 8-bit numbers. [3, H, W]
        window: What to cut out.
        size_px: Side of the answer.

    Returns:
        Pixels in [0, 1]. [3, size_px, size_px]
    """
    return _seen(to_floats(_cut(image, window)), image, window, size_px).clamp(0, 1)


def crop_mask(mask: Tensor, window: Window, size_px: int) -> Tensor:
    """Cut the window out of a mask and resize it so that no missing pixel counts as known.

    A pixel of the answer is missing if a missing pixel, or one beyond the image, has any weight in
    the same pixel of `crop`: nothing of the hole's old content leaks into the known region.

    Args:
        mask: True, or 1, where pixels are missing. [H, W]
        window: What to cut out.
        size_px: Side of the answer.

    Returns:
        Mask of zeros and ones. [size_px, size_px]
    """
    seen = _seen(_cut(mask[None], window).float(), mask, window, size_px, beyond=1.0)[0]
    return (seen > 0).float()


def _cut(planes: Tensor, window: Window) -> Tensor:
    """What there is of the window, at least a line of each border. [C, H, W] to [C, h, w]"""
    (top, bottom), (left, right) = _inside(planes, window)
    return planes[:, top:bottom, left:right]


def _inside(image: Tensor, window: Window) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of the window that are in the image, at least the nearest one."""
    height, width = image.shape[-2:]
    return _clipped(window.top, window.side, height), _clipped(window.left, window.side, width)


def _clipped(start: int, side: int, length: int) -> tuple[int, int]:
    return min(max(start, 0), length - 1), min(max(start + side, 1), length)


def _seen(
    cut: Tensor, image: Tensor, window: Window, size_px: int, beyond: float | None = None
) -> Tensor:
    """The window of an image, shrunk.

    Of a long image the window is much larger than what there is of it: one axis after the other,
    the one that reaches beyond the image last, nothing ever has as many pixels as the window.

    Args:
        cut: What there is of it. [C, h, w]
        beyond: What lies beyond the image; None for its border, repeated.

    Returns:
        [C, size_px, size_px]
    """
    if cut.shape[-2:] == (window.side, window.side):
        return _shrink(cut, size_px, size_px)
    starts = {-1: window.left, -2: window.top}
    for axis in sorted(starts, key=lambda axis: (cut.shape[axis] < window.side, -axis)):
        length = image.shape[axis]
        line = torch.arange(window.side, device=cut.device) + starts[axis]
        first, _ = _clipped(starts[axis], window.side, length)
        cut = cut.index_select(axis, line.clamp(0, length - 1) - first)
        if beyond is not None:
            outside = ((line < 0) | (line >= length)).nonzero()[:, 0]
            cut = cut.index_fill(axis, outside, beyond)
        rows, columns = cut.shape[-2:]
        cut = _shrink(cut, *((rows, size_px) if axis == -1 else (size_px, columns)))
    return cut


def _shrink(planes: Tensor, rows: int, columns: int) -> Tensor:
    """Antialiased bilinear resize: its weights are never negative. [C, rows, columns]"""
    return resized(planes[None], rows, columns, "bilinear")[0]


def to_floats(image: Tensor) -> Tensor:
    """Pixels in [0, 1] of such, or of 8-bit numbers."""
    return to_pixels(image) if image.dtype == torch.uint8 else image


def resized(planes: Tensor, rows: int, columns: int, mode: str) -> Tensor:
    """Antialiased. [N, C, h, w] to [N, C, rows, columns]"""
    if planes.shape[-1] == columns == 1:
        # Columns of which there is one, and stays one, torch 2.13 resizes wrongly on a CPU.
        return F.interpolate(planes.mT, (columns, rows), mode=mode, antialias=True).mT
    return F.interpolate(planes, (rows, columns), mode=mode, antialias=True)
