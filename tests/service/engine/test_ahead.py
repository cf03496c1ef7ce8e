"""A device that computes by itself is given its next step in time, and at most one ahead."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from realfill.base import Base
from service.engine import Engine
from service.engine.moment import HostMoment, Moment
from service.engine.runner import Runner
from service.engine.sample import Sample
from service.errors import Cancelled, EngineClosed
from tests.service.engine.test_lane import WAIT_S, job_for
from tests.tiny import tiny_base

# Long beside what the CPU takes to compute the same.
STEP_S = 0.06
# What giving a step takes the host besides, for which a device that is waited for would be idle.
GIVE_S = 0.01


@dataclass
class Later:
    """A moment that a slow device comes to at a known time."""

    at: float
    failure: Exception | None = None

    def passed(self) -> bool:
        """By the clock."""
        return time.perf_counter() >= self.at

    def wait(self) -> None:
        """By the clock; then tell how the device failed."""
        time.sleep(max(0.0, self.at - time.perf_counter()))
        if self.failure is not None:
            raise self.failure

    def since(self, earlier: Moment) -> float:
        """Of two of them."""
        assert isinstance(earlier, Later)
        return self.at - earlier.at


class SlowDevice:
    """Stands in for a GPU: steps return at once and are over one after the other, much later.

    Attributes:
        batches: Samples of each step.
        idle_s: How long the device had nothing to do before each step.
        ahead_s: What it still had to do when it was given each step.
        failure: Raised where its work is waited for.
    """

    def __init__(self, runner: Runner) -> None:
        self.batches: list[int] = []
        self.idle_s: list[float] = []
        self.ahead_s: list[float] = []
        self.failure: Exception | None = None
        self._free_at = 0.0
        self._step = runner.step
        runner.step = self.step  # type: ignore[method-assign]
        runner.moment = self.moment  # type: ignore[method-assign]
        runner.synchronize = lambda: self.moment().wait()  # type: ignore[method-assign]

    def step(self, samples: Sequence[Sample]) -> None:
        """Compute now, and be through with it later."""
        self.batches.append(len(samples))
        self._step(samples)
        time.sleep(GIVE_S)
        now = time.perf_counter()
        self.idle_s.append(max(0.0, now - self._free_at))
        self.ahead_s.append(max(0.0, self._free_at - now))
        self._free_at = max(now, self._free_at) + STEP_S

    def moment(self) -> Later:
        """When everything so far is over."""
        return Later(max(time.perf_counter(), self._free_at), self.failure)


@pytest.fixture(scope="module")
def base() -> Base:
    """One tiny base, handed from engine to engine."""
    return tiny_base()


def slow(engine: Engine) -> SlowDevice:
    """A slow device under an engine that knows how slow it is."""
    engine.cost.calibrate([1], lambda size: STEP_S, lambda: 0.0)
    engine.cost.step_s = lambda size, **_: STEP_S  # type: ignore[method-assign]
    return SlowDevice(engine.runner)


def wait_for(condition: Callable[[], bool]) -> None:
    """Or fail."""
    ends = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.001)


def test_a_device_is_never_without_a_step_nor_more_than_one_behind(base: Base) -> None:
    """Twenty steps follow each other at once; the pictures are those of a device that waits."""
    job = job_for(base, steps=20)
    with Engine(base) as engine:
        alone = engine.submit(job).result(WAIT_S)
        device = slow(engine)
        began = time.perf_counter()
        sampled = engine.submit(job).result(WAIT_S)
        took_s = time.perf_counter() - began
        metrics = engine.metrics()
    assert torch.equal(sampled.samples, alone.samples)
    # A lane that waits would never give it a step while it has one; a slow machine may be late.
    assert 0 < max(device.ahead_s) < STEP_S
    assert 20 * STEP_S <= sampled.sample_s <= took_s
    # Each step is counted once, and by the device's own time.
    assert metrics.steps == 2 * 20
    assert metrics.sample_steps == 2 * 40


def test_listeners_hear_of_a_step_when_the_device_is_through_with_it(base: Base) -> None:
    """Of each in its order, the last before the answer."""
    heard: list[tuple[int, float]] = []
    with Engine(base) as engine:
        slow(engine)
        began = time.perf_counter()

        def on_step(done: int, total: int) -> None:
            heard.append((done, time.perf_counter() - began))

        future = engine.submit(job_for(base, steps=5, on_step=on_step))
        future.add_done_callback(lambda _: heard.append((0, 0.0)))
        future.result(WAIT_S)
    assert [done for done, _ in heard] == [2, 4, 6, 8, 10, 0]
    assert all(at >= (k + 1) * STEP_S for k, (_, at) in enumerate(heard[:-1]))


def test_who_comes_during_a_step_is_in_the_next(base: Base) -> None:
    """The next step is not given to the device before it is needed."""
    with Engine(base) as engine:
        device = slow(engine)
        long = job_for(base, steps=500)
        running = engine.submit(long)
        wait_for(lambda: len(device.batches) == 3)
        short = engine.submit(job_for(base, steps=2))
        short.result(WAIT_S)
        long.cancel.set()
        with pytest.raises(Cancelled):
            running.result(WAIT_S)
    assert device.batches[:6] == [2, 2, 2, 4, 4, 2]


def test_a_cancelled_job_is_in_no_step_that_the_device_does_not_have(base: Base) -> None:
    """Cancelled while the device computes: that step is its last, and another job's is next."""
    with Engine(base) as engine:
        device = slow(engine)
        job = job_for(base, steps=500, seeds=(1, 2, 3))
        running = engine.submit(job)
        wait_for(lambda: len(device.batches) == 3)
        job.cancel.set()
        engine.submit(job_for(base, steps=2)).result(WAIT_S)
        with pytest.raises(Cancelled):
            running.result(0)
    assert device.batches == [3, 3, 3, 2, 2]


