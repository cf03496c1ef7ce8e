"""Sample-steps per second by batch, and the same job by diffusers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionInpaintPipeline,
)
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor.exc import InductorError

from benchmarks.engine.bench import running
from benchmarks.engine.timing import quantile, repeated, seconds_of
from realfill.base import PROMPT, Base
from realfill.complete.samplers import noise_for
from realfill.masks import latent_mask
from service.engine import Job

PIPELINE = "diffusers StableDiffusionInpaintPipeline, all seeds in one batch"
# The schedulers of diffusers that jobs are done with.
Scheduler: TypeAlias = DPMSolverMultistepScheduler | DDPMScheduler
LOOP = "the same loop with diffusers' DPMSolverMultistepScheduler, one image at a time"
BATCHED_LOOP = "the same loop with diffusers' DPMSolverMultistepScheduler, one batch"
COMPILED = "the same loop in one batch, its U-Net by torch.compile"


@dataclass(frozen=True)
class Comparison:
    """One job done by the engine and by a peer, in seconds per job."""

    peer: str
    ours_s: list[float]
    peer_s: list[float]

    @property
    def ratio(self) -> float:
        """How many times faster the engine is, by medians."""
        return quantile(self.peer_s, 50) / quantile(self.ours_s, 50)


def job_of(base: Base, *, samples: int, steps: int) -> Job:
    """A square of noise with a hole in its middle, to be completed by the base alone."""
    size = base.size_px
    mask = torch.zeros(size, size)
    mask[size // 4 : -size // 4, size // 4 : -size // 4] = 1
    return Job(
        digest=None,
        adapter=None,
        prompt_embedding=base.embed(PROMPT).detach(),
        target=torch.rand(3, size, size, generator=torch.Generator().manual_seed(0)),
        mask=mask,
        seeds=tuple(range(samples)),
        steps=steps,
        sampler="dpm++2m",
    )


def sample_steps_per_s(base: Base, batch: int, *, steps: int, repeats: int) -> list[float]:
    """Sample-steps per second of the encoding and all steps of one batch, run after run."""
    job = job_of(base, samples=batch, steps=steps)
    with running(base, max_samples=batch) as runner:
        runner.run(job)
        return [job.sample_steps / runner.run(job).sample_s for _ in range(repeats)]


def plain_copy(base: Base) -> Base:
    """What peers compute with: layers in their own way, all in what the engine multiplies in."""
    dtype = base.multiplies_in
    # Not by diffusers' own method, which warns of layers that these models do not have.
    parts = [nn.Module.to(copy.deepcopy(part), dtype) for part in (base.unet, base.autoencoder)]
    return dataclasses.replace(base, unet=parts[0], autoencoder=parts[1])


def compare(base: Base, *, samples: int, steps: int, repeats: int) -> list[Comparison]:
    """Encode, sample and decode one job by the engine and by diffusers, in turns.

    Returns:
        First the comparison with diffusers' pipeline where it takes the base's parts, else with
        its scheduler in a plain loop, an image at a time; then the loop with one batch.
    """
    plain = plain_copy(base)
    job = job_of(base, samples=samples, steps=steps)
    peers: dict[str, Callable[[], object]] = {LOOP: lambda: loop(plain, job, batch=1)}
    if fits_pipeline(base):
        peers = {PIPELINE: pipeline(plain, job)}
    peers[BATCHED_LOOP] = lambda: loop(plain, job, batch=samples)
    ours_s: list[float] = []
    peer_s: dict[str, list[float]] = {peer: [] for peer in peers}
    with running(base, max_samples=samples) as runner:
        for turn in range(repeats):
            warm_up = int(turn == 0)
            ours_s += repeated(lambda: runner.run(job), 1, base.device, warm_up=warm_up)
            for peer, work in peers.items():
                peer_s[peer] += repeated(work, 1, base.device, warm_up=warm_up)
    return [Comparison(peer, ours_s, seconds) for peer, seconds in peer_s.items()]


@dataclass(frozen=True)
class Compiled:
    """The same job by the engine and by diffusers' loop with a compiled U-Net.

    Attributes:
        compile_s: What its first run took.
    """

    comparison: Comparison
    compile_s: float


def compare_compiled(base: Base, *, samples: int, steps: int, repeats: int) -> Compiled:
    """One job by the engine, and in one batch by diffusers' loop whose U-Net is compiled, in turns.

    On a CPU its weights are frozen into the code, which is fastest there and takes one scene alone.

    Raises:
        RuntimeError: It cannot be compiled here, as a rule for want of a compiler.
    """
    # What was compiled before, for another copy, would be taken again, and is not frozen.
    torch.compiler.reset()
    plain = plain_copy(base)
    plain = dataclasses.replace(plain, unet=torch.compile(plain.unet))
    job = job_of(base, samples=samples, steps=steps)
    ours_s: list[float] = []
    peer_s: list[float] = []
    freezing = inductor.patch(freezing=base.device.type == "cpu")
    with running(base, max_samples=samples) as runner, freezing:
        try:
            compile_s = seconds_of(lambda: loop(plain, job, batch=samples), base.device)
        except InductorError as error:
            raise RuntimeError(
                f"torch.compile failed ({error.__cause__ or type(error).__name__}): install g++ if "
                "there is none, or leave the part 'compiled' out."
            ) from error
        for turn in range(repeats):
            warm_up = int(turn == 0)
            ours_s += repeated(lambda: runner.run(job), 1, base.device, warm_up=warm_up)
            peer_s += repeated(
                lambda: loop(plain, job, batch=samples), 1, base.device, warm_up=warm_up
            )
    torch.compiler.reset()
    return Compiled(Comparison(COMPILED, ours_s, peer_s), compile_s)


def fits_pipeline(base: Base) -> bool:
    """Whether diffusers' pipeline takes this base: it knows 9 channels and AutoencoderKL only."""
    nine = int(base.unet.config.in_channels) == 9
    return nine and isinstance(base.autoencoder, AutoencoderKL)


