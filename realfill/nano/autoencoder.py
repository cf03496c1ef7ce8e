"""Nano's autoencoder: pictures to latents of 20 channels at an eighth of the size, and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC
from PIL import Image
from torch import Tensor

from realfill.nano.photographs import photograph
from realfill.nano.pool import crops
from realfill.nano.stage import RunningLoss, Step, drawn_from, half_precision, learning_rate

LATENT_CHANNELS = 20


def new_autoencoder() -> AutoencoderDC:
    """A deep-compression autoencoder: 8 px to a cell, no norm across pixels, no attention."""
    widths, depths = (32, 32, 64, 128), (0, 1, 2, 3)
    return AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=32,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=depths,
        decoder_layers_per_block=depths,
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
        scaling_factor=1.0,
    )


def _crops(pictures: Tensor, count: int, side: int, generator: torch.Generator) -> Tensor:
    """Random crops in [-1, 1], mirrored, turned and tinted. [count, 3, side, side]"""
    device = pictures.device
    chosen = torch.randint(len(pictures), (count,), generator=generator, device=device)
    pixels = crops(pictures, chosen, side, generator)
    turned = torch.rand(count, 1, 1, 1, generator=generator, device=device) < 0.25
    pixels = torch.where(turned, pixels.mT, pixels)
    gain = 0.8 + 0.35 * torch.rand(count, 3, 1, 1, generator=generator, device=device)
    return (2 * pixels * gain - 1).clamp(-1, 1).contiguous(memory_format=torch.channels_last)


def _reconstruction_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Squared error, and absolute error of the fine structure so that edges stay sharp."""
    error = decoded.float() - pixels
    across, down = error.diff(dim=3).abs().mean(), error.diff(dim=2).abs().mean()
    return error.square().mean() + 0.02 * error.abs().mean() + 0.05 * (across + down)


def train_autoencoder(
    autoencoder: AutoencoderDC,
    pictures: Tensor,
    checkpoint: Path,
    *,
    steps: int,
    seed: int,
    device: torch.device,
    batch: int = 32,
) -> Iterator[Step]:
    """Fit the autoencoder to random crops; resumes from ``checkpoint``.

    Args:
        autoencoder: Trained in place.
        pictures: The pool, on the device. [K, 160, 160, 3], uint8
        checkpoint: Where training goes on, and what it leaves.
        steps: In all.
        seed: Start of every random draw.
        device: cpu or cuda.
        batch: Crops of 64 px in a step.
    """
    autoencoder.to(device, memory_format=torch.channels_last).train()
    parameters = list(autoencoder.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3, fused=device.type == "cuda"
    )
    begin = _resume(checkpoint, autoencoder, optimizer)
    running = RunningLoss("autoencoder", 0.98, step=begin)
    for step in range(begin, steps):
        generator = drawn_from(seed, 2, step, device=device)
        pixels = _crops(pictures, batch, 64, generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1.5e-3)
        with half_precision(device):
            latents = autoencoder.encode(pixels).latent
            # The denoiser will miss by a little: the decoder must forgive it.
            noise = torch.randn(latents.shape, generator=generator, device=device)
            decoded = autoencoder.decode(latents + 0.05 * noise).sample
        loss = _reconstruction_loss(decoded, pixels) + 1e-3 * latents.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        running.take(loss)
        if (step + 1) % max(250, steps // 10) == 0 or step + 1 == steps:
            running.read()
            _keep(checkpoint, autoencoder, optimizer, step + 1)
        yield Step("autoencoder", step + 1, steps, running.value)


@torch.no_grad()
def calibrate(autoencoder: AutoencoderDC, pictures: Tensor, *, seed: int) -> None:
    """Mix the latent channels so that equal steps in latents are equal steps in pixels.

    Trained as it is, an autoencoder spreads what matters evenly over its channels: its latents are
    nearly white, and predicting them is mostly predicting fine grain. After this, a picture's
    latents have the spectrum of a photograph (here the strongest direction has 800 times the
    variance of the weakest), and a denoiser learns colours and shapes first. The mixing is linear
    and goes into the weights at both ends, so pictures come back exactly as before.
    """
    generator = drawn_from(seed, 5, 0, device=pictures.device)
    latents = autoencoder.encode(_crops(pictures, 12, 128, generator)).latent
    gram = sensitivity(autoencoder, latents)
    values, vectors = torch.linalg.eigh(gram.double())
    mix = (vectors * values.clamp(min=values.max() * 1e-5).sqrt()) @ vectors.T
    mixed = torch.einsum("cd,ndhw->nchw", mix, latents.double())
    mix = mix / mixed.square().mean().sqrt()
    last, first = autoencoder.encoder.conv_out, autoencoder.decoder.conv_in
    last.weight.copy_(torch.einsum("cd,dijk->cijk", mix, last.weight.double()))
    last.bias.copy_(mix @ last.bias.double())
    back = torch.linalg.inv(mix)
    first.weight.copy_(torch.einsum("odjk,dc->ocjk", first.weight.double(), back))


def sensitivity(autoencoder: AutoencoderDC, latents: Tensor, nudge: float = 0.5) -> Tensor:
    """How far, and how alike, the channels move the decoded pixels: a Gram matrix. [C, C]"""
    plain = autoencoder.decode(latents).sample
    moves = []
    for channel in range(latents.shape[1]):
        nudged = latents.clone()
        nudged[:, channel, 2::4, 2::4] += nudge
        moves.append((autoencoder.decode(nudged).sample - plain).flatten())
    stacked = torch.stack(moves) / nudge
    return stacked @ stacked.T / (len(latents) * latents[0, 0, 2::4, 2::4].numel())


def _keep(
    checkpoint: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    draft = checkpoint.with_suffix(".part")
    torch.save(
        {"step": step, "module": module.state_dict(), "optimizer": optimizer.state_dict()}, draft
    )
    draft.replace(checkpoint)


def _resume(checkpoint: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not checkpoint.exists():
        return 0
    kept = torch.load(checkpoint, weights_only=True)
    module.load_state_dict(kept["module"])
    optimizer.load_state_dict(kept["optimizer"])
    return int(kept["step"])


@torch.no_grad()
def psnr(autoencoder: AutoencoderDC, pixels: Tensor) -> float:
    """Mean PSNR in dB of the round trip over pictures in [-1, 1]. [N, 3, H, W]"""
    decoded = autoencoder.decode(autoencoder.encode(pixels).latent).sample.clamp(-1, 1)
    error = ((decoded - pixels) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def motorcycle_crops() -> Tensor:
    """Square crops of the held-out motorcycle at 128 px, in [-1, 1]. [4, 3, 128, 128]"""
    crops = []
    for name in ("motorcycle_left.png", "motorcycle_right.png"):
        photo = Image.fromarray(photograph(name))
        scale = 128 / photo.height
        photo = photo.resize((round(photo.width * scale), 128), Image.Resampling.LANCZOS)
        for left in (0, photo.width - 128):
            crops.append(np.asarray(photo.crop((left, 0, left + 128, 128))))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