def test_a_listener_that_fails_a_step_later_fails_its_own_job(base: Base) -> None:
    """By then both jobs have their next step, in which the other goes on undisturbed."""

    def broken(done: int, total: int) -> None:
        raise RuntimeError("listener broke")

    with Engine(base) as engine:
        alone = engine.submit(job_for(base, steps=6)).result(WAIT_S)
        device = slow(engine)
        good = engine.submit(job_for(base, steps=6))
        bad = engine.submit(job_for(base, seeds=(7,), steps=6, on_step=broken))
        with pytest.raises(RuntimeError, match="listener broke"):
            bad.result(WAIT_S)
        assert torch.equal(good.result(WAIT_S).samples, alone.samples)
    assert device.batches.count(3) <= 2


def test_a_batch_that_fails_behind_another_is_tried_job_by_job(base: Base) -> None:
    """The step before it is counted, and the job without fault ends with its own bits."""
    with Engine(base) as engine:
        alone = engine.submit(job_for(base, steps=4)).result(WAIT_S)
        device = slow(engine)
        step = engine.runner.step

        def failing(samples: Any) -> None:
            if any(sample.seed == 13 and sample.index == 1 for sample in samples):
                raise RuntimeError("out of memory")
            step(samples)

        engine.runner.step = failing  # type: ignore[method-assign]
        # Both begin in one turn, behind a job that is there already.
        first = job_for(base, seeds=(9,), steps=500)
        engine.submit(first)
        wait_for(lambda: len(device.batches) == 1)
        bad = engine.submit(job_for(base, seeds=(13,), steps=4))
        good = engine.submit(job_for(base, steps=4))
        with pytest.raises(RuntimeError, match="out of memory"):
            bad.result(WAIT_S)
        assert torch.equal(good.result(WAIT_S).samples, alone.samples)
        first.cancel.set()


def test_a_device_that_is_lost_during_a_step_ends_the_lane(base: Base) -> None:
    """It shows where the step is waited for, and all jobs are told."""
    with Engine(base) as engine:
        device = slow(engine)
        futures = [engine.submit(job_for(base, steps=500)) for _ in range(2)]
        wait_for(lambda: len(device.batches) >= 2)
        device.failure = RuntimeError("device lost")
        for future in futures:
            with pytest.raises(EngineClosed, match="device lost"):
                future.result(WAIT_S)
        assert str(engine.failure) == "device lost"


def test_a_deadline_ends_a_job_behind_the_step_under_way(base: Base) -> None:
    """Pairs of two steps each: those whose last step the device has are answered."""
    seeds = tuple(range(20))
    with Engine(base, max_samples=2) as engine:
        whole = engine.submit(job_for(base, seeds=seeds)).result(WAIT_S)
        device = slow(engine)
        deadline = time.monotonic() + 7.5 * STEP_S
        engine.cost.alone_s = lambda *_, **__: 0.0  # type: ignore[method-assign]
        engine.cost.seconds_for = lambda *_, **__: 0.0  # type: ignore[method-assign]
        partial = engine.submit(job_for(base, seeds=seeds, deadline=deadline)).result(WAIT_S)
    assert partial.partial
    assert len(partial.seeds) == len(device.batches) // 2 * 2
    assert 2 <= len(partial.seeds) <= 8
    assert torch.equal(partial.samples, whole.samples[: len(partial.seeds)])


def test_a_cpu_has_always_come_to_a_moment() -> None:
    """Nothing is waited for, and seconds are the clock's."""
    earlier = HostMoment()
    time.sleep(0.01)
    later = HostMoment()
    assert later.passed()
    later.wait()
    assert 0.01 <= later.since(earlier) < WAIT_S


@pytest.mark.gpu
def test_a_gpu_comes_to_a_moment_by_itself() -> None:
    """A second of work is not waited for where a moment is made, and is measured by the device."""
    runner = Runner(_on_gpu())
    earlier = runner.moment()
    torch.cuda._sleep(1_000_000_000)
    later = runner.moment()
    assert not later.passed()
    later.wait()
    assert later.passed()
    assert later.since(earlier) > 0.1
    runner.release()


@pytest.mark.gpu
def test_jobs_on_a_gpu_are_drawn_as_without_a_lane() -> None:
    """Steps that are given ahead, with noise of their own, read no numbers of the step after."""
    base = _on_gpu()
    with Engine(base) as engine:
        for sampler in ("ddim", "ddpm", "dpm++2m"):
            job = job_for(base, seeds=(1, 2, 3, 4), steps=30, sampler=sampler)
            lane = engine.submit(job).result(WAIT_S)
            assert torch.equal(engine.runner.run(job).samples, lane.samples)


def _on_gpu() -> Base:
    base = tiny_base()
    for module in (base.unet, base.autoencoder):
        module.to("cuda", torch.bfloat16)
    return base
