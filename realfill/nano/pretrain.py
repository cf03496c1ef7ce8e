"""The recipe of nano: every stage from nothing to the weights in the package.

Pictures, autoencoder, calibrated latents, denoiser with text encoder, decoder polish, matcher,
export. Each stage keeps checkpoints in the work folder and goes on from them; the same seed and
versions give the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC

from realfill.base import NANO_FOLDER, PAPER_TEXT_MODULES, Base, fingerprint_of, save_base
from realfill.nano.autoencoder import (
    calibrate,
    motorcycle_crops,
    new_autoencoder,
    train_autoencoder,
)
from realfill.nano.denoiser import (
    ADAPTER_MODULES,
    SIZE_PX,
    Triples,
    encode_triples,
    new_denoiser,
    new_scheduler,
    new_text_encoder,
    train_denoiser,
)
from realfill.nano.pool import picture_pool
from realfill.nano.pretrain_matcher import export_matcher, new_matcher, train_matcher, worlds
from realfill.nano.stage import Step
from realfill.nano.tokenizer import byte_tokenizer
from realfill.rank.matching import NANO_WEIGHTS
from realfill.sheet import contact_sheet

DRAWN, PHOTOGRAPHED = 3000, 1500
# Few steps stay near the mean of what is likely: from a denoiser this small, that is closer to the
# truth than the texture that more of them add (docs/training.md).
SAMPLER, STEPS = "ddim", 2
AUTOENCODER_STEPS, DENOISER_STEPS, MATCHER_STEPS = 8000, 8000, 3000
TRIPLES = 20_000
LICENCE = "Apache-2.0; trained from nothing on drawn images and scikit-image's bundled photographs"


def rebuild(
    work: Path, out: Path | None, *, device: str, seed: int = 0, scale: float = 1.0
) -> Iterator[Step]:
    """Run all stages and write the weights.

    Args:
        work: Folder for pool, checkpoints and sample sheets.
        out: Folder that receives ``base`` and ``loftr.safetensors``; the package's own if None.
        device: cpu or cuda.
        seed: Start of every random draw.
        scale: Share of the recipe's steps and pictures, for trials.
    """
    place = torch.device(device)

    def share(count: int) -> int:
        return max(2, round(count * scale))

    work.mkdir(parents=True, exist_ok=True)
    captions, pictures = picture_pool(
        work, drawn=share(DRAWN), photographed=share(PHOTOGRAPHED), seed=seed
    )
    torch.manual_seed(seed)
    autoencoder = new_autoencoder()
    yield from train_autoencoder(
        autoencoder,
        pictures,
        work / "autoencoder.pt",
        steps=share(AUTOENCODER_STEPS),
        seed=seed,
        device=place,
    )
    _calibrated(autoencoder, pictures, work / "calibrated.pt", seed)
    triples: Triples | None = None
    for done, encoded in encode_triples(
        autoencoder, captions, pictures, share(TRIPLES), seed=seed, device=place
    ):
        triples = encoded
        yield Step("encoding", done, share(TRIPLES), 0.0)
    assert triples is not None
    torch.manual_seed(seed + 1)
    unet, text_encoder = new_denoiser(), new_text_encoder()
    yield from train_denoiser(
        unet,
        text_encoder,
        triples,
        work / "denoiser.pt",
        steps=share(DENOISER_STEPS),
        seed=seed,
        device=place,
    )
    matcher = new_matcher(seed=seed)
    pool, sharp = worlds(pictures, seed=seed)
    yield from train_matcher(
        matcher,
        pool,
        sharp,
        work / "matcher.pt",
        steps=share(MATCHER_STEPS),
        seed=seed,
        device=place,
    )
    base = assemble(autoencoder, unet, text_encoder)
    save_base(base, (out or NANO_FOLDER.parent) / "base")
    export_matcher(matcher, (out / "loftr.safetensors") if out else NANO_WEIGHTS)
    _sample_sheet(base, work / "autoencoder.png")


def assemble(
    autoencoder: AutoencoderDC, unet: torch.nn.Module, text_encoder: torch.nn.Module
) -> Base:
    """The parts as one base."""
    parts = {"unet": unet, "vae": autoencoder, "text_encoder": text_encoder}
    for module in parts.values():
        module.cpu().float().eval().requires_grad_(False)
    return Base(
        name="nano",
        unet=unet,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        tokenizer=byte_tokenizer(),
        scheduler=new_scheduler(),
        size_px=SIZE_PX,
        fingerprint=fingerprint_of(parts),
        adapter_modules=ADAPTER_MODULES,
        text_adapter_modules=PAPER_TEXT_MODULES,
        sampler=SAMPLER,
        steps=STEPS,
        licence=LICENCE,
    )


def _calibrated(autoencoder: AutoencoderDC, pictures: np.ndarray, kept: Path, seed: int) -> None:
    autoencoder.eval()
    if not kept.exists():
        calibrate(autoencoder, pictures, seed=seed)
        draft = kept.with_suffix(".part")
        torch.save(autoencoder.state_dict(), draft)
        draft.replace(kept)
    autoencoder.load_state_dict(torch.load(kept, weights_only=True))


def _sample_sheet(base: Base, path: Path) -> None:
    """What the autoencoder makes of the held-out motorcycle."""
    pixels = motorcycle_crops() / 2 + 0.5
    decoded = base.decode(base.encode(pixels))
    names = ("left view", "left view, right side", "right view", "right view, right side")
    rows = [
        ("Motorcycle, never trained on", list(zip(names, pixels, strict=True))),
        ("Through the autoencoder", list(zip(names, decoded, strict=True))),
    ]
    contact_sheet(rows).save(path)
