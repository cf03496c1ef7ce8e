"""Photographs: encoded images of any origin, decoded to pixels.

Everything here may come from a stranger and from many threads at once: the header is checked before
anything is decoded, and no setting of Pillow is changed.
"""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from realfill.errors import InvalidScene
from realfill.plain_png import read_plain_png

MAX_PIXELS = 25_000_000
MIN_SIDE_PX = 16
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF")
# What other files begin with (after the given number of bytes), to call them by name.
FOREIGN_SIGNATURES = (
    (0, b"GIF8", "a GIF"),
    (0, b"BM", "a BMP"),
    (4, b"ftyphei", "a HEIC image"),
    (4, b"ftypmif1", "a HEIC image"),
    (4, b"ftypavif", "an AVIF image"),
    (0, b"%PDF", "a PDF"),
    (0, b"\x00\x00\x01\x00", "an icon"),
)
# What Pillow raises on damaged files, depending on format and place.
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)
# A profile that moves no 8-bit colour further than this is sRGB under another name.
SRGB_TOLERANCE = 2
# Visible pixels that differ less than this are strokes of one colour on a transparent canvas.
ONE_COLOUR_RANGE = 16 / 255
LUMINANCE = (0.299, 0.587, 0.114)

# As they were stored: 8-bit numbers, or numbers in [0, 1] where there were more bits.
Colours = NDArray[np.uint8] | NDArray[np.float32]


def decode_image(encoded: bytes, name: str, max_pixels: int) -> Tensor:
    """Decode a photograph to sRGB, upright, over white.

    Args:
        encoded: The file's bytes.
        name: What messages call it.
        max_pixels: Larger images are refused before they are decoded.

    Returns:
        Pixels in [0, 1]. [3, H, W]

    Raises:
        InvalidScene: Not an allowed image, damaged, animated, too large or too small.
    """
    colours, alpha = _decode(encoded, name, max_pixels)
    return torch.from_numpy(_over_white(colours, alpha))


