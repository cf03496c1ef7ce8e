"""Samples depend on their seed and their adapter only; a cancelled job stops at once."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from realfill.base import Base
from realfill.complete.samplers import noise_for
from service.engine.job import Job
from service.engine.runner import Runner
from service.errors import Cancelled
from tests.products import PRODUCTS
from tests.tiny import tiny_adapter, tiny_base


@pytest.fixture
def base() -> Base:
    """A tiny base of its own for each test, since runners change its weights."""
    return tiny_base()


def job_for(base: Base, seeds: tuple[int, ...] = (1, 2, 3), **changes: Any) -> Job:
    """A job on the bare base, with a hole in the upper left."""
    generator = torch.Generator().manual_seed(7)
    mask = torch.zeros(32, 32)
    mask[3:14, 2:17] = 1.0
    job = Job(
        digest=None,
        adapter=None,
        prompt_embedding=torch.randn(77, 16, generator=generator),
        target=torch.rand(3, 32, 32, generator=generator),
        mask=mask,
        seeds=seeds,
        steps=4,
        sampler="ddim",
    )
    return dataclasses.replace(job, **changes)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m"])
def test_sample_is_bit_equal_at_every_batch_position(base: Base, sampler: str) -> None:
    """A seed gives the same image wherever it stands, whoever its neighbours are."""
    runner = Runner(base)
    one = runner.run(job_for(base, (5, 8, 13, 21), sampler=sampler)).samples
    other = runner.run(job_for(base, (99, 21, 5, 8), sampler=sampler)).samples
    assert torch.equal(one[0], other[2])
    assert torch.equal(one[1], other[3])
    assert torch.equal(one[3], other[1])
    assert not torch.equal(one[2], other[0])


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("sampler", ["ddpm", "dpm++2m"])
def test_sample_is_bit_equal_in_every_size_of_batch(
    base: Base, sampler: str, products: torch.dtype
) -> None:
    """Alone, among seven, or among sixteen: on a CPU a seed's image is the same to the bit."""
    runner = Runner(dataclasses.replace(base, products=products))
    sixteen = runner.run(job_for(base, tuple(range(16)), sampler=sampler)).samples
    for count in (1, 2, 3, 5, 7):
        fewer = runner.run(job_for(base, tuple(range(count)), sampler=sampler)).samples
        assert torch.equal(fewer, sixteen[:count])


@pytest.mark.usefixtures("one_core")
def test_more_seeds_than_a_batch_holds_are_sampled_in_several(base: Base) -> None:
    """Seven seeds at three per call make batches of three, three and one."""
    runner = Runner(base, max_samples=3)
    sizes = []
    hook = base.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    try:
        first = runner.run(job_for(base, (1, 2, 3, 4, 5, 6, 7))).samples
    finally:
        hook.remove()
    assert sizes == [3] * 8 + [1] * 4
    second = runner.run(job_for(base, (7, 6, 5, 4, 3, 2, 1))).samples
    assert first.shape == (7, 3, 32, 32)
    assert torch.equal(first, second.flip(0))


@pytest.mark.usefixtures("one_core")
def test_unet_gets_latents_mask_and_masked_image_in_this_order(base: Base) -> None:
    """The input is [C latents | mask | C latents of the image with grey where it is missing]."""
    job = job_for(base, (4, 9))
    inputs: list[Tensor] = []
    timesteps: list[Tensor] = []

    def record(_: Any, args: tuple[Tensor, Tensor]) -> None:
        inputs.append(args[0])
        timesteps.append(args[1])

    runner = Runner(base)
    hook = base.unet.register_forward_pre_hook(record)
    try:
        runner.run(job)
    finally:
        hook.remove()
    first = inputs[0]
    assert torch.equal(first[0, :4], noise_for(4, 0, (4, 4, 4)))
    assert torch.equal(first[1, :4], noise_for(9, 0, (4, 4, 4)))
    # Rows 3 to 13 and columns 2 to 16 touch two rows of cells of 8 pixels, and three columns.
    cells = torch.zeros(4, 4)
    cells[:2, :3] = 1.0
    assert torch.equal(first[:, 4], cells.expand(2, 4, 4))
    hidden = torch.where(job.mask > 0, torch.full_like(job.target, 0.5), job.target)
    assert torch.equal(first[0, 5:], base.encode(hidden[None])[0])
    assert torch.equal(first[:, 4:], inputs[-1][:, 4:])
    network = vars(base.unet)["forward"]
    for given, timestep in zip(timesteps, (751, 501, 251, 1), strict=True):
        prompts = job.prompt_embedding.expand(1, -1, -1)
        told = network.conditioned(torch.tensor([timestep]), prompts, None)
        assert torch.equal(given, told.times.expand(2, -1))


