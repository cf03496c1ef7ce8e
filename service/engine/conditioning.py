"""What a U-Net on a CPU makes of timesteps and prompts alone: once a job, not once a step.

No latents change it, so a job's samples share it and no step repeats it. In a step it would be
computed for every sample, and for a scene with one sample in the batch its weights, a fifteenth of
all of ``nano``'s, would be read from memory for that sample alone.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from service.engine.fusion import plain_cross_attention, times_are_plain
from service.engine.layers import Installed
from service.engine.picture_blocks import ActivatedTimes


class Conditioned(NamedTuple):
    """What the U-Net takes in the place of timesteps and prompts.

    Attributes:
        times: What every residual block adds. [S, T]
        prompts: Keys and values of every cross attention. [N, L, P], or of one prompt [L, P]
    """

    times: Tensor
    prompts: Tensor


class Together(threading.local):
    """Prompts of several samples in one tensor, which the next step of the same samples finds.

    It goes with the job of the first, and is made anew where the others are not the same.
    """

    def __init__(self) -> None:
        self._made: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def of(self, prompts: Sequence[Tensor]) -> Tensor:
        """Not copied where all are one. [L, P] each to [N, L, P]"""
        first, *others = prompts
        if all(other is first for other in others):
            return first.expand(len(prompts), *first.shape)
        before, together = self._made.get(first, ((), None))
        if len(before) == len(others) and all(
            kept() is other for kept, other in zip(before, others, strict=True)
        ):
            return together
        together = torch.stack(list(prompts))
        self._made[first] = [weakref.ref(other) for other in others], together
        return together


@dataclass(frozen=True)
class Joined:
    """Layers that read the same tensor, as one.

    Attributes:
        modules: Of which it is made.
        layer: Computes all of them. [..., D] to [..., sum of sizes]
        sizes: Channels of each one's outcome.
    """

    modules: Sequence[nn.Module]
    layer: Callable[[Tensor], Tensor]
    sizes: Sequence[int]

    def install_slices(self, installed: Installed) -> None:
        """Let each module take its own of what came of all, which it is given to read."""
        ends = list(itertools.accumulate(self.sizes))
        for module, start, stop in zip(self.modules, (0, *ends), ends, strict=False):
            installed.install(module, partial(_sliced, start, stop))


class Conditioning:
    """A fused U-Net in two halves: what timesteps and prompts become, and all the rest.

    Args:
        unet: Whose ``forward`` takes ``Conditioned`` tensors once this is installed.
        times: All layers that read the timestep's embedding.
        prompts: All layers that read prompts.
    """

    def __init__(self, unet: UNet2DConditionModel, times: Joined, prompts: Joined) -> None:
        self._unet = unet
        self._times = times
        self._prompts = prompts
        self._embedding = ActivatedTimes(unet.time_embedding)

    def install(self, installed: Installed) -> None:
        """Let the U-Net read what is made already."""
        installed.install(self._unet, _as_given, "get_time_embed")
        installed.install(self._unet.time_embedding, _as_embedded)
        self._times.install_slices(installed)
        self._prompts.install_slices(installed)

    def of(self, timesteps: Tensor, prompts: Tensor) -> Conditioned:
        """The first half, by the weights that the layers are given. [S] and [N, L, D]"""
        frequencies = self._unet.time_proj(timesteps).to(prompts.dtype)
        embedded = self._embedding(frequencies)
        return Conditioned(self._times.layer(embedded), self._prompts.layer(prompts))


def conditioning_of(unet: UNet2DConditionModel, joined: Sequence[Joined]) -> Conditioning | None:
    """For a fused U-Net; None where something reads timesteps or prompts in another way.

    Args:
        unet: As ``install_fusion`` leaves it.
        joined: Layers that are computed as one.
    """
    attention = plain_cross_attention(unet)
    if not times_are_plain(unet) or not attention:
        return None
    blocks = [module for module in unet.modules() if getattr(module, "time_emb_proj", None)]
    times = _made_of([block.time_emb_proj for block in blocks], joined)
    keys_and_values = [(way.attention.to_k, way.attention.to_v) for way in attention]
    prompts = _made_of(list(itertools.chain(*keys_and_values)), joined)
    return Conditioning(unet, times, prompts) if times and prompts else None


def _made_of(modules: Sequence[nn.Module], joined: Sequence[Joined]) -> Joined | None:
    wanted = set(map(id, modules))
    return next((one for one in joined if set(map(id, one.modules)) == wanted), None)


def _sliced(start: int, stop: int, outcome: Tensor) -> Tensor:
    """One layer's part. [..., sum of sizes] to [..., C]"""
    return outcome[..., start:stop]


def _as_given(sample: Tensor, timestep: Tensor) -> Tensor:
    """What stands in the place of timesteps, for what would embed them."""
    return timestep


def _as_embedded(times: Tensor, condition: Tensor | None = None) -> Tensor:
    """What the embedding would be made of is past it already."""
    return times