def pipeline(base: Base, job: Job, *, scheduler: Scheduler | None = None) -> Callable[[], Tensor]:
    """The job by StableDiffusionInpaintPipeline made of the base's parts. [N, 3, S, S]

    Without a scheduler it is diffusers' DPM-Solver++, as for `loop`.
    """
    pipe = StableDiffusionInpaintPipeline(
        vae=base.autoencoder,
        text_encoder=None,
        tokenizer=None,
        unet=base.unet,
        scheduler=scheduler or _scheduler(base),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    prompt = job.prompt_embedding[None].to(base.device, base.dtype)

    def run() -> Tensor:
        return pipe(
            image=job.target[None],
            mask_image=job.mask[None, None],
            prompt_embeds=prompt,
            height=base.size_px,
            width=base.size_px,
            num_inference_steps=job.steps,
            guidance_scale=1.0,
            strength=1.0,
            num_images_per_prompt=len(job.seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in job.seeds],
            output_type="pt",
        ).images

    return run


@torch.no_grad()
def loop(base: Base, job: Job, *, batch: int, scheduler: Scheduler | None = None) -> Tensor:
    """The job by diffusers' scheduler and models, as its pipeline would do it. [N, 3, S, S]"""
    scheduler = scheduler or _scheduler(base)
    prompt = job.prompt_embedding[None].to(base.device, base.dtype)
    cells = latent_mask(job.mask, base.cell_px)[None, None].to(base.device, base.dtype)
    images = []
    for start in range(0, len(job.seeds), batch):
        seeds = job.seeds[start : start + batch]
        # Of the steps' noise, where the scheduler draws any.
        generator = torch.Generator().manual_seed(seeds[0])
        masked = base.encode((job.target * (1 - job.mask) + 0.5 * job.mask)[None])
        known = torch.cat([cells, masked], 1).expand(len(seeds), -1, -1, -1)
        scheduler.set_timesteps(job.steps, device=base.device)
        noise = [noise_for(seed, 0, masked.shape[1:]) for seed in seeds]
        latents = torch.stack(noise).to(base.device, base.dtype) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)
            stacked = torch.cat([scaled, known], 1)
            prompts = prompt.expand(len(seeds), -1, -1)
            predicted = base.unet(stacked, timestep, encoder_hidden_states=prompts).sample
            stepped = scheduler.step(predicted, timestep, latents, generator=generator)
            latents = stepped.prev_sample
        images.append(base.decode(latents))
    return torch.cat(images)


def _scheduler(base: Base) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler.from_config(
        base.scheduler.config, algorithm_type="dpmsolver++", timestep_spacing="trailing"
    )
