"""sampler_step in Triton: one launch reads every value once and writes all that follows."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 64


@triton.jit
def _sampler_step(
    following: tl.tensor,  # [N, C, h, w], contiguous
    x0: tl.tensor,  # [N, C, h, w], contiguous
    packed: tl.tensor,  # [N, C + K, h, w], evenly spaced pixels
    rows: tl.tensor,  # [N, 6]
    latents: tl.tensor,  # [N, C, h, w], contiguous
    prediction: tl.tensor,  # [N, C, h, w], evenly spaced pixels
    known: tl.tensor,  # [N, K, h, w], evenly spaced pixels
    history: tl.tensor,  # [N, C, h, w], contiguous
    noise: tl.tensor,  # [N, C, h, w], contiguous
    n_pixels: tl.tensor,
    n_channels: tl.tensor,
    n_packed: tl.tensor,
    packed_sample: tl.tensor,
    packed_channel: tl.tensor,
    packed_pixel: tl.tensor,
    prediction_sample: tl.tensor,
    prediction_channel: tl.tensor,
    prediction_pixel: tl.tensor,
    known_sample: tl.tensor,
    known_channel: tl.tensor,
    known_pixel: tl.tensor,
    HISTORY: tl.constexpr,
    NOISE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """All channels of some pixels of one sample: pixels along axis 0, samples along axis 1."""
    sample = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    moving = (pixel < n_pixels) & (channel < n_channels)
    place = (sample * n_channels + channel) * n_pixels + pixel
    row = rows + sample * 6
    z = tl.load(latents + place, mask=moving, other=0.0).to(tl.float32)
    predicted = tl.load(
        prediction
        + sample * prediction_sample
        + channel * prediction_channel
        + pixel * prediction_pixel,
        mask=moving,
        other=0.0,
    ).to(tl.float32)
    total = tl.load(row) * z + tl.load(row + 1) * predicted
    if HISTORY:
        before = tl.load(history + place, mask=moving, other=0.0).to(tl.float32)
        total = total + tl.load(row + 2) * before
    if NOISE:
        fresh = tl.load(noise + place, mask=moving, other=0.0).to(tl.float32)
        total = total + tl.load(row + 3) * fresh
    behind = channel - n_channels
    fixed = (pixel < n_pixels) & (behind >= 0) & (channel < n_packed)
    rest = tl.load(
        known + sample * known_sample + behind * known_channel + pixel * known_pixel,
        mask=fixed,
        other=0.0,
    ).to(tl.float32)
    tl.store(following + place, total, mask=moving)
    tl.store(x0 + place, tl.load(row + 4) * z + tl.load(row + 5) * predicted, mask=moving)
    tl.store(
        packed + sample * packed_sample + channel * packed_channel + pixel * packed_pixel,
        tl.where(moving, total, rest).to(packed.dtype.element_ty),
        mask=moving | fixed,
    )


def sampler_step_kernel_(
    following: Tensor,
    x0: Tensor,
    packed: Tensor,
    rows: Tensor,
    latents: Tensor,
    prediction: Tensor,
    known: Tensor,
    history: Tensor | None,
    noise: Tensor | None,
) -> None:
    """One launch.

    Args:
        following, x0, packed, rows, latents, prediction, known, history, noise: As in
            `kernels.sampler_step.sampler_step_`, which has checked them.
    """
    samples, channels, height, width = latents.shape
    rows, latents = rows.contiguous(), latents.contiguous()
    history = history if history is None else history.contiguous()
    noise = noise if noise is None else noise.contiguous()
    # Views for both memory formats: the U-Net's output is read as it comes.
    spaced = [tensor.flatten(2) for tensor in (packed, prediction, known)]
    launch: Any = _sampler_step[(triton.cdiv(height * width, PIXELS), samples)]
    with torch.cuda.device(latents.device) if latents.is_cuda else torch.no_grad():
        launch(
            following,
            x0,
            spaced[0],
            rows,
            latents,
            spaced[1],
            spaced[2],
            # Never read where they are not given.
            latents if history is None else history,
            latents if noise is None else noise,
            height * width,
            channels,
            packed.shape[1],
            *(stride for tensor in spaced for stride in tensor.stride()),
            HISTORY=history is not None,
            NOISE=noise is not None,
            PIXELS=PIXELS,
            CHANNELS=triton.next_power_of_2(packed.shape[1]),
            # Round after every product and every sum, as the definition does.
            enable_fp_fusion=False,
        )
