"""The resident base: one U-Net call advances many samples, each of its own scene and step."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from realfill.base import Base
from realfill.complete.pipeline import conditions
from realfill.complete.samplers import Sampler, advance, noise_for, sampler
from service.engine.attention import ATTEND, Attention, attention_for
from service.engine.buckets import Buckets
from service.engine.captures import Captures
from service.engine.cores import Crew, crew_for
from service.engine.fused import FusedWeights
from service.engine.fusion import install_attention, install_fusions, largest_attention
from service.engine.job import Job, Sampled
from service.engine.layers import Installed, is_exact
from service.engine.moment import CudaMoment, HostMoment, Moment
from service.engine.pictures import LoosePictures, Pictures, StaticPictures
from service.engine.rehearsal import rehearse_swap
from service.engine.sample import Conditions, Sample, note_adapters, times_and_prompts
from service.engine.segmented import SegmentedWeights
from service.engine.staging import pinned
from service.engine.weights import Part, Weights
from service.errors import Cancelled

Application = Literal["auto", "fused", "segmented"]

# Adapters that lie ready on the device, where nobody says otherwise.
ARENA_BYTES = {"cpu": 2**30, "cuda": 2**32}
# More samples of nano in one call were no quicker on two CPU cores in a trial: 169 ms a step for
# sixteen in one, 158 ms in two, 179 ms in four. Only where their number does not change their bits;
# fused weights go on to divide what they are given (``service.engine.program.AT_ONCE``).
AT_ONCE = 8
# Samples of one scene from which a call of their own is no slower than one with other scenes beside
# them, on a CPU without a crew: on two cores with nano two scenes of eight took 158 ms a step apart
# and 162 ms together. Where a crew shares the batches scenes never run apart, which would be no
# quicker for eight of each and slower for fewer (rows engine.apart_ms.*); nor on a GPU: on an H200
# with SD 2, two of eight took 1, 4 and 5 % longer apart in three runs, fewer far longer (.cuda).
SPLIT_FROM = 8


class Runner:
    """A base with its adapters, used by one thread at a time.

    With fused weights, on a CPU in float32, a sample's image depends on its seed, its adapter and
    its conditions, to the bit: not on its neighbours, their adapters, or how many they are
    (``service.engine.layers`` says how). Otherwise it is bit-equal within one size of batch and
    one way of applying adapters, and differs by rounding between them.

    Args:
        base: Becomes the runner's own until ``release``.
        attention: xformers, sdpa, cudnn (SDPA by cuDNN alone), or auto for xformers where it runs
            on CUDA and is not much slower than sdpa.
        max_samples: Most samples in one U-Net call.
        application: fused (whole weights per scene), segmented (low-rank terms beside the base's
            weights), or auto for the one that suits the device.
        arena_bytes: For adapters that lie ready on the device; None for 1 GiB on a CPU and 4 GiB on
            CUDA.
        split_from: Samples of one scene from which they run in a call of their own; None for never,
            but for 8 on a CPU without a crew of cores that share the batches.
        static: Whether steps run in buckets of fixed size and memory, with fused group norms; on
            CUDA they are captured as graphs. None for CUDA alone.

    Raises:
        ValueError: A choice that this machine cannot follow, or a number below 1.
    """

    def __init__(
        self,
        base: Base,
        *,
        attention: Attention = "auto",
        max_samples: int = 16,
        application: Application = "auto",
        arena_bytes: int | None = None,
        split_from: int | None = None,
        static: bool | None = None,
    ) -> None:
        if max_samples < 1:
            raise ValueError(f"max_samples is {max_samples}; use 1 or more")
        self.base = base
        self.max_samples = max_samples
        shape = largest_attention(base.unet, (base.size_px // base.cell_px) ** 2)
        self.attention = attention_for(attention, base.device, base.dtype, shape)
        attend = ATTEND[self.attention]
        exact = is_exact(base.device, base.dtype)
        self._at_once = min(AT_ONCE, max_samples) if exact else max_samples
        if application == "auto":
            application = "fused" if exact else "segmented"
        if application == "fused" and not exact:
            raise ValueError(
                f"application is 'fused', but the base is {base.dtype} on {base.device.type}; "
                "it takes float32 on a CPU, so choose 'auto' or 'segmented'"
            )
        if arena_bytes is None:
            arena_bytes = ARENA_BYTES.get(base.device.type, ARENA_BYTES["cpu"])
        static = base.device.type == "cuda" if static is None else static
        if static:
            # Before anybody remembers where weights lie and in which order.
            _lay_out(base)
        by_crew = application == "fused" and not static
        self._crew = crew_for(torch.get_num_threads()) if by_crew else None
        if split_from is None and self._crew is None and base.device.type == "cpu":
            split_from = SPLIT_FROM
        kind = FusedWeights if application == "fused" else SegmentedWeights
        self.weights: Weights = kind(
            base.unet,
            base.adapter_modules,
            budget_bytes=arena_bytes,
            split_from=split_from,
            products=base.multiplies_in,
        )
        self._samplers: dict[tuple[str, int], Sampler] = {}
        self.buckets: Buckets | None = None
        self._pictures: Pictures = LoosePictures(base, one_by_one=exact)
        self._fused: list[Installed] = []
        if static:
            # Fused weights fuse the U-Net's blocks as well.
            unet = None if application == "fused" else base.unet
            self._fused = install_fusions(base.autoencoder, unet, attend)
            captures = Captures(base.device)
            self.buckets = Buckets(base, max_samples, captures)
            self._pictures = StaticPictures(base, captures)
        elif self.attention != "sdpa":
            self._fused = [install_attention(base.unet, attend)]
        if exact:
            self._show_sizes()
            if self._crew is not None:
                self._crew.work([self._show_sizes])
        if application == "fused":  # No batch of several scenes shall wait for its program.
            self.weights.rehearse((), 2)
            self._show_sizes(2)
            self.weights.apply([Part(None, 1)])

    @property
    def programs(self) -> int:
        """Programs traced and graphs captured so far; constant after the warm-up."""
        captures = 0 if self.buckets is None else self.buckets.captures
        return self.weights.programs + captures

    def check(self, job: Job) -> None:
        """Refuse a job whose tensors or sampler do not fit the base, before it is queued.

        Raises:
            ValueError: Something does not fit.
            BaseUnavailable: The base's scheduler cannot be sampled this way.
        """
        size = self.base.size_px
        width = int(self.base.unet.config.cross_attention_dim)
        expected = {
            "target": (job.target, (3, size, size)),
            "mask": (job.mask, (size, size)),
            "prompt_embedding": (job.prompt_embedding, (job.prompt_embedding.shape[0], width)),
        }
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} of the job has shape {tuple(tensor.shape)}; this base takes {shape}"
                )
        self._sampler(job.sampler, job.steps)

    @torch.no_grad()
    def warm_up(self, ranks: Sequence[int] = ()) -> None:
        """Run every bucket once, merged and with slots, and swap, so that nothing is made later.

        Args:
            ranks: Of the adapters that are to share batches.
        """
        self._pictures.warm_up()
        if self.buckets is None:
            return
        self.buckets.warm_up((), lambda size: self.weights.apply([Part(None, size)], size))
        for rank in ranks:
            mode = self.weights.reserve(rank)
            self.buckets.warm_up(mode, partial(self.weights.rehearse, mode))
            rehearse_swap(self.weights, self.base.unet, rank)

    @torch.no_grad()
    def _show_sizes(self, samples: int = 1) -> None:
        """Run the U-Net once, so that its layers know for which pictures to pack weights, and how.

        How depends on the cores that the calling thread computes with.
        """
        base, config = self.base, self.base.unet.config
        side = base.size_px // base.cell_px
        base.unet(
            torch.zeros(samples, int(config.in_channels), side, side),
            torch.zeros(samples, dtype=torch.long),
            encoder_hidden_states=torch.zeros(samples, 77, int(config.cross_attention_dim)),
        )

    @torch.no_grad()
    def begin(self, job: Job) -> list[Sample]:
        """Encode a job's conditions and draw the noise that its samples start from."""
        target, mask = self._sent(job.target), self._sent(job.mask)
        table = self._sampler(job.sampler, job.steps)
        prompt = self._sent(job.prompt_embedding.to(self.base.dtype))
        told = Conditions(
            known=conditions(self.base, target, mask, encode=self._pictures.encode)[0],
            prompt=prompt,
            table=table,
            conditioned=self.weights.conditioned(job.digest, table.timesteps, prompt),
        )
        shape = (self.base.latent_channels, *told.known.shape[-2:])
        # Drawn while a GPU encodes, and brought there at once.
        noise = torch.stack([noise_for(seed, 0, shape) for seed in job.seeds])
        latents = self._sent(told.table.start(noise))
        history = torch.zeros_like(latents)
        return [
            Sample(job.digest, told, *of_seed)
            for of_seed in zip(job.seeds, latents, history, strict=True)
        ]

    @torch.no_grad()
    def step(self, samples: Sequence[Sample]) -> None:
        """Advance every sample by one step, in as few U-Net calls as the weights allow.

        Args:
            samples: Unfinished ones, at most ``max_samples``, those of one digest side by side.

        Raises:
            SpoiltWeights: They were written from elsewhere; what was not yet advanced stands where
                it stood.
        """
        groups = [list(group) for _, group in groupby(samples, lambda sample: sample.digest)]
        parts = [Part(group[0].digest, len(group)) for group in groups]
        for batch in self.weights.batches(parts):
            chosen = [sample for k in batch for sample in groups[k]]
            room = self.buckets.size_for(len(chosen)) if self.buckets else len(chosen)
            self.weights.apply([parts[k] for k in batch], room)
            note_adapters([groups[k] for k in batch], self.weights.drawing)
            if self._crew is not None and self._crew.suits(len(chosen), scenes=len(batch)):
                self._advance_by_crew(self._crew, chosen)
                continue
            size = len(chosen) if len(batch) > 1 else self._at_once
            for start in range(0, len(chosen), size):
                self._advance(chosen[start : start + size])

    def _advance(self, samples: Sequence[Sample]) -> None:
        """One U-Net call on the weights as they are composed."""
        if self.buckets is not None:
            outcome = self.buckets.advance(samples, self.weights.mode, self.weights.writes)
        else:
            outcome = self._predict(samples)
        _take_in(samples, outcome)

    def _advance_by_crew(self, crew: Crew, samples: Sequence[Sample]) -> None:
        """A U-Net call by each member of the crew, for its share of the batch as it is composed."""
        assert isinstance(self.weights, FusedWeights)
        shares = crew.shares(len(samples))
        outcomes = crew.work(
            [
                partial(self._predict_share, samples[start:stop], self.weights.share(start, stop))
                for start, stop in shares
            ]
        )
        for (start, stop), outcome in zip(shares, outcomes, strict=True):
            _take_in(samples[start:stop], outcome)

    @torch.no_grad()
    def _predict_share(
        self, samples: Sequence[Sample], share: AbstractContextManager[None]
    ) -> tuple[Tensor, Tensor]:
        with share:
            return self._predict(samples)

    def _predict(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """One U-Net call and one sampler step. [N, C, h, w] twice, float32"""
        base = self.base
        latents = torch.stack([s.latents for s in samples])
        known = torch.stack([s.told.known for s in samples])
        times, prompts = times_and_prompts(samples)
        prediction = base.unet(
            torch.cat([latents.to(base.dtype), known], dim=1),
            times,
            encoder_hidden_states=prompts,
            return_dict=False,
        )[0]
        rows = torch.stack([s.told.table.coefficients[s.index] for s in samples])
        noise = None
        if any(s.told.table.stochastic for s in samples):
            noise = torch.stack([s.noise() for s in samples]).to(base.device)
        history = torch.stack([s.history for s in samples])
        return advance(rows, latents, prediction, history, noise)

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """Images in [0, 1] of one or more latents. [C, h, w] each to [N, 3, S, S]"""
        return self._pictures.decode(latents)

    def run(self, job: Job) -> Sampled:
        """One job by itself, from conditions to images, without a lane.

        Raises:
            Cancelled: The job's flag was set; at most one step was made after that.
            AdapterMismatch, InvalidCapsule: The adapter cannot be used; the next job is unharmed.
        """
        _stop_if(job.cancel)
        began = time.perf_counter()
        if job.digest is not None and job.adapter is not None:
            self.weights.take(job.digest, job.adapter)
        try:
            self.synchronize()
            swapped = time.perf_counter()
            samples = self.begin(job)
            self._run_all(job, samples)
            self.synchronize()
            sampled = time.perf_counter()
            images = self.decode([sample.latents for sample in samples])
            self.synchronize()
        finally:
            if job.digest is not None:
                self.weights.give_back(job.digest)
        return Sampled(
            samples=images,
            seeds=job.seeds,
            digest=samples[0].drawn_with,
            swap_s=swapped - began,
            sample_s=sampled - swapped,
            decode_s=time.perf_counter() - sampled,
        )

    def _run_all(self, job: Job, samples: list[Sample]) -> None:
        batches = [
            samples[k : k + self.max_samples] for k in range(0, len(samples), self.max_samples)
        ]
        done = 0
        for batch in batches:
            for _ in range(job.steps):
                _stop_if(job.cancel)
                self.step(batch)
                done += 1
                if job.on_step is not None:
                    job.on_step(done, len(batches) * job.steps)
        _stop_if(job.cancel)

    def release(self) -> None:
        """Leave the base as it was before."""
        if self._crew is not None:
            self._crew.release()
        if self.buckets is not None:
            # Not left to the garbage collector: gigabytes of graphs may hang on a cycle.
            self.buckets.release()
        self._pictures.release()
        for installed in self._fused:
            installed.release()
        self.weights.release()

    def synchronize(self) -> None:
        """Wait for the device, so that the clock measures its work."""
        if self.base.device.type == "cuda":
            torch.cuda.synchronize(self.base.device)

    def moment(self) -> Moment:
        """The end of what the device was given so far, not waited for."""
        device = self.base.device
        return CudaMoment(device) if device.type == "cuda" else HostMoment()

    def _sent(self, values: Tensor) -> Tensor:
        """On the device as soon as it comes to it, which is not waited for."""
        device = self.base.device
        return pinned(values, device).to(device, non_blocking=True)

    def _sampler(self, name: str, steps: int) -> Sampler:
        key = (name, steps)
        if key not in self._samplers:
            built = sampler(name, self.base.scheduler.config, steps)
            # Buckets take numbers from its tables, which must not wait for the device.
            self._samplers[key] = built if self.buckets else built.to(self.base.device)
        return self._samplers[key]


def _take_in(samples: Sequence[Sample], outcome: tuple[Tensor, Tensor]) -> None:
    """Every sample is one step further."""
    for sample, latents, history in zip(samples, *outcome, strict=True):
        sample.latents, sample.history = latents, history
        sample.index += 1


def _stop_if(cancel: threading.Event) -> None:
    if cancel.is_set():
        raise Cancelled("the job was cancelled; send the request again if it is still wanted")


def _lay_out(base: Base) -> None:
    """Let weights lie as convolutions read best on the base's device."""
    on_cuda = base.device.type == "cuda"
    for network in (base.unet, base.autoencoder):
        network.to(memory_format=torch.channels_last if on_cuda else torch.contiguous_format)
