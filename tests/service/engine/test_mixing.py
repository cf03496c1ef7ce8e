"""Many scenes in one batch: each sample is what it would be alone, whoever its neighbours are."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from realfill.adapter import Adapter
from realfill.base import Base
from realfill.errors import AdapterMismatch, InvalidCapsule
from service.engine.job import Job
from service.engine.runner import Application, Runner
from service.engine.sample import Sample
from service.engine.segmented import LowRankLayer
from service.engine.weights import Part, SpoiltWeights, divided
from tests.products import PRODUCTS
from tests.tiny import tiny_adapter, tiny_base

WAYS = ["fused", "segmented"]
STEPS = 4
MILD = 0.1
# Low-rank terms are not rounded and merged weights are; a network of random weights magnifies that.
FAR = {torch.float32: 2e-4, torch.bfloat16: 0.25}


@pytest.fixture
def base() -> Base:
    """A tiny base of its own for each test."""
    return tiny_base()


def job_for(base: Base, digest: str | None, seed: int, **changes: Any) -> Job:
    """A job of three seeds with its own picture; the adapter follows from the seed."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(32, 32)
    mask[4:20, 8:28] = 1
    job = Job(
        digest=digest,
        # Mild enough that rounding is not blown up over the steps.
        adapter=None if digest is None else tiny_adapter(base, seed, scale=MILD),
        prompt_embedding=torch.randn(77, 16, generator=generator),
        target=torch.rand(3, 32, 32, generator=generator),
        mask=mask,
        seeds=(seed, seed + 100, seed + 200),
        steps=STEPS,
        sampler="dpm++2m",
    )
    return dataclasses.replace(job, **changes)


def begun(runner: Runner, job: Job) -> list[Sample]:
    """The job's samples, its adapter taken."""
    if job.digest is not None and job.adapter is not None:
        assert runner.weights.take(job.digest, job.adapter)
    return runner.begin(job)


def runner_of(base: Base, application: Application, **settings: Any) -> Runner:
    """A runner that draws scenes in one call, however many samples they have."""
    return Runner(base, application=application, split_from=99, **settings)


def drawn(runner: Runner, jobs: list[Job]) -> list[Tensor]:
    """Latents of several jobs that are stepped together. [3, C, h, w] each"""
    samples = [begun(runner, job) for job in jobs]
    for _ in range(STEPS):
        runner.step([sample for of_job in samples for sample in of_job])
    return [torch.stack([sample.latents for sample in of_job]) for of_job in samples]


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("application", WAYS)
def test_scenes_in_one_batch_are_drawn_as_if_alone(
    base: Base, application: Application, products: torch.dtype
) -> None:
    """Three scenes and the bare base together; fused to the bit, segmented within rounding."""
    runner = runner_of(dataclasses.replace(base, products=products), application)
    jobs = [job_for(base, digest, k) for k, digest in enumerate(("a", "b", None, "c"))]
    alone = [drawn(runner, [job])[0] for job in jobs]
    together = drawn(runner, jobs)
    for one, other in zip(alone, together, strict=True):
        if application == "fused":
            assert torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=0, atol=FAR[products])
    # The adapters do something, or the test could not fail: what is drawn together is far nearer to
    # itself alone than to the base's.
    plain = drawn(runner, [dataclasses.replace(jobs[0], digest=None, adapter=None)])[0]
    off, effect = (together[0] - alone[0]).abs().mean(), (plain - alone[0]).abs().mean()
    assert off < 0.2 * effect


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("application", WAYS)
def test_a_sample_does_not_depend_on_its_neighbours(
    base: Base, application: Application, products: torch.dtype
) -> None:
    """In a batch of equal size, other scenes beside it change none of its bits."""
    runner = runner_of(dataclasses.replace(base, products=products), application)
    job = job_for(base, "a", 1)
    first = drawn(runner, [job, job_for(base, "b", 2), job_for(base, "c", 3)])[0]
    second = drawn(runner, [job, job_for(base, "d", 4), job_for(base, "b", 2)])[0]
    last = drawn(runner, [job_for(base, "d", 4), job_for(base, "b", 2), job])[2]
    assert torch.equal(first, second)
    assert torch.equal(first, last)


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("application", WAYS)
def test_samples_join_and_leave_between_steps(
    base: Base, application: Application, products: torch.dtype
) -> None:
    """Each at its own step, sampler and scene: joining late or losing company changes nothing."""
    runner = runner_of(dataclasses.replace(base, products=products), application)
    early = job_for(base, "a", 1)
    late = job_for(base, "b", 2, steps=6, sampler="ddpm")
    expected = {}
    for job in (early, late):
        samples = begun(runner, job)
        for _ in range(job.steps):
            runner.step(samples)
        expected[job.digest] = torch.stack([sample.latents for sample in samples])
    one, other = begun(runner, early), begun(runner, late)
    for moving in ([one], [one, other], [one, other], [one, other], [other], [other], [other]):
        runner.step([sample for samples in moving for sample in samples])
    for samples, digest in ((one, "a"), (other, "b")):
        assert all(sample.finished for sample in samples)
        got = torch.stack([sample.latents for sample in samples])
        torch.testing.assert_close(got, expected[digest], rtol=0, atol=FAR[products])
        if application == "fused":
            assert torch.equal(got, expected[digest])


