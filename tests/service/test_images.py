"""Images in and out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from realfill.photographs import to_bytes, to_pixels
from service.errors import ImageTooLarge
from service.images import encode, read_image, read_mask
from service.schemas import ImageFormat
from tests.fakes import decoded, encoded, hole, photo


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_lossless_formats_return_every_byte(image_format: ImageFormat) -> None:
    """What was uploaded, read, and written again is the same picture."""
    numbers = read_image(encoded(photo()), max_pixels=10_000)
    assert np.array_equal(decoded(encode(numbers, image_format)), photo())


def test_jpeg_is_close() -> None:
    """High quality and no chroma subsampling, on a smooth picture."""
    ramp = torch.linspace(0, 255, 64).to(torch.uint8).expand(3, 48, 64).contiguous()
    written = decoded(encode(ramp, "jpeg")).astype(int)
    assert np.abs(written - ramp.permute(1, 2, 0).numpy()).max() <= 3


def test_bytes_and_pixels_are_inverse() -> None:
    """All 256 values survive."""
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(to_pixels(values)), values)


def test_a_mask_is_true_where_white() -> None:
    """Half and above is missing."""
    mask = read_mask(encoded(hole()), max_pixels=10_000)
    assert torch.equal(mask, torch.from_numpy(hole() > 0))


def test_one_pixel_above_the_limit_is_too_large() -> None:
    """The limit itself is allowed."""
    assert read_image(encoded(photo(50, 40)), max_pixels=2000).shape == (3, 40, 50)
    with pytest.raises(ImageTooLarge, match="'image' is 50x40, 2000 pixels, above the limit"):
        read_image(encoded(photo(50, 40)), max_pixels=1999)