def test_hidden_pixels_have_no_influence(base: Base) -> None:
    """Whatever lies under the mask, the samples are the same."""
    runner = Runner(base)
    job = job_for(base)
    noisy = torch.where(job.mask > 0, 1 - job.target, job.target)
    assert torch.equal(
        runner.run(job).samples, runner.run(dataclasses.replace(job, target=noisy)).samples
    )


def test_samples_equal_a_plain_loop_with_the_diffusers_scheduler(base: Base) -> None:
    """One seed through U-Net and scheduler of diffusers, alone, gives the same image."""
    job = job_for(base, (6, 2), steps=5)
    scheduler = DDIMScheduler.from_config(base.scheduler.config)
    scheduler.set_timesteps(5)
    latents = noise_for(2, 0, (1, 4, 4, 4)[1:])[None]
    cells = torch.zeros(1, 1, 4, 4)
    cells[..., :2, :3] = 1.0
    known = base.encode((job.target * (1 - job.mask) + 0.5 * job.mask)[None])
    for timestep in scheduler.timesteps:
        prediction = base.unet(
            torch.cat([latents, cells, known], 1), timestep, job.prompt_embedding[None]
        ).sample
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    expected = base.decode(latents)[0]
    samples = Runner(base).run(job).samples
    torch.testing.assert_close(samples[1], expected, rtol=0, atol=1e-4)


def test_adapter_is_swapped_in_and_out_between_jobs(base: Base) -> None:
    """Each job is drawn with its own adapter and says which; the bare base comes back exactly."""
    runner = Runner(base)
    plain = runner.run(job_for(base))
    with_a = job_for(base, digest="a", adapter=tiny_adapter(base, 1))
    with_b = job_for(base, digest="b", adapter=tiny_adapter(base, 2))
    a, b, again = (runner.run(job) for job in (with_a, with_b, with_a))
    assert [s.digest for s in (plain, a, b, again)] == [None, "a", "b", "a"]
    assert torch.equal(a.samples, again.samples)
    assert not torch.equal(a.samples, b.samples)
    assert not torch.equal(a.samples, plain.samples)
    assert torch.equal(runner.run(job_for(base)).samples, plain.samples)
    assert min(a.swap_s, a.sample_s, a.decode_s) > 0


def test_weights_written_from_elsewhere_are_never_sampled(base: Base) -> None:
    """If somebody writes to the U-Net between two batches, the job fails; the next one is sound."""
    runner = Runner(base, max_samples=1)
    job = job_for(base, (1, 2), digest="a", adapter=tiny_adapter(base, 1))
    sound = runner.run(job)
    weight = base.unet.get_submodule(runner.weights.module_paths[3]).weight

    def meddle(done: int, total: int) -> None:
        with torch.no_grad():
            weight.mul_(1.1)

    with pytest.raises(RuntimeError, match="written from elsewhere"):
        runner.run(dataclasses.replace(job, on_step=meddle))
    assert torch.equal(runner.run(job).samples, sound.samples)


def test_cancel_flag_ends_the_job_within_one_step(base: Base) -> None:
    """When the flag is set during step 2 of 50, no third step is made."""
    cancel = threading.Event()
    steps: list[tuple[int, int]] = []

    def on_step(done: int, total: int) -> None:
        steps.append((done, total))
        if done == 2:
            cancel.set()

    with pytest.raises(Cancelled):
        Runner(base).run(job_for(base, steps=50, cancel=cancel, on_step=on_step))
    assert steps == [(1, 50), (2, 50)]


def test_steps_are_reported_over_all_batches(base: Base) -> None:
    """Progress counts the U-Net calls of every batch."""
    steps: list[tuple[int, int]] = []
    runner = Runner(base, max_samples=2)
    runner.run(job_for(base, steps=2, on_step=lambda done, total: steps.append((done, total))))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_job_that_does_not_fit_the_base_is_refused(base: Base) -> None:
    """Wrong sizes, samplers and step counts are named with the remedy."""
    runner = Runner(base)
    for changes, says in (
        ({"target": torch.zeros(3, 64, 64)}, r"target .* takes \(3, 32, 32\)"),
        ({"mask": torch.zeros(1, 32, 32)}, r"mask .* takes \(32, 32\)"),
        ({"prompt_embedding": torch.zeros(77, 8)}, r"prompt_embedding .* takes \(77, 16\)"),
        ({"sampler": "euler"}, "'euler' is unknown"),
        ({"steps": 0}, "use 1 to 1000"),
    ):
        with pytest.raises(ValueError, match=says):
            runner.check(job_for(base, **changes))
    with pytest.raises(ValueError, match="seeds is empty"):
        job_for(base, ())
    with pytest.raises(ValueError, match="pass both, or None for both"):
        job_for(base, digest="a")
    with pytest.raises(ValueError, match="use 1 or more"):
        Runner(base, max_samples=0)
