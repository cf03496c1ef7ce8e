"""Candidates of a base, alone or with a scene's capsule, on a square at the base's own size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from realfill.base import PROMPT
from realfill.capsule import read_capsule
from realfill.complete.compositing import composite
from realfill.complete.seam import seamless
from realfill.masks import latent_mask
from service.engine import Job, Runner
from service.engine.sample import Sample


def feather_of(size_px: int) -> int:
    """A narrow blend: 2 of 128 pixels."""
    return max(1, size_px // 64)


def device_name(device: str) -> str:
    """What a row calls the device of this name."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def candidates(
    runner: Runner,
    target: Tensor,
    mask: Tensor,
    seeds: Sequence[int],
    *,
    capsule: bytes | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    nearest: bool = False,
) -> Tensor:
    """Sample every seed, remove its seam and composite it over the target, as the service does.

    Args:
        runner: The base and its lane's work.
        target: Image to complete, in [0, 1]. [3, S, S]
        mask: 1 where pixels are missing, else 0. [S, S]
        seeds: One candidate for each.
        capsule: Adapter and prompt of a scene; without it the base is alone with the same prompt.
        steps: U-Net calls per candidate; None for what the base is sampled with.
        sampler: ddpm, ddim, ddim-quadratic, dpm++2m or dpm++2m-sde; None for the base's own.
        nearest: Tell the U-Net the mask as ``latent_mask`` reduces it when asked so, for an
            ablation.

    Returns:
        Candidates on the CPU. [N, 3, S, S]
    """
    job = job_for(runner, target, mask, seeds, capsule=capsule, steps=steps, sampler=sampler)
    sampled = _with_nearest_mask(runner, job) if nearest else runner.run(job).samples
    samples = seamless(sampled.float().cpu(), target, mask)
    return composite(samples, target, mask, feather_px=feather_of(runner.base.size_px))


def job_for(
    runner: Runner,
    target: Tensor,
    mask: Tensor,
    seeds: Sequence[int],
    *,
    capsule: bytes | None,
    steps: int | None = None,
    sampler: str | None = None,
) -> Job:
    """What is sampled; arguments as for ``candidates``."""
    base = runner.base
    read = None if capsule is None else read_capsule(capsule, base)
    return Job(
        digest=None if capsule is None else hashlib.sha256(capsule).hexdigest(),
        adapter=None if read is None else read.adapter,
        prompt_embedding=base.embed(PROMPT).detach() if read is None else read.prompt_embedding,
        target=target,
        mask=mask,
        seeds=tuple(seeds),
        steps=steps or base.steps,
        sampler=sampler or base.sampler,
    )


def _with_nearest_mask(runner: Runner, job: Job) -> Tensor:
    """What the runner does, but for the mask's reduction to cells. [N, 3, S, S]"""
    samples = drawn(runner, job, nearest=True)
    return runner.decode([sample.latents for sample in samples])


def drawn(
    runner: Runner,
    job: Job,
    *,
    nearest: bool = False,
    after_step: Callable[[int, list[Sample]], None] = lambda step, samples: None,
) -> list[Sample]:
    """A job's samples after their last step, not decoded.

    Args:
        runner: The base and its lane's work.
        job: Its cancel flag and its listener are not looked at.
        nearest: As for ``candidates``.
        after_step: Called with the steps that the samples have made.
    """
    if job.digest is not None and job.adapter is not None:
        runner.weights.take(job.digest, job.adapter)
    samples = runner.begin(job)
    if nearest:
        told = samples[0].told
        cells = latent_mask(job.mask, runner.base.cell_px, nearest=True)
        told.known = torch.cat([cells[None].to(told.known), told.known[1:]])
    for step in range(1, job.steps + 1):
        for start in range(0, len(samples), runner.max_samples):
            runner.step(samples[start : start + runner.max_samples])
        after_step(step, samples)
    if job.digest is not None:
        runner.weights.give_back(job.digest)
    return samples
