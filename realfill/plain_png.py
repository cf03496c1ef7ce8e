"""PNGs as most programs write photographs, decoded in a third of Pillow's time."""

from __future__ import annotations

import struct

import numpy as np
from kornia_rs.io import decode_image_png_u8
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Depth, colour type, compression, filter and interlace of three 8-bit colours in rows.
KIND = (8, 2, 0, 0, 0)
# Whatever else a file says may change its colours or turn it, and is Pillow's to read.
CHUNKS = frozenset({b"IHDR", b"IDAT", b"IEND", b"pHYs", b"sRGB", b"gAMA", b"cHRM", b"tIME"})
# kornia-rs lets no other thread run meanwhile: 5 ms for so many pixels. Pillow does.
MOST_PIXELS = 2**19


def read_plain_png(encoded: bytes) -> NDArray[np.uint8] | None:
    """The very numbers that Pillow reads, or None for Pillow to read the file or to refuse it.

    Returns:
        Colours. [H, W, 3]
    """
    size = _plain_size(encoded)
    if size is None or size[0] * size[1] > MOST_PIXELS:
        return None
    try:
        colours: NDArray[np.uint8] = decode_image_png_u8(encoded, size, "rgb")
    except Exception:  # noqa: BLE001  # all that kornia-rs raises, whatever is wrong with the file
        return None
    return colours


def _plain_size(encoded: bytes) -> tuple[int, int] | None:
    """Height and width of a whole file of this kind, None of any other."""
    if encoded[:8] != SIGNATURE or encoded[12:16] != b"IHDR" or len(encoded) < 33:
        return None
    width, height, *kind = struct.unpack_from(">IIBBBBB", encoded, 16)
    if tuple(kind) != KIND:
        return None
    at = len(SIGNATURE)
    while at + 12 <= len(encoded):
        length, chunk = struct.unpack_from(">I4s", encoded, at)
        if chunk not in CHUNKS:
            return None
        at += 12 + length
    return (height, width) if at == len(encoded) else None
