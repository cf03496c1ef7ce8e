"""Pictures and latents do not depend on how many are made, nor on the memory they are made in."""

from __future__ import annotations

import pytest
import torch

from service.engine.captures import Captures
from service.engine.pictures import LoosePictures, Pictures, StaticPictures
from tests.tiny import tiny_base


@pytest.mark.parametrize("kind", ["one by one", "four at once", "static"])
def test_a_picture_does_not_depend_on_the_number(kind: str) -> None:
    """Five are what the base makes of each, and stay what they are when others are made."""
    base = tiny_base()
    pictures: Pictures = LoosePictures(base, one_by_one=kind == "one by one")
    if kind == "static":
        pictures = StaticPictures(base, Captures(base.device))
    pictures.warm_up()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(5, 4, 4, 4, generator=generator).unbind()
    pixels = torch.rand(2, 1, 3, 32, 32, generator=generator)
    decoded, encoded = pictures.decode(latents), pictures.encode(pixels[0])
    kept = decoded.clone(), encoded.clone()
    pictures.encode(pixels[1])
    for latent, picture in zip(latents, decoded, strict=True):
        torch.testing.assert_close(picture, base.decode(latent[None])[0], rtol=0, atol=1e-5)
        # Of four at once it depends on its neighbours' number, which is always the same.
        if kind != "four at once":
            assert torch.equal(pictures.decode([latent])[0], picture)
    torch.testing.assert_close(encoded, base.encode(pixels[0]), rtol=0, atol=1e-5)
    assert torch.equal(decoded, kept[0])
    assert torch.equal(encoded, kept[1])
    pictures.release()


@pytest.mark.gpu
def test_a_captured_picture_is_what_it_is_without_a_graph() -> None:
    """And both ways are captured once."""
    base = tiny_base()
    base.autoencoder.to("cuda")
    base.unet.to("cuda")
    captures = Captures(base.device)
    pictures = StaticPictures(base, captures)
    latents = torch.randn(3, 4, 4, 4, device="cuda").unbind()
    pixels = torch.rand(1, 3, 32, 32, device="cuda")
    for _ in range(2):
        decoded, encoded = pictures.decode(latents), pictures.encode(pixels)
    plain = torch.cat([base.decode(latent[None]) for latent in latents])
    torch.testing.assert_close(decoded, plain, rtol=0, atol=1e-3)
    torch.testing.assert_close(encoded, base.encode(pixels), rtol=0, atol=1e-3)
    assert captures.count == 2
    pictures.release()
