"""One sample on its way, and what the U-Net is told of its job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from realfill.complete.samplers import Sampler, noise_for
from service.engine.conditioning import Conditioned
from service.engine.weights import SpoiltWeights


@dataclass(eq=False)
class Conditions:
    """What the U-Net is told of one job, on its device.

    Attributes:
        known: Mask and masked image. [1 + C, h, w]
        prompt: [77, d]
        table: The sampler; on the CPU where steps have buffers of their own.
        conditioned: What the U-Net takes in the place of timesteps and prompt, if it was made. Of
            every step [S, T], and of the prompt [77, P].
    """

    known: Tensor
    prompt: Tensor
    table: Sampler
    conditioned: Conditioned | None = None

    @cached_property
    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """Timestep and coefficients of each step, [] and [6]: views that are made once a job."""
        tables = self.table.timesteps, self.table.coefficients
        return list(zip(*(table.unbind() for table in tables), strict=True))


@dataclass(eq=False)
class Sample:
    """One sample on its way.

    Attributes:
        digest: Of the adapter that draws it.
        told: Its job's conditions.
        seed: Of all its noise.
        latents: Where it stands. [C, h, w], float32
        history: The x0 predicted at the step before. [C, h, w], float32
        index: Steps that it has made.
        drawn_with: Digest of the adapter that its last step was made with, as the weights told it.
    """

    digest: str | None
    told: Conditions
    seed: int
    latents: Tensor
    history: Tensor
    index: int = 0
    drawn_with: str | None = None

    def noise(self) -> Tensor:
        """Of its next step, zeros where its sampler wants none. [C, h, w], on the CPU"""
        if self.told.table.stochastic:
            return noise_for(self.seed, self.index + 1, self.latents.shape)
        return torch.zeros(self.latents.shape)

    @property
    def finished(self) -> bool:
        """Whether its latents are ready to decode."""
        return self.index == self.told.table.steps


def times_and_prompts(samples: Sequence[Sample]) -> tuple[Tensor, Tensor | list[Tensor]]:
    """What the U-Net takes of the next step's timesteps and of prompts, as its jobs were told.

    Returns:
        [N] and [N, 77, d]; or [N, T] and [77, P] each, where they were conditioned before.
    """
    kept = [sample.told.conditioned for sample in samples]
    prompts = [one.prompts for one in kept if one is not None]
    if not prompts:
        timesteps = torch.stack([s.told.table.timesteps[s.index] for s in samples])
        return timesteps, torch.stack([sample.told.prompt for sample in samples])
    steps = zip(kept, samples, strict=True)
    return torch.stack([one.times[s.index] for one, s in steps if one is not None]), prompts


def note_adapters(groups: Sequence[Sequence[Sample]], drawing: Sequence[str | None]) -> None:
    """Let samples know what they are drawn with.

    Args:
        groups: Samples of each part of a batch.
        drawing: Digest of each part, as the weights tell it.

    Raises:
        SpoiltWeights: It is not theirs.
    """
    for group, digest in zip(groups, drawing, strict=True):
        if digest != group[0].digest:
            raise SpoiltWeights(
                f"the weights hold adapter {digest or 'none'} where {group[0].digest or 'none'} "
                "was asked for; nothing was drawn, send the request again"
            )
        for sample in group:
            sample.drawn_with = digest
