"""The resident base: samples one job's seeds in batches, one U-Net call per step."""

from __future__ import annotations

import importlib.util
import math
import threading
import time
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from realfill.base import Base
from realfill.complete.pipeline import conditions, denoise
from realfill.complete.samplers import Sampler, sampler
from service.engine.job import Job, Sampled
from service.engine.swap import Swapper
from service.errors import Cancelled

Attention = Literal["auto", "sdpa", "xformers"]


class Runner:
    """A base with its swapper, used by one thread at a time.

    A sample depends on its seed, the adapter and the batch size, not on its place in the batch:
    noise is drawn per seed, and batches of one job are of equal size. Another batch size may
    choose other algorithms for convolutions and matrix products; the samples then differ by
    rounding, on a CPU in float32 by less than 1e-3 of the range of pixels.

    Args:
        base: Becomes the runner's own; its U-Net's weights change with every adapter.
        attention: xformers, sdpa, or auto for xformers where CUDA and the package are there.
        max_samples: Most samples in one U-Net call.
        decode_samples: Most samples in one call of the autoencoder, whose activations are large.

    Raises:
        ValueError: xformers was asked for but cannot be used, or a number is below 1.
    """

    def __init__(
        self,
        base: Base,
        *,
        attention: Attention = "auto",
        max_samples: int = 16,
        decode_samples: int = 4,
    ) -> None:
        if max_samples < 1 or decode_samples < 1:
            raise ValueError(
                f"max_samples is {max_samples}, decode_samples {decode_samples}; use 1 or more"
            )
        self.base = base
        self.max_samples = max_samples
        self.attention = choose_attention(
            attention, base.device.type, installed=importlib.util.find_spec("xformers") is not None
        )
        if self.attention == "xformers":
            base.unet.enable_xformers_memory_efficient_attention()
        self.swapper = Swapper(base.unet, base.adapter_modules)
        self._decode_samples = decode_samples
        self._samplers: dict[tuple[str, int], Sampler] = {}

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
    def run(self, job: Job) -> Sampled:
        """Swap the job's adapter in and sample all its seeds.

        Raises:
            Cancelled: The job's flag was set; at most one step was made after that.
            AdapterMismatch, InvalidCapsule: The adapter cannot be used; the next job is unharmed.
        """
        _stop_if(job.cancel)
        began = time.perf_counter()
        self.swapper.apply(job.digest, job.adapter)
        self._synchronize()
        swapped = time.perf_counter()
        latents = self._sample(job)
        self._synchronize()
        sampled = time.perf_counter()
        samples = _in_equal_batches(
            latents, self._decode_samples, lambda batch: self._decode(batch, job.cancel)
        )
        self._synchronize()
        return Sampled(
            samples=samples,
            digest=self.swapper.digest,
            swap_s=swapped - began,
            sample_s=sampled - swapped,
            decode_s=time.perf_counter() - sampled,
        )

    def _sample(self, job: Job) -> Tensor:
        """Final latents of all seeds. [N, C, h, w]"""
        known = conditions(self.base, job.target, job.mask)
        batches = math.ceil(len(job.seeds) / self.max_samples)
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            if job.on_step is not None:
                job.on_step(done, batches * job.steps)

        return _in_equal_batches(
            torch.arange(len(job.seeds)),
            self.max_samples,
            lambda batch: self._sample_batch(
                job, [job.seeds[k] for k in batch.tolist()], known, count
            ),
        )

    def _sample_batch(
        self, job: Job, seeds: list[int], known: Tensor, count: Callable[[], None]
    ) -> Tensor:
        """Final latents of one batch: one U-Net call per step. [N, C, h, w]"""
        scale = None if job.adapter is None else job.adapter.scale
        self.swapper.verify(job.digest, scale)
        _stop_if(job.cancel)
        latents = known
        table = self._sampler(job.sampler, job.steps)
        for following in denoise(self.base, known, job.prompt_embedding, seeds, table):
            latents = following
            count()
            _stop_if(job.cancel)
        return latents

    def _decode(self, latents: Tensor, cancel: threading.Event) -> Tensor:
        _stop_if(cancel)
        return self.base.decode(latents)

    def _sampler(self, name: str, steps: int) -> Sampler:
        key = (name, steps)
        if key not in self._samplers:
            built = sampler(name, self.base.scheduler.config, steps)
            self._samplers[key] = built.to(self.base.device)
        return self._samplers[key]

    def _synchronize(self) -> None:
        """Wait for the device, so that the clock measures its work."""
        if self.base.device.type == "cuda":
            torch.cuda.synchronize(self.base.device)


def choose_attention(
    setting: Attention, device_type: str, *, installed: bool
) -> Literal["sdpa", "xformers"]:
    """Which attention to run.

    Args:
        setting: auto, sdpa or xformers.
        device_type: Of the base, "cuda" or "cpu".
        installed: Whether xformers can be imported.

    Raises:
        ValueError: The setting is unknown, or asks for xformers where it cannot run.
    """
    if setting not in get_args(Attention):
        raise ValueError(f"attention is {setting!r}; use one of {get_args(Attention)}")
    usable = device_type == "cuda" and installed
    if setting == "xformers" and not usable:
        reason = "it is not installed" if device_type == "cuda" else f"the base is on {device_type}"
        raise ValueError(
            f"attention is 'xformers', but {reason}; pip install 'realfill-serve[gpu]' on a "
            "machine with CUDA, or set attention to 'auto' or 'sdpa'"
        )
    return "sdpa" if setting == "sdpa" or not usable else "xformers"


def _stop_if(cancel: threading.Event) -> None:
    if cancel.is_set():
        raise Cancelled("the job was cancelled; send the request again if it is still wanted")


def _in_equal_batches(rows: Tensor, at_most: int, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute rows in as few batches as allowed, all of one size, so that places do not matter.

    The last batch is filled up with its last row, which is computed again and dropped.

    Args:
        rows: One or more. [N, ...]
        at_most: Largest batch.
        compute: From a batch of rows to a batch of outcomes. [n, ...] -> [n, ...]

    Returns:
        One outcome per row. [N, ...]
    """
    count = len(rows)
    size = math.ceil(count / math.ceil(count / at_most))
    missing = -count % size
    filled = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])
    return torch.cat([compute(batch) for batch in filled.split(size)])[:count]
