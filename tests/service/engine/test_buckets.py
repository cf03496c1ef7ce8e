"""Steps in buckets of fixed memory give what steps in fresh memory give."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from realfill.base import Base
from service.engine import Engine
from service.engine.buckets import bucket_sizes
from service.engine.captures import WARM_UPS, Captures
from service.engine.fusion import install_fusion
from service.engine.picture_blocks import KeptLayout
from service.engine.runner import Application, Runner
from tests.service.engine.test_lane import WAIT_S
from tests.service.engine.test_lane import job_for as lane_job
from tests.service.engine.test_mixing import STEPS, begun, drawn, job_for
from tests.tiny import tiny_adapter, tiny_base


@pytest.fixture
def base() -> Base:
    """A tiny base of its own for each test."""
    return tiny_base()


def test_buckets_are_powers_of_two_and_the_largest_batch() -> None:
    """Also where the largest is none."""
    assert bucket_sizes(16) == (1, 2, 4, 8, 16)
    assert bucket_sizes(6) == (1, 2, 4, 6)
    assert bucket_sizes(1) == (1,)


@pytest.mark.parametrize("application", ["fused", "segmented"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++2m"])
def test_a_bucket_draws_what_a_loose_batch_draws(
    base: Base, application: Application, sampler: str
) -> None:
    """Three scenes of three samples in a bucket of sixteen, two of them in one of eight."""
    jobs = [job_for(base, name, k, sampler=sampler) for k, name in enumerate(("a", "b", "c"))]
    loose = Runner(base, application=application, split_from=99)
    expected = drawn(loose, jobs)
    loose.release()
    runner = Runner(base, application=application, split_from=99, static=True)
    for chosen in ([0, 1, 2], [1, 2], [0]):
        for k, got in zip(chosen, drawn(runner, [jobs[k] for k in chosen]), strict=True):
            torch.testing.assert_close(got, expected[k], rtol=0, atol=2e-4)


def test_samples_that_leave_a_bucket_take_nothing_with_them(base: Base) -> None:
    """Steps with changing company; what was packed for others is never drawn with."""
    jobs = [job_for(base, "a", 1), job_for(base, "b", 2, steps=STEPS)]
    loose = Runner(base, application="segmented")
    expected = [drawn(loose, [job])[0] for job in jobs]
    loose.release()
    runner = Runner(base, application="segmented", static=True)
    one, other = (begun(runner, job) for job in jobs)
    both = [*one, *other]
    turns = [one, other, both, list(reversed(one)), other, both, one, other]
    for moving in turns[: 2 * STEPS]:
        if all(not sample.finished for sample in moving):
            runner.step(moving)
    while left := [sample for sample in both if not sample.finished]:
        runner.step(left)
    for samples, wanted in zip((one, other), expected, strict=True):
        got = torch.stack([sample.latents for sample in samples])
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-4)


@torch.no_grad()
def test_fused_layers_change_nothing_but_roundings(base: Base) -> None:
    """Of the U-Net's prediction, and released, not even those."""
    inputs = torch.randn(2, 9, 4, 4), torch.tensor([500, 20]), torch.randn(2, 77, 16)
    plain = base.unet(*inputs).sample
    installed = install_fusion(base.unet)
    # The timestep's embedding; each of the eight residual blocks; of each of the four transformers
    # the norm, the way out, the block, both attentions and the gates; what doubles; and the last
    # norm and activation of all.
    assert len(installed.methods) == 1 + 8 + 6 * 4 + 1 + 2
    torch.testing.assert_close(base.unet(*inputs).sample, plain, rtol=1e-4, atol=1e-4)
    installed.release()
    assert torch.equal(base.unet(*inputs).sample, plain)


@torch.no_grad()
def test_what_leaves_a_transformer_lies_as_what_enters_it(base: Base) -> None:
    """Channels last, and the same numbers as before; diffusers' own way lets them lie otherwise."""
    unet = base.unet.to(memory_format=torch.channels_last)
    transformers = [m for m in unet.modules() if isinstance(m, Transformer2DModel)]
    assert transformers
    for transformer in transformers:
        pictures = torch.randn(2, transformer.in_channels, 4, 4)
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        prompts = torch.randn(2, 77, 16)
        plain = transformer(pictures, prompts, return_dict=False)[0]
        tokens = torch.randn(2, 16, transformer.proj_out.in_features)
        given = (tokens, pictures, 2, 4, 4, tokens.shape[-1])
        theirs = transformer._get_output_for_continuous_inputs(*given)
        ours = KeptLayout(transformer)(*given)
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        installed = install_fusion(unet)
        kept = transformer(pictures, prompts, return_dict=False)[0]
        installed.release()
        assert kept.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(kept, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("application", ["segmented", "fused"])
def test_a_swap_is_rehearsed_and_leaves_nothing(application: Application) -> None:
    """What merges an adapter has run before the first request; the base is as it was."""
    base = tiny_base()
    before = {name: p.clone() for name, p in base.unet.named_parameters()}
    runner = Runner(base, application=application, static=True)
    writes = runner.weights.writes
    runner.warm_up((8,))
    assert runner.weights.writes > writes
    assert runner.weights.tiers()["device"].misses == 1
    assert runner.weights.traces() == set()
    runner.release()
    assert all(torch.equal(p, before[name]) for name, p in base.unet.named_parameters())


@pytest.mark.gpu
def test_nothing_is_captured_after_the_warm_up() -> None:
    """Lone jobs, mixed batches of many sizes and swaps replay what was captured at the start."""
    base = tiny_base()
    for module in (base.unet, base.autoencoder):
        module.to("cuda", torch.bfloat16)
    with Engine(base) as engine:
        engine.submit(lane_job(base)).result(WAIT_S)
        buckets = engine.runner.buckets
        assert buckets is not None
        captured = buckets.captures
        # With merged weights and with slots, prompts and the rest; and pictures, both ways.
        assert captured == 2 * 2 * len(bucket_sizes(16)) + 2
        jobs = [
            dataclasses.replace(
                lane_job(base, seeds=tuple(range(k + 1)), steps=3 + k),
                digest=f"scene{k}",
                adapter=tiny_adapter(base, k, scale=0.1),
            )
            for k in range(5)
        ]
        for future in [engine.submit(job) for job in jobs * 3]:
            assert bool(torch.isfinite(future.result(WAIT_S).samples).all())
        assert buckets.captures == captured


@pytest.mark.gpu
def test_a_capture_that_cannot_be_ended_leaves_the_thread_its_stream() -> None:
    """Otherwise the lane would go on in one where it waits for nobody."""
    device = torch.device("cuda")
    captures, before = Captures(device), torch.cuda.current_stream(device)
    calls: list[int] = []

    def work() -> None:
        calls.append(len(calls))
        if len(calls) > WARM_UPS:
            # Nothing that is captured may wait.
            torch.cuda.synchronize()

    with pytest.raises(RuntimeError):
        captures.of(work)
    assert torch.cuda.current_stream(device) == before
    assert captures.count == 0
