"""Jobs share the lane: they join at the next step, end by their deadlines, and give up seeds."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from realfill.base import Base
from realfill.errors import InvalidCapsule
from service.engine import Engine, Halving
from service.engine.lane import MOST_OVERTAKEN
from tests.service.engine.test_lane import WAIT_S, Blocker, job_for
from tests.tiny import tiny_adapter, tiny_base


@pytest.fixture(scope="module")
def base() -> Base:
    """One tiny base, handed from engine to engine."""
    return tiny_base()


def scene(base: Base, name: str, seed: int, **changes: Any) -> Any:
    """A job of a scene with an adapter."""
    return job_for(base, digest=name, adapter=tiny_adapter(base, seed), **changes)


@pytest.mark.usefixtures("one_core")
def test_a_new_job_is_in_the_very_next_batch(base: Base) -> None:
    """While one job stands after its first step of a hundred, another comes and ends before it."""
    with Engine(base) as engine:
        blocker = Blocker(base, steps=100)
        running = blocker.submit(engine)
        batches: list[int] = []
        hook = base.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
        short = engine.submit(job_for(base, steps=3))
        blocker.release.set()
        short.result(WAIT_S)
        assert not running.done()
        running.result(WAIT_S)
        hook.remove()
    # Three batches of both jobs' two samples, at once; then the long one's alone.
    assert batches[:4] == [4, 4, 4, 2]
    assert len(batches) == 99


def test_many_scenes_at_once_each_get_what_they_get_alone(base: Base) -> None:
    """Six jobs of five scenes with other seeds, steps and samplers, all in the lane together."""
    plans = [
        ("a", 1, (1, 2), 4, "ddim"),
        ("b", 2, (3,), 7, "ddpm"),
        ("c", 3, (1, 9, 4), 3, "dpm++2m"),
        ("a", 1, (7,), 5, "dpm++2m"),
        ("d", 4, (5, 6), 2, "ddpm"),
        ("e", 5, tuple(range(20)), 2, "ddim"),
    ]
    jobs = [
        scene(base, name, adapter, seeds=seeds, steps=steps, sampler=sampler)
        for name, adapter, seeds, steps, sampler in plans
    ]
    with Engine(base) as engine:
        alone = [engine.submit(job).result(WAIT_S) for job in jobs]
        blocker = Blocker(base)
        blocker.submit(engine)
        futures = [engine.submit(job) for job in jobs]
        blocker.release.set()
        for job, one, future in zip(jobs, alone, futures, strict=True):
            together = future.result(WAIT_S)
            assert (together.digest, together.seeds) == (job.digest, job.seeds)
            assert torch.equal(together.samples, one.samples)


def test_more_scenes_than_the_arena_holds_take_turns(base: Base) -> None:
    """Five scenes in an arena for one: all are answered, each by itself as it would be alone."""
    jobs = [scene(base, f"scene{k}", k) for k in range(5)]
    with Engine(base) as engine:
        alone = [engine.submit(job).result(WAIT_S).samples for job in jobs]
    with Engine(base, arena_bytes=1) as engine:
        futures = [engine.submit(job) for job in jobs]
        for future, samples in zip(futures, alone, strict=True):
            assert torch.equal(future.result(WAIT_S).samples, samples)
        metrics = engine.metrics()
    assert metrics.completed == 5
    assert metrics.tiers["device"].pinned == 0


def test_a_deadline_ends_a_job_with_what_is_finished(base: Base) -> None:
    """Twenty seeds at two a batch, stopped after the first pairs: their images, marked partial."""
    stop = threading.Event()
    seeds = tuple(range(20))
    with Engine(base, max_samples=2) as engine:
        whole = engine.submit(job_for(base, seeds=seeds)).result(WAIT_S)
        engine.cost.calibrate([1], lambda size: 1e-6, lambda: 0.0)
        deadline = time.monotonic() + 0.5

        def on_step(done: int, total: int) -> None:
            # After three pairs of two steps each, the deadline passes.
            if done == 12:
                stop.set()
                time.sleep(max(0.0, deadline - time.monotonic()) + 0.01)

        job = job_for(base, seeds=seeds, deadline=deadline, on_step=on_step)
        partial = engine.submit(job).result(WAIT_S)
        metrics = engine.metrics()
    assert stop.is_set()
    assert not whole.partial
    assert partial.partial
    assert partial.seeds == seeds[:6]
    assert torch.equal(partial.samples, whole.samples[:6])
    assert (metrics.completed, metrics.partial) == (1, 1)


@pytest.mark.parametrize(("decode_s", "at_first"), [(0.01, 4), (10.0, 1)])
def test_jobs_are_decoded_between_steps_for_as_long_as_a_step_takes(
    base: Base, decode_s: float, at_first: int
) -> None:
    """Four jobs end together: all are answered before the next step of a fifth, or one after it."""
    seen: list[int] = []
    with Engine(base) as engine:
        blocker = Blocker(base)
        blocker.submit(engine)
        engine.cost.calibrate([1, 16], lambda size: 1.0, lambda: decode_s)
        short = [engine.submit(job_for(base, seeds=(k,))) for k in range(4)]

        def on_step(done: int, total: int) -> None:
            seen.append(sum(future.done() for future in short))

        longer = engine.submit(job_for(base, seeds=(9,), steps=12, on_step=on_step))
        blocker.release.set()
        longer.result(WAIT_S)
    assert next(count for count in seen if count) == at_first


def test_halving_gives_up_the_worse_seeds(base: Base) -> None:
    """A judge that likes dark pictures: after both looks the darkest two of eight are left."""
    seen: list[int] = []

    def judge(previews: Tensor) -> Tensor:
        seen.append(len(previews))
        assert previews.shape[1:] == (3, 32, 32)
        return -previews.mean((1, 2, 3))

    seeds = tuple(range(8))
    with Engine(base) as engine:
        job = job_for(base, seeds=seeds, steps=10)
        whole = engine.submit(job).result(WAIT_S)
        kept = engine.submit(job_for(base, seeds=seeds, steps=10, halving=Halving(judge))).result(
            WAIT_S
        )
        metrics = engine.metrics()
    assert seen == [8, 4]
    assert len(kept.seeds) == 2
    for seed, sample in zip(kept.seeds, kept.samples, strict=True):
        assert torch.equal(sample, whole.samples[seed])
    assert metrics.sample_steps == 80 + 8 * 4 + 4 * 3 + 2 * 3
    assert not kept.partial


def test_a_judge_that_fails_gives_nobody_up(base: Base) -> None:
    """All seeds are finished, as without halving."""

    def judge(previews: Tensor) -> Tensor:
        raise RuntimeError("the matcher broke")

    with Engine(base) as engine:
        job = job_for(base, seeds=(1, 2, 3), steps=5, halving=Halving(judge))
        assert engine.submit(job).result(WAIT_S).seeds == (1, 2, 3)


def test_others_go_on_while_a_judge_looks(base: Base) -> None:
    """A judge that waits for another job's end does not wait for ever."""
    other_ended = threading.Event()

    def judge(previews: Tensor) -> Tensor:
        assert other_ended.wait(WAIT_S)
        return torch.zeros(len(previews))

    with Engine(base) as engine:
        halved = engine.submit(job_for(base, steps=4, halving=Halving(judge, looks=(0.5,))))
        engine.submit(job_for(base, steps=20)).result(WAIT_S)
        assert not halved.done()
        other_ended.set()
        assert halved.result(WAIT_S).seeds == (1,)


