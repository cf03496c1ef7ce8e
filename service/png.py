"""PNG, written as fast as an answer should be.

Pillow tries five filters on every row and packs with zlib: 42 ms of a photograph of 741x500 pixels
on one core of Zen 3, where sampling it takes 90. Here every row has the same filter, which NumPy
applies to the whole picture at once, and ISA-L packs: 8 ms, for files that are a tenth larger.

Source: W3C, Portable Network Graphics (PNG) Specification, third edition, sections 5 and 9.
"""

from __future__ import annotations

import struct

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Eight bits of red, green and blue; the only ways to compress and to filter; not interlaced.
FORMAT = (8, 2, 0, 0, 0)
# The mean of the pixels to the left and above. Of filters without a choice in every pixel it leaves
# the least of a photograph.
AVERAGE = 3
# On a photograph level 2 saves no byte in a hundred more, and level 3 takes a third longer.
LEVEL = 1


def write_png(colours: NDArray[np.uint8]) -> bytes:
    """A picture as a file, without metadata.

    Args:
        colours: Of sRGB. [H, W, 3]
    """
    height, width, _ = colours.shape
    left, above = np.zeros_like(colours), np.zeros_like(colours)
    left[:, 1:], above[1:] = colours[:, :-1], colours[:-1]
    rows = np.empty((height, 1 + 3 * width), np.uint8)
    rows[:, 0] = AVERAGE
    # Half of the sum, rounded down, without an overflow.
    foretold = (left & above) + ((left ^ above) >> 1)
    rows[:, 1:] = (colours - foretold).reshape(height, -1)
    packed = isal_zlib.compress(rows.data.cast("B"), LEVEL)
    header = struct.pack(">IIBBBBB", width, height, *FORMAT)
    chunks = ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    return SIGNATURE + b"".join(_chunk(kind, body) for kind, body in chunks)


def _chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of the file: length, kind, body and check value."""
    check = isal_zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)