@pytest.mark.parametrize("application", WAYS)
def test_a_thousand_swaps_drift_by_no_bit(base: Base, application: Application) -> None:
    """After a thousand changes of composition the first prediction comes out again."""
    runner = runner_of(base, application)
    for digest, seed in (("a", 1), ("b", 2)):
        assert runner.weights.take(digest, tiny_adapter(base, seed))
    first = drawn(runner, [job_for(base, "a", 1)])[0]
    plain = drawn(runner, [job_for(base, None, 1)])[0]
    for k in range(1000):
        runner.weights.apply([Part("ab"[k % 2], 1)])
    assert torch.equal(drawn(runner, [job_for(base, "a", 1)])[0], first)
    assert torch.equal(drawn(runner, [job_for(base, None, 1)])[0], plain)


@pytest.mark.parametrize("application", WAYS)
def test_a_poisoned_adapter_reaches_nobody(base: Base, application: Application) -> None:
    """NaN and foreign modules are refused, and the scene beside them is drawn as before."""
    runner = runner_of(base, application)
    before = drawn(runner, [job_for(base, "a", 1)])[0]
    poison = tiny_adapter(base, 2)
    path = next(iter(poison.factors))
    poison.factors[path][0][0, 0] = torch.nan
    with pytest.raises(InvalidCapsule, match="NaN or infinity"):
        runner.weights.take("poison", poison)
    wrong = tiny_adapter(base, 3)
    wrong.factors["nowhere.to_q"] = wrong.factors[path]
    with pytest.raises(AdapterMismatch, match=r"nowhere\.to_q"):
        runner.weights.take("wrong", wrong)
    with pytest.raises(RuntimeError, match="poison is not ready"):
        runner.weights.apply([Part("poison", 1)])
    assert torch.equal(drawn(runner, [job_for(base, "a", 1)])[0], before)
    assert runner.weights.traces() == {"a"}


@pytest.mark.parametrize("application", WAYS)
def test_names_that_contain_each_other_stay_apart(base: Base, application: Application) -> None:
    """Dropping scene1 leaves scene10 as it was."""
    runner = runner_of(base, application)
    before = drawn(runner, [job_for(base, "scene10", 10)])[0]
    drawn(runner, [job_for(base, "scene1", 1)])
    for digest in ("scene1", "scene10"):
        # No pin keeps it.
        runner.weights.give_back(digest)
    assert runner.weights.forget("scene1")
    runner.weights.settle()
    assert runner.weights.traces() == {"scene10"}
    assert torch.equal(drawn(runner, [job_for(base, "scene10", 10)])[0], before)