def test_previews_of_a_large_job_do_not_hold_up_the_others(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few are decoded at once, and others make steps between."""
    told: list[str] = []
    with Engine(base) as engine:
        decode = engine.runner.decode

        def noted(latents: Sequence[Tensor]) -> Tensor:
            told.append(f"{len(latents)} pictures")
            return decode(latents)

        monkeypatch.setattr(engine.runner, "decode", noted)
        blocker = Blocker(base)
        blocker.submit(engine)
        seeds = tuple(range(10))
        halving = Halving(lambda previews: torch.arange(len(previews)).float(), looks=(0.5,))
        halved = engine.submit(job_for(base, seeds=seeds, steps=4, halving=halving))
        other = job_for(base, steps=40, on_step=lambda done, total: told.append("step"))
        running = engine.submit(other)
        blocker.release.set()
        assert halved.result(WAIT_S).seeds == seeds[5:]
        running.result(WAIT_S)
    previews = [place for place, what in enumerate(told) if what in ("4 pictures", "2 pictures")]
    # The blocker's two pictures came first.
    first, second, third = previews[1:4]
    assert [told[place] for place in (first, second, third)] == [
        "4 pictures", "4 pictures", "2 pictures",
    ]  # fmt: skip
    assert "step" in told[first:second]
    assert "step" in told[second:third]


def test_a_job_that_draws_no_picture_fails_alone(base: Base) -> None:
    """An adapter of finite but absurd values: its own job fails, its neighbour's does not."""
    wild = tiny_adapter(base, 1, scale=1e18)
    with Engine(base) as engine:
        good = scene(base, "good", 2, steps=4)
        alone = engine.submit(good).result(WAIT_S)
        blocker = Blocker(base)
        blocker.submit(engine)
        bad = engine.submit(job_for(base, digest="wild", adapter=wild, steps=4))
        beside = engine.submit(good)
        blocker.release.set()
        with pytest.raises(InvalidCapsule, match="not finite"):
            bad.result(WAIT_S)
        assert torch.equal(beside.result(WAIT_S).samples, alone.samples)


def test_a_batch_that_fails_is_tried_job_by_job(base: Base) -> None:
    """An error that only one job's samples cause reaches that job alone."""
    with Engine(base) as engine:
        alone = engine.submit(job_for(base, steps=3)).result(WAIT_S)
        step = engine.runner.step

        def failing(samples: Any) -> None:
            if any(sample.seed == 13 for sample in samples):
                raise RuntimeError("out of memory")
            step(samples)

        engine.runner.step = failing  # type: ignore[method-assign]
        blocker = Blocker(base)
        blocker.submit(engine)
        bad = engine.submit(job_for(base, seeds=(13,), steps=3))
        good = engine.submit(job_for(base, steps=3))
        blocker.release.set()
        with pytest.raises(RuntimeError, match="out of memory"):
            bad.result(WAIT_S)
        assert torch.equal(good.result(WAIT_S).samples, alone.samples)


@pytest.mark.usefixtures("one_core")
def test_a_job_that_the_client_left_frees_the_lane_within_a_step(base: Base) -> None:
    """A hundred samples of five hundred steps are gone before the next job's first step."""
    with Engine(base) as engine:
        blocker = Blocker(base, seeds=tuple(range(30)), steps=500)
        blocker.submit(engine)
        blocker.job.cancel.set()
        batches: list[int] = []
        hook = base.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
        following = engine.submit(job_for(base, steps=3))
        blocker.release.set()
        following.result(WAIT_S)
        hook.remove()
    assert batches == [2, 2, 2]


def test_a_scene_without_room_is_not_passed_over_for_ever(base: Base) -> None:
    """One scene always has jobs in an arena for one; the other gets its turn all the same."""
    answered: list[str] = []
    with Engine(base, arena_bytes=1, max_queue=99, max_running=2) as engine:
        hot = scene(base, "hot", 1, seeds=(1,), steps=3)
        blocker = Blocker(base, digest="hot", adapter=tiny_adapter(base, 1))
        blocker.submit(engine)
        futures = [engine.submit(hot) for _ in range(10)]
        futures.append(engine.submit(scene(base, "cold", 2, seeds=(1,), steps=3)))
        futures += [engine.submit(hot) for _ in range(40)]
        for future in futures:
            future.add_done_callback(lambda done: answered.append(done.result().digest))
        blocker.release.set()
        for future in futures:
            future.result(WAIT_S)
    assert answered.index("cold") < 10 + MOST_OVERTAKEN + 3
