"""Steps of fixed batch sizes in buffers of fixed address, which a CUDA graph can replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.sampler_step import sampler_step_
from realfill.base import Base
from service.engine.captures import Captures
from service.engine.prompts import TOLD, ProjectedPrompts, projected_prompts
from service.engine.sample import Sample
from service.engine.staging import pinned

# What a step ran on: the rank classes beside the weights, none where an adapter is merged.
Mode = tuple[int, ...]


def bucket_sizes(most: int) -> tuple[int, ...]:
    """Powers of two up to the largest batch, and that."""
    return tuple(sorted({*(2**k for k in range(most.bit_length()) if 2**k <= most), most}))


class StaticStep:
    """One denoising step of up to so many samples, always in the same memory.

    Places that no sample has are computed too, with whatever they held last.

    Args:
        base: The resident model.
        size: Samples.
        prompts: What the U-Net reads of prompts, if it can be made ahead of the steps.
    """

    def __init__(
        self,
        base: Base,
        size: int,
        prompts: ProjectedPrompts | None,
    ) -> None:
        self.size = size
        self._base = base
        self._prompts = prompts
        device, dtype, config = base.device, base.dtype, base.unet.config
        side, channels = base.size_px // base.cell_px, base.latent_channels
        width = int(config.cross_attention_dim)
        # Channels-last is how convolutions on tensor cores read.
        self._layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        known = int(config.in_channels) - channels
        shape = (size, channels, side, side)
        self.latents, self.history, self.noise = (torch.zeros(shape, device=device) for _ in "abc")
        self.known = torch.zeros(size, known, side, side, device=device, dtype=dtype)
        self.packed = torch.zeros(
            size, int(config.in_channels), side, side, device=device, dtype=dtype
        ).to(memory_format=self._layout)
        self.prompt = torch.zeros(size, 77, width, device=device, dtype=dtype)
        self.projected = self.prompt
        if prompts is not None:
            self.projected = torch.zeros(prompts.width, size, 77, device=device, dtype=dtype)
        self.timesteps = torch.zeros(size, dtype=torch.long, device=device)
        self.rows = torch.zeros(size, 6, device=device)
        self._held: list[tuple[Sample, int]] = []
        self._composition: int | None = None

    def fill(self, samples: Sequence[Sample], composition: int) -> bool:
        """Bring samples in; what the step before left there is not copied again.

        Args:
            samples: At most ``size``.
            composition: Changes whenever the network's weights are composed anew.

        Returns:
            Whether prompts have to be projected before the step.
        """
        count = len(samples)
        others = [(id(s), s.index) for s in samples] != [(id(s), k) for s, k in self._held]
        anew = others or composition != self._composition
        self._composition = composition
        if others:
            self.latents[:count] = torch.stack([s.latents for s in samples])
            self.history[:count] = torch.stack([s.history for s in samples])
            self.known[:count] = torch.stack([s.told.known for s in samples])
            self.prompt[:count] = torch.stack([s.told.prompt for s in samples])
            channels = self.latents.shape[1]
            self.packed[:, :channels] = self.latents
            self.packed[:, channels:] = self.known
        timesteps, rows = zip(*(s.told.rows[s.index] for s in samples), strict=True)
        self._copy(torch.stack(timesteps), self.timesteps)
        self._copy(torch.stack(rows), self.rows)
        if any(s.told.table.stochastic for s in samples):
            self._copy(torch.stack([s.noise() for s in samples]), self.noise)
        self._held = [(sample, sample.index + 1) for sample in samples]
        return anew and self._prompts is not None

    def project(self) -> None:
        """What the U-Net reads of the prompts, by the weights as they are composed."""
        if self._prompts is not None:
            self._prompts.project(self.prompt, self.projected)

    def compute(self) -> None:
        """The U-Net and the sampler, from buffers to buffers; packs the U-Net's next input."""
        prediction = self._base.unet(
            self.packed,
            self.timesteps,
            encoder_hidden_states=self.projected,
            return_dict=False,
            **({} if self._prompts is None else TOLD),
        )[0]
        sampler_step_(
            self.latents,
            self.history,
            self.packed,
            self.rows,
            self.latents,
            prediction,
            self.known,
            self.history,
            self.noise,
        )

    def _copy(self, values: Tensor, buffer: Tensor) -> None:
        """From the CPU, without waiting for what the device has to do before."""
        buffer[: len(values)].copy_(pinned(values, buffer.device), non_blocking=True)

    def forget(self) -> None:
        """Take nothing of what is in the buffers for known."""
        self._held, self._composition = [], None


class Buckets:
    """Static steps by batch size, captured once per mode on CUDA.

    Args:
        base: The resident model, fused.
        most: Samples of the largest bucket.
        captures: Of the model's device.
    """

    def __init__(
        self,
        base: Base,
        most: int,
        captures: Captures,
    ) -> None:
        self._captures = captures
        self._sizes = bucket_sizes(most)
        prompts = projected_prompts(base.unet)
        self._steps = {size: StaticStep(base, size, prompts) for size in self._sizes}
        # What projects the prompts, and what does the rest of a step.
        self._ways: dict[tuple[int, Mode], tuple[Callable[[], None], Callable[[], None]]] = {}

    @property
    def captures(self) -> int:
        """Graphs captured so far on the device; constant after the warm-up."""
        return self._captures.count

    def size_for(self, count: int) -> int:
        """The smallest bucket that holds so many samples."""
        return next(size for size in self._sizes if size >= count)

    def advance(
        self, samples: Sequence[Sample], mode: Mode, composition: int
    ) -> tuple[Tensor, Tensor]:
        """Step some samples.

        Args:
            samples: At most as many as the largest bucket holds.
            mode: That the network is composed in.
            composition: Of the network, as ``Weights.writes`` counts them.

        Returns:
            The next latents and the predicted x0 of every sample. [N, C, h, w] twice, float32
        """
        size, count = self.size_for(len(samples)), len(samples)
        project, compute = self._ways_of(size, mode)
        step = self._steps[size]
        try:
            if step.fill(samples, composition):
                project()
            compute()
        except Exception:
            # Half-way through, they hold nobody's.
            step.forget()
            raise
        return step.latents[:count].clone(), step.history[:count].clone()

    def warm_up(self, mode: Mode, room: Callable[[int], None]) -> None:
        """Capture a mode in every size.

        Args:
            mode: See ``Mode``.
            room: Composes the network for so many samples of the mode.
        """
        for size in self._sizes:
            room(size)
            self._ways_of(size, mode)

    def _ways_of(self, size: int, mode: Mode) -> tuple[Callable[[], None], Callable[[], None]]:
        """How a step of this size and mode is made; the first time, its buffers are forgotten."""
        if (size, mode) not in self._ways:
            step = self._steps[size]
            # First, since a capture that fails has run the step, too.
            step.forget()
            self._ways[size, mode] = (
                self._captures.of(step.project),
                self._captures.of(step.compute),
            )
        return self._ways[size, mode]

    def release(self) -> None:
        """Give the device's memory back; no step can be made afterwards."""
        self._captures.finish()
        self._ways.clear()
        self._steps.clear()
