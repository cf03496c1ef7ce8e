"""Steps of fixed batch sizes in buffers of fixed address, which a CUDA graph can replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.sampler_step import sampler_step_
from realfill.base import Base
from service.engine.prompts import TOLD, ProjectedPrompts, projected_prompts
from service.engine.sample import Sample
from service.engine.staging import pinned

# What a step ran on: the rank classes beside the weights, none where an adapter is merged.
Mode = tuple[int, ...]
# Runs before a capture, in which libraries choose algorithms and allocate.
WARM_UPS = 3


def bucket_sizes(most: int) -> tuple[int, ...]:
    """Powers of two up to the largest batch, and that."""
    return tuple(sorted({*(2**k for k in range(most.bit_length()) if 2**k <= most), most}))


class StaticStep:
    """One denoising step of up to so many samples, always in the same memory.

    Places that no sample has are computed too, with whatever they held last.

    Args:
        base: The resident model.
        size: Samples.
        attending: Makes the context that attention runs in.
        prompts: What the U-Net reads of prompts, if it can be made ahead of the steps.
    """

    def __init__(
        self,
        base: Base,
        size: int,
        attending: Callable[[], AbstractContextManager[None]],
        prompts: ProjectedPrompts | None,
    ) -> None:
        self.size = size
        self._base = base
        self._attending = attending
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
            self.projected = torch.zeros(size, 77, prompts.width, device=device, dtype=dtype)
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
        with self._attending():
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
        self._held = []


@dataclass(frozen=True)
class Graphs:
    """A static step in one mode, as it was captured: its prompts, and the rest of it."""

    project: torch.cuda.CUDAGraph
    compute: torch.cuda.CUDAGraph


class Buckets:
    """Static steps by batch size, captured once per mode on CUDA.

    Args:
        base: The resident model, fused.
        most: Samples of the largest bucket.
        attending: Makes the context that attention runs in.

    Attributes:
        captures: Graphs captured so far; constant after the warm-up.
    """

    def __init__(
        self, base: Base, most: int, attending: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.captures = 0
        self._on_cuda = base.device.type == "cuda"
        self._sizes = bucket_sizes(most)
        prompts = projected_prompts(base.unet)
        self._steps = {size: StaticStep(base, size, attending, prompts) for size in self._sizes}
        self._graphs: dict[tuple[int, Mode], Graphs] = {}
        if self._on_cuda:
            # One stream for warm-ups and captures: what libraries keep for a stream is kept once.
            self._aside = torch.cuda.Stream(base.device)
            # One pool: no two graphs run at once, and what they leave lies in the buffers.
            self._pool = torch.cuda.graph_pool_handle()

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
        step = self._steps[self.size_for(len(samples))]
        if self._on_cuda and (step.size, mode) not in self._graphs:
            self._capture(step, mode)
            step.forget()
        project, compute = step.project, step.compute
        if self._on_cuda:
            graphs = self._graphs[step.size, mode]
            project, compute = graphs.project.replay, graphs.compute.replay
        if step.fill(samples, composition):
            project()
        compute()
        count = len(samples)
        return step.latents[:count].clone(), step.history[:count].clone()

    def warm_up(self, mode: Mode, room: Callable[[int], None]) -> None:
        """Capture a mode in every size.

        Args:
            mode: See ``Mode``.
            room: Composes the network for so many samples of the mode.
        """
        for size in self._sizes:
            room(size)
            if self._on_cuda and (size, mode) not in self._graphs:
                self._capture(self._steps[size], mode)
            self._steps[size].forget()

    def _capture(self, step: StaticStep, mode: Mode) -> None:
        """Record what a step launches; the buffers are garbage afterwards."""
        aside, device = self._aside, step.latents.device
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                step.project()
                step.compute()
        torch.cuda.current_stream(device).wait_stream(aside)
        graphs = Graphs(torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph())
        for graph, work in ((graphs.project, step.project), (graphs.compute, step.compute)):
            # Other threads bring adapters meanwhile: what they ask of the device is no part of it.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"
            ):
                work()
            self.captures += 1
        self._graphs[step.size, mode] = graphs

    def release(self) -> None:
        """Give the device's memory back; no step can be made afterwards."""
        if self._on_cuda:
            torch.cuda.synchronize(self._aside.device)
        self._graphs.clear()
        self._steps.clear()
