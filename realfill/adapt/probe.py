"""A fixed probe: the same crops, holes, timesteps and noise at every reading.

The training loss jumps with its draws; the probe's does not, so it shows learning and overfitting.
Source: Voronov et al., arXiv:2302.04841.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from realfill.adapt.loss import noisy, target_of, weighted_error
from realfill.adapt.pool import Draws, Views, draw
from realfill.base import Base
from realfill.config import TrainingConfig
from realfill.scene import Scene

SIZE = 16


@dataclass(frozen=True)
class Probe:
    """Fixed draws, timesteps spread over the schedule, and noise. [K, ...]"""

    draws: Draws
    timesteps: Tensor
    noise: Tensor


def new_probe(base: Base, scene: Scene, seed: int, *, zoom: float) -> Probe:
    """A probe of 16 draws that no training step shares a random number with."""
    generator = torch.Generator().manual_seed(seed * 7919 + 104729)
    draws = draw(base, Views(scene, base.size_px, TrainingConfig(zoom=zoom)), SIZE, generator)
    total = int(base.scheduler.config.num_train_timesteps)
    timesteps = ((torch.arange(SIZE) + 0.5) / SIZE * total).long().to(base.device)
    noise = torch.randn(draws.latents.shape, generator=generator).to(base.device)
    return Probe(draws, timesteps, noise)


@torch.no_grad()
def reading(base: Base, probe: Probe, prompt: Tensor) -> float:
    """Loss of the U-Net as it stands on the probe, the hole's cells alone where there are any.

    Args:
        base: The model, with or without factors.
        probe: From ``new_probe``.
        prompt: Embedding of the prompt. [77, d]
    """
    draws = probe.draws
    latents = noisy(base.scheduler, draws.latents, probe.noise, probe.timesteps)
    stacked = torch.cat([latents, draws.masks, draws.masked], 1).to(base.dtype)
    prompts = prompt.to(base.dtype).expand(SIZE, *prompt.shape)
    predicted = base.unet(stacked, probe.timesteps, prompts).sample
    truth = target_of(base.scheduler, draws.latents, probe.noise, probe.timesteps)
    return float(weighted_error(predicted, truth, draws.weights * draws.masks))