@pytest.mark.parametrize("application", WAYS)
def test_weights_written_from_elsewhere_are_not_drawn_with(
    base: Base, application: Application
) -> None:
    """The batch is refused, in whatever composition, and the next one is sound."""
    runner = runner_of(base, application)
    jobs = [job_for(base, "a", 1), job_for(base, "b", 2)]
    before = drawn(runner, jobs)
    with torch.no_grad():
        base.unet.get_submodule(runner.weights.module_paths[2]).weight.mul_(1.01)
    with pytest.raises(SpoiltWeights, match="written from elsewhere"):
        drawn(runner, jobs)
    for one, other in zip(drawn(runner, jobs), before, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("application", WAYS)
def test_adapters_of_different_ranks_share_a_batch(base: Base, application: Application) -> None:
    """Ranks 3, 16 and 20 beside each other, each padded no further than to the next 16."""
    runner = runner_of(base, application)
    ranks = {"three": 3, "sixteen": 16, "twenty": 20}
    jobs = [
        job_for(base, name, k, adapter=tiny_adapter(base, k, rank=rank, scale=MILD))
        for k, (name, rank) in enumerate(ranks.items())
    ]
    alone = [drawn(runner, [job])[0] for job in jobs]
    for one, other in zip(drawn(runner, jobs), alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


def test_an_adapter_takes_a_slot_of_its_rank_and_no_wider(base: Base) -> None:
    """To the next 16: where all were padded to the largest that there may be, few would fit."""
    held = {}
    for rank in (3, 16, 20, 128):
        runner = runner_of(base, "segmented")
        drawn(runner, [job_for(base, "it", 1, adapter=tiny_adapter(base, 1, rank=rank))])
        held[rank] = runner.weights.tiers()["device"].held_bytes
        runner.release()
    assert held[3] == held[16]
    assert held[20] == 2 * held[16]
    assert held[128] == 8 * held[16]


def test_a_batch_multiplies_by_the_ranks_that_are_in_it(base: Base) -> None:
    """Two scenes of one class add one term of its rank; a third of another adds one more."""
    runner = runner_of(base, "segmented")
    ranks = {"three": 3, "sixteen": 16, "twenty": 20}
    jobs = [
        job_for(base, name, k, adapter=tiny_adapter(base, k, rank=rank, scale=MILD))
        for k, (name, rank) in enumerate(ranks.items())
    ]
    drawn(runner, jobs[:2])
    assert runner.weights.mode == (16,)
    drawn(runner, jobs)
    assert runner.weights.mode == (16, 32)


@pytest.mark.parametrize("application", WAYS)
def test_another_scenes_weights_are_not_drawn_with(base: Base, application: Application) -> None:
    """What lies under a scene's name tells whose it is, alone and among others."""
    runner = runner_of(base, application)
    jobs = [job_for(base, "a", 1), job_for(base, "b", 2)]
    drawn(runner, jobs)
    weights: Any = runner.weights
    tier = weights._tier if application == "fused" else weights._class_of["a"].tier
    tier._entries["a"].value = tier._entries["b"].value
    for together in (jobs, jobs[:1]):
        with pytest.raises(SpoiltWeights, match="hold adapter b where a was asked for"):
            drawn(runner, together)
    sample = begun(runner, jobs[1])[:1]
    runner.step(sample)
    assert sample[0].drawn_with == "b"


def test_layers_and_terms_in_one_operation_draw_the_same(base: Base) -> None:
    """As on a GPU: the first rank class with the layer, the others after it, as one by one."""
    runner = runner_of(base, "segmented")
    jobs = [
        job_for(base, "sixteen", 1, adapter=tiny_adapter(base, 1, rank=16, scale=MILD)),
        job_for(base, None, 2),
        job_for(base, "twenty", 3, adapter=tiny_adapter(base, 3, rank=20, scale=MILD)),
    ]
    apart = drawn(runner, jobs)
    layers = [base.unet.get_submodule(path).forward for path in runner.weights.module_paths]
    for layer in layers:
        assert isinstance(layer, LowRankLayer)
        assert not layer.fused
        layer.fused = True
    for one, other in zip(drawn(runner, jobs), apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


def test_an_adapter_of_few_modules_leaves_the_others_to_the_base(base: Base) -> None:
    """What it does not change is the base's, also where another scene's set was before."""
    whole = tiny_adapter(base, 1)
    path = next(iter(whole.factors))
    part = Adapter(factors={path: whole.factors[path]}, scale=2.0)
    outcomes = []
    for application in WAYS:
        runner = runner_of(base, application)  # type: ignore[arg-type]
        drawn(runner, [job_for(base, "whole", 1)])
        outcomes.append(drawn(runner, [job_for(base, "part", 1, adapter=part)])[0])
        runner.release()
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=0, atol=2e-4)


@pytest.mark.parametrize("application", WAYS)
def test_an_arena_for_one_scene_serves_many_in_turn(base: Base, application: Application) -> None:
    """What is pinned leaves no room; given back, it does, and comes back the same."""
    runner = runner_of(base, application, arena_bytes=1)
    first = drawn(runner, [job_for(base, "a", 1)])[0]
    assert not runner.weights.take("b", tiny_adapter(base, 2))
    runner.weights.give_back("a")
    assert runner.weights.take("b", tiny_adapter(base, 2))
    runner.weights.give_back("b")
    assert torch.equal(drawn(runner, [job_for(base, "a", 1)])[0], first)
    metrics = runner.weights.tiers()["device"]
    assert (metrics.entries, metrics.pinned, metrics.evictions) == (1, 1, 2)


@pytest.mark.parametrize("application", WAYS)
def test_released_base_is_what_it_was(base: Base, application: Application) -> None:
    """Weights, bits of a prediction and the layers' own ways."""
    inputs = torch.randn(2, 9, 4, 4), torch.tensor([500, 20]), torch.zeros(2, 77, 16)
    with torch.no_grad():
        before = base.unet(*inputs).sample
        runner = runner_of(base, application)
        drawn(runner, [job_for(base, "a", 1), job_for(base, "b", 2)])
        runner.release()
        assert torch.equal(base.unet(*inputs).sample, before)
    assert not any("forward" in vars(module) for module in base.unet.modules())


def test_fused_weights_need_a_cpu_in_float32(base: Base) -> None:
    """Elsewhere the way is segmented, and asking for the other says so."""
    base.unet.to(torch.bfloat16)
    assert Runner(base).weights.name == "segmented"
    with pytest.raises(ValueError, match="choose 'auto' or 'segmented'"):
        Runner(base, application="fused")


def test_large_parts_run_alone_and_small_ones_together() -> None:
    """From eight samples on; without a bound all run together."""
    parts = [Part("a", 8), Part("b", 2), Part("c", 9), Part("d", 1)]
    assert divided(parts, 8) == [[0], [2], [1, 3]]
    assert divided(parts, None) == [[0, 1, 2, 3]]
    assert divided(parts[:1], 4) == [[0]]
