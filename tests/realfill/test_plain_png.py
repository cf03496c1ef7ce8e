"""Plain PNGs: what Pillow reads, sooner, and nothing that Pillow refuses."""

from __future__ import annotations

import random
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from realfill.photographs import decode_bytes
from realfill.plain_png import MOST_PIXELS, SIGNATURE, read_plain_png


def colours_of(height: int, width: int) -> NDArray[np.uint8]:
    """Smooth in part, so that every filter is worth choosing. [H, W, 3]"""
    rng = np.random.default_rng(height * width)
    across = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 50, height)[:, None, None]
    return (across + rng.integers(0, 6, (height, width, 3))).astype(np.uint8)


def encoded(colours: NDArray[np.uint8], **options: object) -> bytes:
    """As Pillow writes it."""
    file = BytesIO()
    Image.fromarray(colours).save(file, "PNG", **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def by_hand(colours: NDArray[np.uint8], filters: list[int], **chunks: bytes) -> bytes:
    """Rows as they would be if they had been filtered so; chunks before and after the data."""
    height, width, _ = colours.shape
    rows = np.concatenate(
        [np.resize(np.array(filters, np.uint8), (height, 1)), colours.reshape(height, -1)], axis=1
    )
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows.tobytes()))
    before, after = chunks.get("before", b""), chunks.get("after", b"")
    return SIGNATURE + header + before + data + after + chunk(b"IEND", b"")


def by_pillow(file: bytes) -> NDArray[np.uint8]:
    """What is to be read. [H, W, 3]"""
    with Image.open(BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (37, 53), (1, 97), (500, 741)])
def test_colours_are_those_that_pillow_reads(height: int, width: int) -> None:
    """Whatever size and filters."""
    colours = colours_of(height, width)
    read = read_plain_png(encoded(colours))
    assert read is not None
    assert (read == colours).all()
    for filters in ([0], [1], [2], [3], [4], [4, 3, 2, 1, 0]):
        file = by_hand(colours, filters)
        read = read_plain_png(file)
        assert read is not None
        assert (read == by_pillow(file)).all()


def test_what_may_change_colours_or_turn_them_is_left_to_pillow() -> None:
    """Other kinds of pixels, a profile, a transparent colour, a text with who knows what."""
    colours = colours_of(20, 30)
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", "a camera")
    turned = Image.Exif()
    turned[0x0112] = 6
    assert read_plain_png(encoded(colours, pnginfo=text)) is None
    assert read_plain_png(encoded(colours, icc_profile=b"profile")) is None
    assert read_plain_png(encoded(colours, transparency=(1, 2, 3))) is None
    assert read_plain_png(encoded(colours, exif=turned)) is None
    assert read_plain_png(encoded(colours[..., 0])) is None
    assert read_plain_png(encoded(np.concatenate([colours, colours[..., :1]], axis=2))) is None
    assert read_plain_png(encoded(colours.astype(np.uint16)[..., 0])) is None
    assert read_plain_png(b"") is None
    interlaced = bytearray(by_hand(colours, [0]))
    interlaced[28] = 1
    assert read_plain_png(bytes(interlaced)) is None


def test_an_orientation_behind_the_data_turns_the_picture() -> None:
    """Where a chunk stands does not matter."""
    turned = Image.Exif()
    turned[0x0112] = 6
    colours = colours_of(20, 30)
    file = by_hand(colours, [0], after=chunk(b"eXIf", turned.tobytes()[6:]))
    assert decode_bytes(file, "it", 10_000).shape == (3, 30, 20)
    plain = decode_bytes(by_hand(colours, [0], before=chunk(b"sRGB", b"\0")), "it", 10_000)
    assert (plain.permute(1, 2, 0).numpy() == colours).all()


def test_a_large_file_is_left_to_pillow() -> None:
    """Which lets other threads run meanwhile."""
    side = int(MOST_PIXELS**0.5)
    assert read_plain_png(encoded(np.zeros((side, side, 3), np.uint8))) is not None
    assert read_plain_png(encoded(np.zeros((side, side + 40, 3), np.uint8))) is None


def test_damage_is_never_read_as_a_picture() -> None:
    """Cut anywhere, or with a bit turned: None, or the very numbers that Pillow reads."""
    file = encoded(colours_of(33, 41))
    chance = random.Random(0)
    damaged = [file[: chance.randrange(len(file))] for _ in range(200)]
    for _ in range(400):
        other = bytearray(file)
        other[chance.randrange(len(file))] ^= 1 << chance.randrange(8)
        damaged.append(bytes(other))
    unread = 0
    for other in damaged:
        read = read_plain_png(other)
        unread += read is None
        if read is not None:
            assert (read == by_pillow(other)).all()
    assert unread > 500
