"""Photographs of every kind that a stranger may send, and files that only claim to be one."""

from __future__ import annotations

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from realfill.errors import InvalidScene
from realfill.photographs import to_bytes
from realfill.scene import load_bytes, load_image, load_mask

ORIENTATION = 0x0112


def _picture(width: int = 32, height: int = 24) -> Image.Image:
    """Red, green, blue and grey quarters."""
    picture = Image.new("RGB", (width, height), (128, 128, 128))
    picture.paste((255, 0, 0), (0, 0, width // 2, height // 2))
    picture.paste((0, 255, 0), (width // 2, 0, width, height // 2))
    picture.paste((0, 0, 255), (0, height // 2, width // 2, height))
    return picture


def _encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _bytes_of(pixels: torch.Tensor) -> np.ndarray:
    """[3, H, W] in [0, 1] as bytes [H, W, 3]."""
    return (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def _png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header promises a size that its few bytes do not hold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_load_image_keeps_every_byte_of_a_lossless_file(kind: str) -> None:
    """Pixels times 255 are the file's bytes."""
    picture = _picture()
    options = {"lossless": True} if kind == "WEBP" else {}

    pixels = load_image(_encode(picture, kind, **options))
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert np.array_equal(_bytes_of(pixels), np.asarray(picture))


def test_load_image_reads_paths_bytes_and_streams_alike(tmp_path: Path) -> None:
    """The three kinds of source give the same pixels."""
    encoded = _encode(_picture())
    (tmp_path / "a.png").write_bytes(encoded)

    pixels = load_image(encoded)
    assert torch.equal(load_image(tmp_path / "a.png"), pixels)
    assert torch.equal(load_image(BytesIO(encoded)), pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_load_image_turns_upright_by_exif(kind: str, orientation: int) -> None:
    """Whatever way the camera was held, the picture comes out as it was seen."""
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    seen = _picture()
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    turned = seen if stored is None else seen.transpose(stored)
    pixels = load_image(_encode(turned, kind, exif=exif.tobytes()))

    assert pixels.shape == (3, 24, 32)
    # The middles of the four quarters, away from the edges that JPEG and WebP smear.
    found = _bytes_of(pixels)[6::12, 8::16].astype(int)
    assert np.abs(found - np.asarray(seen)[6::12, 8::16]).max() < 10


def test_load_image_lays_transparency_over_white() -> None:
    """Opaque stays, transparent turns white, half-transparent black turns grey."""
    picture = Image.new("RGBA", (32, 16), (0, 0, 0, 0))
    picture.paste((10, 20, 30, 255), (0, 0, 8, 16))
    picture.paste((0, 0, 0, 102), (8, 0, 16, 16))
    image = _bytes_of(load_image(_encode(picture)))

    assert image[0, 0].tolist() == [10, 20, 30]
    assert np.array_equal(load_bytes(_encode(picture)).permute(1, 2, 0).numpy(), image)
    assert image[0, 12].tolist() == [153, 153, 153]
    assert image[0, 31].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "P", "CMYK", "LAB", "YCbCr"])
def test_load_image_understands_every_mode(mode: str) -> None:
    """A light picture with a dark half is light and dark in every mode that a file can hold."""
    grey = Image.new("RGB", (32, 16), (255, 255, 255))
    grey.paste((0, 0, 0), (0, 0, 16, 16))
    kind = "TIFF" if mode in ("CMYK", "LAB", "YCbCr") else "PNG"
    encoded = _encode(_lab() if mode == "LAB" else grey.convert(mode), kind)
    image = load_image(encoded)

    assert image.shape == (3, 16, 32)
    assert image[..., :16].max() < 0.02
    assert image[..., 16:].min() > 0.98
    assert torch.equal(load_bytes(encoded), to_bytes(image))


def _lab() -> Image.Image:
    """The same picture in CIE Lab."""
    lab = Image.new("LAB", (32, 16), (255, 128, 128))
    lab.paste((0, 128, 128), (0, 0, 16, 16))
    return lab


def test_load_image_gives_a_palette_its_transparency() -> None:
    """The transparent colour of a palette turns white."""
    picture = Image.new("P", (32, 16), 0)
    picture.putpalette([200, 0, 0, 0, 0, 200])
    picture.paste(1, (0, 0, 16, 16))
    image = _bytes_of(load_image(_encode(picture, transparency=0)))

    assert image[0, 0].tolist() == [0, 0, 200]
    assert image[0, 31].tolist() == [255, 255, 255]


def test_load_image_keeps_the_precision_of_16_bit_grey() -> None:
    """Neighbouring 16-bit levels stay apart."""
    levels = np.full((16, 16), 30000, dtype=np.uint16)
    levels[0, 0] = 30001
    image = load_image(_encode(Image.fromarray(levels)))

    assert image[0, 0, 0].item() == pytest.approx(30001 / 65535, abs=1e-7)
    assert image[2, 1, 1].item() == pytest.approx(30000 / 65535, abs=1e-7)
    assert image[0, 0, 0] > image[0, 1, 1]
    levels[0] = 65535
    assert load_bytes(_encode(Image.fromarray(levels)))[0, :2, 0].tolist() == [255, 117]


def test_load_image_reads_the_first_view_of_an_mpo() -> None:
    """Phones write JPEGs with a second view behind the first; that is no animation."""
    first, second = Image.new("RGB", (32, 16), (200, 0, 0)), Image.new("RGB", (32, 16))
    image = load_image(_encode(first, "MPO", save_all=True, append_images=[second]))

    assert image[0].min() > 0.75


def test_load_image_converts_to_srgb() -> None:
    """A grey of 55 in linear light is a grey of 128 in sRGB."""
    grey = Image.new("RGB", (16, 16), (55, 55, 55))
    image = load_image(_encode(grey, icc_profile=_linear_profile()))

    # Linear 55/255 = 0.2157 is 1.055 * 0.2157^(1/2.4) - 0.055 = 0.502 in sRGB.
    assert image.mean().item() == pytest.approx(0.502, abs=0.006)


def _linear_profile() -> bytes:
    """sRGB's primaries with a linear curve: the curve's table inside the profile is replaced."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    for number in range(count):
        entry = 132 + 12 * number
        tag, offset, _ = struct.unpack(">4sII", profile[entry : entry + 12])
        if tag in (b"rTRC", b"gTRC", b"bTRC"):
            # A parametric curve of kind 0 has one number, its exponent: 1.0 in 16.16 fixed point.
            profile[offset : offset + 16] = b"para" + bytes(8) + struct.pack(">I", 0x10000)
    return bytes(profile)


@pytest.mark.parametrize("profile", ["sRGB", "damaged"])
def test_load_image_keeps_bytes_where_there_is_nothing_to_convert(profile: str) -> None:
    """An sRGB profile, or one that cannot be read, leaves every byte as it is."""
    sound = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    encoded = _encode(
        Image.fromarray(noise), icc_profile=sound if profile == "sRGB" else sound[:200]
    )

    assert np.array_equal(_bytes_of(load_image(encoded)), noise)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_load_image_refuses_a_truncated_file(kind: str, share: float) -> None:
    """A torn upload is called damaged, wherever it was torn."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    encoded = _encode(Image.fromarray(noise), kind)
    with pytest.raises(InvalidScene, match=r"photo\.png (is|has) .*(damaged|incomplete)"):
        load_image(encoded[: int(len(encoded) * share)], label="photo.png")


def test_load_image_refuses_thirty_megapixels_by_the_header() -> None:
    """The number, the limit and the remedy are named, and nothing is decoded."""
    with pytest.raises(InvalidScene, match=r"6000x5000, 30,000,000 pixels.*25,000,000.*to 91%"):
        load_image(_png_claiming(6000, 5000))


@pytest.mark.parametrize("side", [10_000, 40_000])
def test_load_image_refuses_sizes_that_pillow_itself_fears(side: int) -> None:
    """Where Pillow warns or raises by itself, it is still our error."""
    with pytest.raises(InvalidScene, match=r"25,000,000.*scale it"):
        load_image(_png_claiming(side, side))


def test_load_image_limit_can_be_moved() -> None:
    """A service may allow less."""
    with pytest.raises(InvalidScene, match=r"768 pixels; the limit is 700"):
        load_image(_encode(_picture()), max_pixels=700)
    assert load_image(_encode(_picture()), max_pixels=768).shape == (3, 24, 32)


@pytest.mark.parametrize(
    "encoded,message",
    [
        (_encode(_picture(), "GIF"), r"a GIF, whatever its name says: save it as PNG"),
        (_encode(_picture(), "BMP"), r"a BMP"),
        (b"\0\0\0\x18ftypheic" + bytes(64), r"a HEIC"),
        (b"%PDF-1.7", r"a PDF"),
        (b"<html>not found</html>", r"no image"),
        (b"", r"empty \(0 bytes\)"),
        (_png_claiming(0, 0), r"0x0|no image|damaged"),
        (_encode(Image.new("RGB", (400, 15))), r"400x15 pixels; each side needs at least 16"),
        (_encode(Image.new("F", (16, 16)), "TIFF"), r"floating-point"),
        (
            _encode(Image.fromarray(np.full((16, 16), 70000, np.int32)), "TIFF"),
            r"32-bit samples",
        ),
    ],
)
def test_load_image_refuses_what_is_no_photograph(encoded: bytes, message: str) -> None:
    """Content decides, not the name; each case has its sentence."""
    with pytest.raises(InvalidScene, match=message) as caught:
        load_image(encoded, label="holiday.png")
    assert str(caught.value).startswith("holiday.png ")
    assert caught.value.code == "invalid_scene"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_load_image_refuses_animations_and_pages(kind: str) -> None:
    """Which of several pictures is meant is for the user to say."""
    encoded = _encode(_picture(), kind, save_all=True, append_images=[Image.new("RGB", (32, 24))])
    with pytest.raises(InvalidScene, match=r"animated or has several pages"):
        load_image(encoded)


def test_load_image_works_from_many_threads() -> None:
    """Sixteen threads that decode good and bad files get what each would get alone."""
    good, bad = _encode(_picture(), "JPEG"), _encode(_picture(), "PNG")[:-40]
    expected = load_image(good)

    def attempt(number: int) -> bool:
        if number % 3:
            return torch.equal(load_image(good), expected)
        with pytest.raises(InvalidScene):
            load_image(bad)
        return True

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(attempt, range(96)))


def test_load_mask_takes_white_for_missing() -> None:
    """From one half on a value counts as missing."""
    levels = np.zeros((16, 16), np.uint8)
    levels[0, :4] = [127, 128, 200, 255]

    mask = load_mask(_encode(Image.fromarray(levels)), (16, 16))
    assert mask[0, :4].tolist() == [0, 1, 1, 1]
    assert mask.sum() == 3


def test_load_mask_ignores_what_is_transparent() -> None:
    """White under full transparency is not missing, opaque black is not either."""
    picture = Image.new("RGBA", (32, 16), (255, 255, 255, 0))
    picture.paste((255, 255, 255, 255), (0, 0, 8, 16))
    picture.paste((0, 0, 0, 255), (8, 0, 16, 16))
    mask = load_mask(_encode(picture), None)

    assert mask[0].tolist() == [1.0] * 8 + [0.0] * 24


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 30, 40)])
def test_load_mask_takes_strokes_on_a_transparent_canvas(colour: tuple[int, int, int]) -> None:
    """Strokes of one colour count where they are opaque, whatever the colour."""
    picture = Image.new("RGBA", (32, 16), (0, 0, 0, 0))
    picture.paste((*colour, 255), (0, 0, 8, 16))
    picture.paste((*colour, 90), (8, 0, 10, 16))
    mask = load_mask(_encode(picture), (16, 32))

    assert mask[0].tolist() == [1.0] * 8 + [0.0] * 24


def test_load_mask_reads_opaque_rgba_by_its_colour() -> None:
    """An alpha channel that is opaque everywhere says nothing."""
    picture = Image.new("RGBA", (32, 16), (0, 0, 0, 255))
    picture.paste((255, 255, 255, 255), (0, 0, 8, 16))

    assert load_mask(_encode(picture), (16, 32)).sum() == 8 * 16


def test_load_mask_is_turned_by_exif_as_photographs_are() -> None:
    """A mask that was painted on a turned photograph lies where it was painted."""
    seen = Image.new("L", (32, 16))
    seen.paste(255, (0, 0, 8, 16))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    stored = _encode(seen.transpose(Image.Transpose.ROTATE_90), exif=exif.tobytes())

    assert load_mask(stored, (16, 32))[:, :8].min() == 1