def decode_bytes(encoded: bytes, name: str, max_pixels: int) -> Tensor:
    """Decode a photograph as ``decode_image`` does, to 8 bits.

    Returns:
        The nearest 8-bit numbers; those of the file, where it holds such. [3, H, W]
    """
    colours, alpha = _decode(encoded, name, max_pixels)
    if alpha is None and colours.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(colours))
    return to_bytes(torch.from_numpy(_over_white(colours, alpha)))


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as 8-bit numbers, to the nearest; exact for images of 8 bits. [3, H, W]"""
    return (pixels * 255).round_().clamp_(0, 255).to(torch.uint8)


def to_pixels(numbers: Tensor) -> Tensor:
    """8-bit numbers as pixels in [0, 1]. [3, H, W]"""
    return numbers.float().div_(255)


def decode_mask(encoded: bytes, name: str, max_pixels: int) -> Tensor:
    """Decode a mask: white is missing, black and transparent are known.

    Strokes of a single colour on a transparent canvas count wherever they are opaque.

    Args:
        encoded: The file's bytes.
        name: What messages call it.
        max_pixels: Larger masks are refused before they are decoded.

    Returns:
        Mask of zeros and ones, from one half on. [H, W]

    Raises:
        InvalidScene: As for `decode_image`.
    """
    colours, alpha = _decode(encoded, name, max_pixels)
    if alpha is None and colours.dtype == np.uint8:
        # Thousandths of whole numbers add up exactly, in float32 too.
        thousandths = np.rint(1000 * np.array(LUMINANCE)).astype(np.float32)
        luminance = colours.transpose(1, 2, 0).astype(np.float32) @ thousandths  # [H, W]
        return torch.from_numpy((luminance >= 1000 * 255 / 2).astype(np.float32))
    colours = _unit_range(colours)
    luminance = np.tensordot(LUMINANCE, colours, axes=1)  # [H, W]
    if alpha is not None and alpha.min() < 1:
        visible = colours[:, alpha >= 0.5]
        if visible.size and np.ptp(visible, axis=1).max() < ONE_COLOUR_RANGE:
            luminance = alpha
        else:
            luminance = luminance * alpha
    return torch.from_numpy((luminance >= 0.5).astype(np.float32))


def _decode(
    encoded: bytes, name: str, max_pixels: int
) -> tuple[Colours, NDArray[np.float32] | None]:
    """Colours [3, H, W] and, where the image has transparency, alpha [H, W] in [0, 1]."""
    image = _open(encoded, name, max_pixels)
    plain = read_plain_png(encoded)
    if plain is not None:
        return plain.transpose(2, 0, 1), None
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _pixels(image, name)
    except DECODING_ERRORS as error:
        raise InvalidScene(
            f"{name} is damaged or incomplete ({error}): export or upload it again."
        ) from error


def _open(encoded: bytes, name: str, max_pixels: int) -> Image.Image:
    """Read the header only, and refuse what must not be decoded."""
    if not encoded:
        raise InvalidScene(f"{name} is empty (0 bytes): export or upload it again.")
    try:
        image = Image.open(BytesIO(encoded), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidScene(
            f"{name} has far more than {max_pixels:,} pixels ({error}): scale it down."
        ) from error
    except UnidentifiedImageError as error:
        raise InvalidScene(_unidentified(encoded, name)) from error
    except DECODING_ERRORS as error:
        raise InvalidScene(
            f"{name} is damaged or incomplete ({error}): export or upload it again."
        ) from error
    _check_header(image, name, max_pixels)
    return image


def _check_header(image: Image.Image, name: str, max_pixels: int) -> None:
    """Refuse by size and frames, before a pixel is decoded."""
    width, height = image.size
    if width * height > max_pixels:
        raise InvalidScene(
            f"{name} is {width}x{height}, {width * height:,} pixels; the limit is {max_pixels:,}:"
            f" scale it to {(max_pixels / (width * height)) ** 0.5:.0%} of its width and height"
            " or less."
        )
    if min(width, height) < MIN_SIDE_PX:
        raise InvalidScene(
            f"{name} is {width}x{height} pixels; each side needs at least {MIN_SIDE_PX}: use a"
            " larger photograph."
        )
    # Pillow calls MPO what many phones write: a JPEG with a second view behind the first.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise InvalidScene(
            f"{name} is animated or has several pages: save the one picture that is meant as PNG."
        )


def _unidentified(encoded: bytes, name: str) -> str:
    """The sentence about bytes that no allowed format claims."""
    for offset, signature, kind in FOREIGN_SIGNATURES:
        if encoded[offset:].startswith(signature):
            return f"{name} is {kind}, whatever its name says: save it as PNG, JPEG, WebP or TIFF."
    return f"{name} is no image, or its beginning is damaged: give a PNG, JPEG, WebP or TIFF file."


def _pixels(image: Image.Image, name: str) -> tuple[Colours, NDArray[np.float32] | None]:
    """Colours and alpha of a decoded image of any mode, as for `_decode`."""
    if image.mode == "F":
        raise InvalidScene(f"{name} holds floating-point samples: save it with 8 or 16 bits.")
    if image.mode.startswith("I"):
        samples = np.array(image, dtype=np.float32)
        if samples.min() < 0 or samples.max() > 65535:
            raise InvalidScene(f"{name} holds 32-bit samples: save it with 8 or 16 bits.")
        samples /= 65535
        return np.stack([samples] * 3), None
    alpha = None
    if image.has_transparency_data:
        # "RGBa" and "La" store colours already multiplied; Pillow divides on the way to "RGBA".
        image = _keeping_profile(image, "RGBA")
        alpha = _unit_range(np.asarray(image.getchannel("A")))
        image = _keeping_profile(image, "RGB")
    elif image.mode in ("1", "P", "PA", "LA", "La", "RGBa", "RGBX"):
        image = _keeping_profile(image, "RGB")
    return np.asarray(_to_srgb(image)).transpose(2, 0, 1), alpha


def _unit_range(colours: Colours) -> NDArray[np.float32]:
    """Bytes as numbers in [0, 1], contiguous in the order of the axes; what is in it stays."""
    scaled = colours.astype(np.float32, order="C")
    if colours.dtype == np.uint8:
        scaled /= 255
    return scaled


def _over_white(colours: Colours, alpha: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Colours in [0, 1] as they look on white paper. [3, H, W]"""
    scaled = _unit_range(colours)
    if alpha is not None:
        scaled *= alpha
        scaled += 1 - alpha
    return scaled


def _keeping_profile(image: Image.Image, mode: str) -> Image.Image:
    """Convert the mode; the ICC profile still describes the colours."""
    converted = image.convert(mode)
    profile = image.info.get("icc_profile")
    if profile:
        converted.info["icc_profile"] = profile
    return converted


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit sRGB by the embedded ICC profile; without a sound one, take it for sRGB."""
    profile = image.info.get("icc_profile")
    if profile:
        try:
            transform = ImageCms.buildTransform(
                ImageCms.ImageCmsProfile(BytesIO(profile)),
                ImageCms.createProfile("sRGB"),
                image.mode,
                "RGB",
            )
            if image.mode != "RGB" or not _is_identity(transform):
                converted = ImageCms.applyTransform(image, transform)
                if converted is not None:
                    return converted
        except (ImageCms.PyCMSError, OSError):
            # Browsers show such a picture as sRGB, and so does everybody who looked at it.
            pass
    return image.convert("RGB")


def _is_identity(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform from RGB leaves colours alone, so that the bytes can stay as they are."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    lattice = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    moved = ImageCms.applyTransform(Image.fromarray(lattice), transform)
    difference = np.asarray(moved, dtype=np.int16) - lattice
    return bool(np.abs(difference).max() <= SRGB_TOLERANCE)
