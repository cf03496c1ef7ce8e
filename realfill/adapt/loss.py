"""The training objective: noise prediction over what is known to be true."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler
from torch import Tensor


def target_of(
    scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """What the U-Net shall predict, eps or velocity by the scheduler. [N, C, h, w]"""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    return noise


def weighted_error(predicted: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean squared error of each sample over the cells that count, averaged over the samples.

    Dividing by each sample's own weight keeps the target from counting less because it has a hole.
    A sample of which nothing counts adds nothing.

    Args:
        predicted: Output of the U-Net. [N, C, h, w]
        target: What it should be. [N, C, h, w]
        weights: 1 where the loss counts, else 0. [N, 1, h, w]

    Source: RealFill, arXiv:2309.16668, equation 3; the normalisation is ours.
    """
    error = (predicted.float() - target).square().mean(1, keepdim=True)
    total = weights.sum((1, 2, 3))
    per_sample = (weights * error).sum((1, 2, 3)) / total.clamp(min=1)
    return per_sample.sum() / (total > 0).sum().clamp(min=1)


def noisy(scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Latents at the given timesteps of the forward process. [N, C, h, w]"""
    out: Tensor = scheduler.add_noise(latents, noise, timesteps)
    return out


def timesteps_of(
    generator: torch.Generator, count: int, scheduler: DDPMScheduler, power: float = 1.0
) -> Tensor:
    """Timesteps, uniform at power 1 and noisier above it. [N]"""
    total = int(scheduler.config.num_train_timesteps)
    share = torch.rand(count, generator=generator) ** (1 / power)
    return (share * total).long().clamp(max=total - 1)
