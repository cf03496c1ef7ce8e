"""Definition of sampler_step in torch, and what computes it on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def sampler_step_reference_(
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
    """Products and sums one after the other in float32, then the copies.

    Args:
        following, x0, packed, rows, latents, prediction, known, history, noise: As in
            `kernels.sampler_step.sampler_step_`.
    """
    latents, prediction = latents.float(), prediction.float()
    of_latents, of_prediction, of_history, of_noise, x0_latents, x0_prediction = (
        column[:, None, None, None] for column in rows.unbind(1)
    )
    # The latents are read once more for x0, so they are not written over before.
    apart = following.data_ptr() != latents.data_ptr()
    total = torch.mul(of_latents, latents, out=following if apart else None)
    total += of_prediction * prediction
    if history is not None:
        total += of_history * history.float()
    if noise is not None:
        total += of_noise * noise.float()
    torch.mul(x0_latents, latents, out=x0)
    x0 += x0_prediction * prediction
    if not apart:
        following.copy_(total)
    channels = latents.shape[1]
    packed[:, :channels] = total
    packed[:, channels:] = known
