"""Uploaded images in, encoded candidates out; for worker threads, never for the event loop."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image
from torch import Tensor

from realfill.photographs import DECODING_ERRORS, FORMATS
from realfill.scene import check_size, load_bytes, load_mask
from service.errors import ImageTooLarge
from service.png import write_png
from service.schemas import ImageFormat

MEDIA_TYPES: dict[str, ImageFormat] = {
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/webp": "webp",
}
# What messages call them.
IMAGE, MASK = "The field 'image'", "The field 'mask'"
# A candidate is read once: time counts for more than size. JPEG without chroma subsampling; WebP
# lossless, as PNG is.
_SAVE_OPTIONS: dict[ImageFormat, dict[str, object]] = {
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"lossless": True, "quality": 20, "method": 1},
}


def read_image(encoded: bytes, *, max_pixels: int) -> Tensor:
    """Decode the field ``image``.

    Returns:
        8-bit pixels, a quarter of the memory of floats while the request waits. [3, H, W]

    Raises:
        ImageTooLarge: It has more pixels than the limit.
        InvalidScene: It is no image of an allowed format, or damaged.
    """
    _check_pixels(encoded, "image", max_pixels)
    return load_bytes(encoded, max_pixels=max_pixels, label=IMAGE)


def read_mask(encoded: bytes, *, max_pixels: int) -> Tensor:
    """Decode the field ``mask``: white (or opaque) is missing.

    Args:
        encoded: The uploaded file.
        max_pixels: Limit, as for the image.

    Returns:
        Mask, true where pixels are missing. [H, W]

    Raises:
        ImageTooLarge: It has more pixels than the limit.
        InvalidScene: It is no image, empty or full.
    """
    _check_pixels(encoded, "mask", max_pixels)
    return load_mask(encoded, None, max_pixels=max_pixels, label=MASK).bool()


def check_fit(image: Tensor, mask: Tensor) -> None:
    """Refuse a mask that is not as large as its image. [3, H, W] and [H, W]

    Raises:
        InvalidScene: It is of another size.
    """
    check_size(MASK, mask, tuple(image.shape[-2:]))


def encode(numbers: Tensor, image_format: ImageFormat) -> bytes:
    """Write an image, in sRGB and without metadata.

    Args:
        numbers: 8-bit pixels. [3, H, W]
        image_format: png and webp keep every bit, jpeg does not.
    """
    colours = np.stack(list(numbers.numpy()), axis=-1)
    if image_format == "png":
        return write_png(colours)
    picture = Image.fromarray(colours, "RGB")
    encoded = BytesIO()
    picture.save(encoded, image_format.upper(), **_SAVE_OPTIONS[image_format])
    return encoded.getvalue()


def _check_pixels(encoded: bytes, field: str, max_pixels: int) -> None:
    """Look at the header alone; whatever else is wrong with the file, its decoder will say."""
    try:
        with Image.open(BytesIO(encoded), formats=FORMATS) as image:
            width, height = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(
            f"The field {field!r} has far more than the limit of {max_pixels} pixels: "
            "send a smaller image."
        ) from error
    except DECODING_ERRORS:
        return
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"The field {field!r} is {width}x{height}, {width * height} pixels, above the limit "
            f"of {max_pixels}: send a smaller image, or raise REALFILL_MAX_PIXELS."
        )
