"""The reference road of one completion: condition, denoise, decode, nothing else.

The engine runs the same ``conditions`` and ``denoise``; here they stand without swapping and
queues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from realfill.base import Base
from realfill.complete.samplers import Sampler, noise_for, sampler
from realfill.masks import latent_mask

# What a missing pixel looks like to the encoder: the middle of the range.
MISSING = 0.5


@torch.no_grad()
def complete(
    base: Base,
    target: Tensor,
    mask: Tensor,
    prompt: Tensor,
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    sampler_name: str | None = None,
) -> Tensor:
    """Sample fills of a window with the base as it stands, fused with an adapter or not.

    Args:
        base: The model.
        target: Window in [0, 1]. [3, S, S]
        mask: 1 where pixels are missing, else 0. [S, S]
        prompt: Embedding of the prompt. [77, d]
        seeds: One sample for each.
        steps: U-Net evaluations per sample; None for the base's own number.
        sampler_name: ddpm, ddim, ddim-quadratic, dpm++2m or dpm++2m-sde; None for the base's own.

    Returns:
        Decoded samples in [0, 1], not composited. [N, 3, S, S]
    """
    name, steps = sampler_name or base.sampler, steps or base.steps
    table = sampler(name, base.scheduler.config, steps).to(base.device)
    *_, latents = denoise(base, conditions(base, target, mask), prompt, seeds, table)
    return base.decode(latents)


def conditions(
    base: Base,
    target: Tensor,
    mask: Tensor,
    *,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What the U-Net is told of the target: its mask and what remains of it.

    The encoder's posterior is not sampled, so no seed's noise depends on it.

    Args:
        base: The model that encodes.
        target: Window in [0, 1]. [3, S, S]
        mask: 1 where pixels are missing, else 0. [S, S]
        encode: How latents are made of a picture; None for the base's own way.

    Returns:
        [1, 1 + C, h, w]
    """
    target, mask = target.to(base.device).float(), mask.to(base.device).float()
    masked = target * (1 - mask) + MISSING * mask
    cells = latent_mask(mask, base.cell_px)[None, None]
    latents = (encode or base.encode)(masked[None])
    return torch.cat([cells.to(base.dtype), latents], dim=1)


def denoise(
    base: Base, known: Tensor, prompt: Tensor, seeds: Sequence[int], table: Sampler
) -> Iterator[Tensor]:
    """Denoise one sample for each seed, together; yields the latents after every step.

    A seed's noise depends on nothing but the seed and the step.

    Args:
        base: The model.
        known: From ``conditions``. [1, 1 + C, h, w]
        prompt: Embedding of the prompt. [77, d]
        seeds: One sample for each.
        table: The sampler, on the base's device.

    Yields:
        Latents in float32; after the last step they are ready to decode. [N, C, h, w]
    """
    count = len(seeds)
    shape = (base.latent_channels, *known.shape[-2:])
    told = known.expand(count, -1, -1, -1)
    prompts = prompt.to(base.device, base.dtype).expand(count, -1, -1)

    def noise(draw: int) -> Tensor:
        return torch.stack([noise_for(seed, draw, shape) for seed in seeds]).to(base.device)

    latents, history = table.start(noise(0)), None
    for step in range(table.steps):
        index = torch.full((count,), step, device=base.device)
        prediction = base.unet(
            torch.cat([latents.to(base.dtype), told], dim=1),
            table.timesteps[index],
            encoder_hidden_states=prompts,
            return_dict=False,
        )[0]
        fresh = noise(step + 1) if table.stochastic else None
        latents, history = table.step(latents, prediction, index, history, fresh)
        yield latents
