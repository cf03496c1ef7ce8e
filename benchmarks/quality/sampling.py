"""Candidates of a base, alone or with a scene's capsule, on a square at the base's own size."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from realfill.base import PROMPT
from realfill.capsule import read_capsule
from realfill.complete.compositing import composite
from realfill.complete.pipeline import conditions, denoise
from realfill.complete.samplers import sampler as sampler_of
from realfill.complete.seam import seamless
from realfill.masks import latent_mask
from service.engine import Job, Runner


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
        sampler: ddpm, ddim or dpm++2m; None for the base's own.
        nearest: Tell the U-Net the mask as ``latent_mask`` reduces it when asked so, for an
            ablation.

    Returns:
        Candidates on the CPU. [N, 3, S, S]
    """
    base = runner.base
    read = None if capsule is None else read_capsule(capsule, base)
    job = Job(
        digest=None if capsule is None else hashlib.sha256(capsule).hexdigest(),
        adapter=None if read is None else read.adapter,
        prompt_embedding=base.embed(PROMPT).detach() if read is None else read.prompt_embedding,
        target=target,
        mask=mask,
        seeds=tuple(seeds),
        steps=steps or base.steps,
        sampler=sampler or base.sampler,
    )
    sampled = _with_nearest_mask(runner, job) if nearest else runner.run(job).samples
    samples = seamless(sampled.float().cpu(), target, mask)
    return composite(samples, target, mask, feather_px=feather_of(base.size_px))


@torch.no_grad()
def _with_nearest_mask(runner: Runner, job: Job) -> Tensor:
    """What the runner does, but for the mask's reduction to cells. [N, 3, S, S]"""
    base = runner.base
    runner.swapper.apply(job.digest, job.adapter)
    known = conditions(base, job.target, job.mask).clone()
    cells = latent_mask(job.mask, base.cell_px, nearest=True)
    known[:, :1] = cells.to(known)
    table = sampler_of(job.sampler, base.scheduler.config, job.steps).to(base.device)
    samples = []
    for start in range(0, len(job.seeds), runner.max_samples):
        seeds = job.seeds[start : start + runner.max_samples]
        *_, latents = denoise(base, known, job.prompt_embedding, seeds, table)
        samples.append(base.decode(latents))
    return torch.cat(samples)
