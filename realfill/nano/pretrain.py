"""The recipe of nano: every stage from nothing to the weights in the package.

Pictures, autoencoder, calibrated latents, denoiser with text encoder, matcher, export. Each stage
keeps checkpoints in the work folder and goes on from them; the same seed and versions on the same
kind of device give the same weights.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC
from numpy.typing import NDArray
from torch import Tensor

from realfill.base import NANO_FOLDER, PAPER_TEXT_MODULES, Base, save_base
from realfill.fingerprint import fingerprint_of
from realfill.nano.autoencoder import (
    calibrate,
    motorcycle_crops,
    new_autoencoder,
    train_autoencoder,
)
from realfill.nano.denoiser import (
    ADAPTER_MODULES,
    SIZE_PX,
    encode_triples,
    new_denoiser,
    new_scheduler,
    new_text_encoder,
    train_denoiser,
)
from realfill.nano.denoiser_step import Triples
from realfill.nano.pairs import worlds
from realfill.nano.photographs import PHOTOGRAPHS
from realfill.nano.pool import picture_pool
from realfill.nano.pretrain_matcher import export_matcher, new_matcher, train_matcher
from realfill.nano.stage import Step
from realfill.nano.tokenizer import byte_tokenizer
from realfill.rank.matching import NANO_WEIGHTS
from realfill.sheet import contact_sheet

DRAWN, PHOTOGRAPHED, SHARP_VIEWS = 8000, 8000, 2400
# Few steps stay near the mean of what is likely: from a denoiser this small, that is closer to the
# truth than the texture that more of them add (docs/training.md).
SAMPLER, STEPS = "ddim-quadratic", 2
LICENCE = "Apache-2.0; trained from nothing on drawn images and scikit-image's bundled photographs"


@dataclass(frozen=True)
class Effort:
    """How long the stages train.

    Attributes:
        autoencoder_steps: Each of ``autoencoder_batch`` crops.
        autoencoder_batch: Crops of 64 px.
        triples: Encoded at once.
        rounds: How often others are encoded.
        denoiser_steps: Each of ``denoiser_batch`` triples.
        denoiser_batch: Triples.
        denoiser_rate: Highest learning rate.
        matcher_steps: Each of ``matcher_batch`` pairs.
        matcher_batch: Pairs.
    """

    autoencoder_steps: int
    autoencoder_batch: int
    triples: int
    rounds: int
    denoiser_steps: int
    denoiser_batch: int
    denoiser_rate: float
    matcher_steps: int
    matcher_batch: int

    def scaled(self, scale: float) -> Effort:
        """A share of the steps and triples, at least two of each."""
        names = ("autoencoder_steps", "triples", "denoiser_steps", "matcher_steps")
        return replace(self, **{name: max(2, round(getattr(self, name) * scale)) for name in names})


EFFORTS = {
    "cpu": Effort(8000, 32, 20_000, 1, 8000, 16, 6e-4, 3000, 4),
    "cuda": Effort(8000, 256, 65_536, 12, 8000, 512, 1e-3, 6000, 64),
}


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
    effort = EFFORTS[place.type].scaled(scale)
    work.mkdir(parents=True, exist_ok=True)
    drawn, photographed = (max(2, round(count * scale)) for count in (DRAWN, PHOTOGRAPHED))
    captions, pictures = picture_pool(work, drawn=drawn, photographed=photographed, seed=seed)
    base = yield from rebuild_base(work, captions, pictures, effort, place=place, seed=seed)
    matcher = new_matcher(seed=seed)
    # Without the photographs: no two of the matcher's worlds may show the same place.
    views = max(len(PHOTOGRAPHS), round(SHARP_VIEWS * scale))
    pool, sharp = worlds(pictures[:drawn], seed=seed, sharp=views)
    yield from train_matcher(
        matcher,
        pool,
        sharp,
        work / "matcher.pt",
        steps=effort.matcher_steps,
        seed=seed,
        device=place,
        batch=effort.matcher_batch,
    )
    save_base(base, (out or NANO_FOLDER.parent) / "base")
    export_matcher(matcher, (out / "loftr.safetensors") if out else NANO_WEIGHTS)
    _sample_sheet(base, work / "autoencoder.png")


def rebuild_base(
    work: Path,
    captions: Sequence[str],
    pictures: NDArray[np.uint8],
    effort: Effort,
    *,
    place: torch.device,
    seed: int,
) -> Generator[Step, None, Base]:
    """Autoencoder, calibration and denoiser; returns the base that they make."""
    pool = torch.from_numpy(pictures).to(place)
    torch.manual_seed(seed)
    autoencoder = new_autoencoder()
    yield from train_autoencoder(
        autoencoder,
        pool,
        work / "autoencoder.pt",
        steps=effort.autoencoder_steps,
        batch=effort.autoencoder_batch,
        seed=seed,
        device=place,
    )
    _calibrated(autoencoder, pool, work / "calibrated.pt", seed)
    torch.manual_seed(seed + 1)
    unet, text_encoder = new_denoiser(), new_text_encoder()

    def encode(number: int) -> Iterator[tuple[int, Triples | None]]:
        batch = 50 if place.type == "cpu" else 1024
        start = seed * 1000 + number
        yield from encode_triples(
            autoencoder, captions, pool, effort.triples, seed=start, batch=batch
        )

    yield from train_denoiser(
        unet,
        text_encoder,
        encode,
        work / "denoiser.pt",
        steps=effort.denoiser_steps,
        rounds=effort.rounds,
        batch=effort.denoiser_batch,
        peak=effort.denoiser_rate,
        seed=seed,
        device=place,
    )
    return assemble(autoencoder, unet, text_encoder)


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


def _calibrated(autoencoder: AutoencoderDC, pictures: Tensor, kept: Path, seed: int) -> None:
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
