"""Deadlines: who is let in, who gives up samples for them, and when those who wait are told."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace

import pytest
import torch

from realfill.base import Base
from service.engine import Engine
from service.engine.lane import PRUDENCE
from service.engine.task import Task
from service.errors import DeadlineExceeded, QueueFull
from tests.service.engine.test_lane import WAIT_S, Blocker, job_for
from tests.tiny import tiny_base


@pytest.fixture(scope="module")
def base() -> Base:
    """One tiny base, handed from engine to engine."""
    return tiny_base()


@dataclass
class Afterwards:
    """So many seconds for each sample."""

    each_s: float

    def expected_s(self, samples: int) -> float:
        """What they may take."""
        return self.each_s * samples

    least_s = expected_s


def test_a_deadline_leaves_time_to_decode_what_is_finished(base: Base) -> None:
    """And for what comes afterwards: three pairs are finished, and both are expected to take long.

    What is refused, and how many samples move at first, allows for it, too.
    """
    seeds = tuple(range(20))
    decode_s, after_s = 0.05, 0.05
    with Engine(base, max_samples=2) as engine:
        engine.submit(job_for(base, seeds=seeds)).result(WAIT_S)
        engine.cost.calibrate([1], lambda size: 1e-6, lambda: decode_s)
        deadline = time.monotonic() + 6.0

        def on_step(done: int, total: int) -> None:
            if done == 12:
                needs_s = 6 * (decode_s + after_s)
                time.sleep(max(0.0, deadline - needs_s - time.monotonic()) + 0.01)

        after = Afterwards(after_s)
        job = job_for(base, seeds=seeds, on_step=on_step, deadline=deadline, after=after)
        partial = engine.submit(job).result(WAIT_S)
        assert time.monotonic() < deadline
        hopeless = job_for(base, deadline=time.monotonic() + 9, after=Afterwards(60.0))
        with pytest.raises(DeadlineExceeded, match=r"One candidate takes about 60 s"):
            engine.submit(hopeless)
    assert partial.partial
    assert partial.seeds == seeds[:6]


def test_a_deadline_before_the_first_candidate_is_an_error(base: Base) -> None:
    """Nothing is finished, so there is nothing to answer with; the lane goes on."""
    with Engine(base) as engine:
        engine.submit(job_for(base)).result(WAIT_S)
        engine.cost.calibrate([1], lambda size: 1e-6, lambda: 0.0)
        deadline = time.monotonic() + 0.3

        def on_step(done: int, total: int) -> None:
            time.sleep(max(0.0, deadline - time.monotonic()) + 0.01)

        late = engine.submit(job_for(base, steps=50, deadline=deadline, on_step=on_step))
        with pytest.raises(DeadlineExceeded, match="before one candidate was finished"):
            late.result(WAIT_S)
        assert engine.submit(job_for(base)).result(WAIT_S).seeds == (1, 2)


def test_a_promise_that_cannot_be_kept_is_refused(base: Base) -> None:
    """Too short for one candidate: an error. Too much work before it: come back later, and when."""
    with Engine(base, max_samples=1, max_running=1) as engine:
        blocker = Blocker(base, seeds=(1,), steps=11)
        blocker.submit(engine)
        engine.cost.calibrate([1], lambda size: 1.0, lambda: 0.0)
        drift = engine.cost.drift
        soon = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="One candidate takes about"):
            engine.submit(job_for(base, seeds=(1,), steps=2, deadline=soon + 1.5))
        with pytest.raises(QueueFull, match="of work before this job") as refusal:
            engine.submit(job_for(base, seeds=(1,), steps=2, deadline=soon + 5 * drift))
        # It does not begin before ten steps are made, needs two, and has time for five.
        assert refusal.value.retry_after_s == pytest.approx(7 * drift, rel=0.1)
        fits = engine.submit(job_for(base, seeds=(1,), steps=2, deadline=soon + 1000 * drift))
        blocker.release.set()
        assert fits.result(WAIT_S).seeds == (1,)


def test_work_that_can_wait_refuses_nobody(base: Base) -> None:
    """A job with a deadline is in the next batches of who has none, and goes first if it has to."""
    with Engine(base) as engine:
        patient = Blocker(base, seeds=tuple(range(16)), steps=900)
        long = patient.submit(engine)
        engine.cost.calibrate([1, 16], lambda size: 0.05 / engine.cost.drift, lambda: 0.0)
        backlog = engine.backlog_s()
        assert backlog is not None
        assert backlog > 40
        soon = time.monotonic()
        hasty = engine.submit(job_for(base, seeds=(1, 2), steps=4, deadline=soon + 2))
        patient.release.set()
        sampled = hasty.result(WAIT_S)
        assert not long.done()
        patient.job.cancel.set()
    assert sampled.seeds == (1, 2)
    assert not sampled.partial


def test_a_batch_with_others_takes_as_long_as_a_full_one(base: Base) -> None:
    """Two samples beside fourteen of those who can wait: by steps of sixteen, not of two."""
    with Engine(base) as engine:
        patient = Blocker(base, seeds=tuple(range(14)), steps=900)
        patient.submit(engine)
        engine.cost.calibrate([2, 16], lambda size: size / 2 / engine.cost.drift, lambda: 0.0)
        soon = time.monotonic()
        hasty = job_for(base, seeds=(1, 2), steps=2, deadline=soon + 12)
        with pytest.raises(QueueFull) as refusal:
            engine.submit(hasty)
        # On an idle lane it would take two seconds, and be in time once the others are through.
        assert refusal.value.retry_after_s == pytest.approx(14 * 899 / 2 - 10, abs=2)
        # Nor would a single one of many be in time.
        with pytest.raises(QueueFull):
            engine.submit(replace(hasty, seeds=tuple(range(16))))
        engine.submit(replace(hasty, deadline=soon + 20))
        patient.job.cancel.set()
        patient.release.set()


def test_a_promise_to_others_is_kept(base: Base) -> None:
    """Who comes with an earlier deadline goes first, unless one that was promised would be late."""
    with Engine(base, max_samples=1) as engine:
        blocker = Blocker(base, seeds=(1,), steps=3, deadline=time.monotonic() + 1000)
        blocker.submit(engine)
        engine.cost.calibrate([1], lambda size: 1.0 / engine.cost.drift, lambda: 0.0)
        soon = time.monotonic()
        engine.submit(job_for(base, seeds=(1,), steps=20, deadline=soon + 25))
        with pytest.raises(QueueFull, match="promised others") as refusal:
            engine.submit(job_for(base, seeds=(1,), steps=8, deadline=soon + 15))
        # Once that one is through: until then both its time and its work grow less.
        assert refusal.value.retry_after_s == pytest.approx(20, abs=0.5)
        engine.submit(job_for(base, seeds=(1,), steps=4, deadline=soon + 15))
        # Twenty steps and four are before it.
        with pytest.raises(QueueFull, match=r"24 s of work before this job"):
            engine.submit(job_for(base, seeds=(1,), steps=8, deadline=soon + 30))
        for task in [*engine._board.running, *engine._board.waiting]:
            task.job.cancel.set()
        blocker.release.set()


def test_who_leaves_at_its_deadline_takes_no_more_than_until_then(base: Base) -> None:
    """Three samples of two seconds, three seconds' time: who is due later loses three, not six."""
    with Engine(base, max_samples=1) as engine:
        soon = time.monotonic()
        blocker = Blocker(base, seeds=(1,), steps=21, deadline=soon + 25)
        blocker.submit(engine)
        engine.cost.calibrate([1], lambda size: 1.0 / engine.cost.drift, lambda: 0.0)
        soon = time.monotonic()
        engine._board.running[0].job = replace(blocker.job, deadline=soon + 25)
        hasty = engine.submit(job_for(base, seeds=(1, 2, 3), steps=2, deadline=soon + 3))
        blocker.release.set()
        assert hasty.result(WAIT_S).seeds == (1, 2, 3)


def test_those_due_later_share_the_batches_too(base: Base) -> None:
    """They fill up batches like those who can wait, as long as they have steps to make."""
    with Engine(base) as engine:
        soon = time.monotonic()
        large = Blocker(base, seeds=tuple(range(15)), steps=100, deadline=soon + 1000)
        large.submit(engine)
        engine.cost.calibrate([1, 16], lambda size: size / 16 / engine.cost.drift, lambda: 0.0)
        hasty = job_for(base, seeds=(1,), steps=20, deadline=soon + 5)
        with pytest.raises(QueueFull, match="before or beside"):
            engine.submit(hasty)
        # With two steps left to it, the rest would be made without it.
        engine._board.running[0].sample_steps_left = 30
        engine.submit(hasty)
        for task in [*engine._board.running, *engine._board.waiting]:
            task.job.cancel.set()
        large.release.set()


def test_who_is_late_anyway_holds_up_nobody(base: Base) -> None:
    """A job that asked for more than its deadline leaves time for is no promise that is broken."""
    with Engine(base, max_samples=1) as engine:
        blocker = Blocker(base, seeds=(1,), steps=100, deadline=time.monotonic() + 60)
        blocker.submit(engine)
        engine.cost.calibrate([1], lambda size: 1.0 / engine.cost.drift, lambda: 0.0)
        hasty = engine.submit(job_for(base, seeds=(1,), steps=2, deadline=time.monotonic() + 20))
        blocker.release.set()
        assert hasty.result(WAIT_S).seeds == (1,)


def test_a_job_that_waits_past_its_deadline_is_told(base: Base) -> None:
    """Without a step: it never began."""
    with Engine(base, max_running=1) as engine:
        blocker = Blocker(base)
        blocker.submit(engine)
        engine.cost.calibrate([1], lambda size: 1e-9, lambda: 0.0)
        waiting = engine.submit(job_for(base, deadline=time.monotonic() + 0.05))
        time.sleep(0.1)
        blocker.release.set()
        with pytest.raises(DeadlineExceeded):
            waiting.result(WAIT_S)


def test_a_job_with_a_deadline_is_no_longer_in_the_way_than_until_then(base: Base) -> None:
    """However much it asked for: who comes after it and has time is taken."""
    with Engine(base, max_samples=1) as engine:
        blocker = Blocker(base, seeds=(1,), steps=50, deadline=time.monotonic() + 60)
        blocker.submit(engine)
        engine.cost.calibrate([1], lambda size: 10.0 / engine.cost.drift, lambda: 0.0)
        assert engine.backlog_s() == pytest.approx(60, abs=5)
        # They are drawn together, and all gone by then.
        beside = job_for(base, seeds=(1,), steps=50, deadline=time.monotonic() + 70)
        engine._board.waiting += [Task(beside, Future(), 0.0) for _ in range(3)]
        assert engine.backlog_s() == pytest.approx(70, abs=5)
        engine._board.waiting.clear()
        later = engine.submit(job_for(base, seeds=(1,), steps=1, deadline=time.monotonic() + 80))
        blocker.release.set()
        assert later.result(WAIT_S).seeds == (1,)


def test_a_stall_in_calibration_does_not_refuse_for_ever(base: Base) -> None:
    """Where steps have turned out to be quicker since, that counts."""
    with Engine(base) as engine:
        engine.cost.calibrate([1], lambda size: 2.0, lambda: 0.0)
        engine.submit(job_for(base, seeds=(1,), steps=30)).result(WAIT_S)
        assert engine.cost.drift < 0.5
        deadline = time.monotonic() + 3.5
        job = job_for(base, seeds=(1,), steps=2, deadline=deadline)
        assert engine.submit(job).result(WAIT_S).seeds == (1,)


def test_a_job_far_behind_is_told_when_its_deadline_comes(base: Base) -> None:
    """Not only the next in line, and while those before it still wait or run."""
    with Engine(base, max_running=1) as engine:
        cancel = threading.Event()
        running = engine.submit(replace(job_for(base, steps=900), cancel=cancel))
        engine.cost.calibrate([1], lambda size: 1e-9, lambda: 0.0)
        patient = engine.submit(replace(job_for(base), cancel=cancel))
        hasty = engine.submit(job_for(base, deadline=time.monotonic() + 0.05))
        with pytest.raises(DeadlineExceeded):
            hasty.result(WAIT_S)
        assert not running.done()
        assert not patient.done()
        cancel.set()


@pytest.mark.usefixtures("one_core")
def test_a_near_deadline_finishes_some_rather_than_all_half_way(base: Base) -> None:
    """On an idle lane too: time for about six of sixteen makes batches of fewer, and an answer."""
    seeds = tuple(range(16))
    with Engine(base) as engine:
        whole = engine.submit(job_for(base, seeds=seeds, steps=4)).result(WAIT_S)
        engine.cost.calibrate([1, 16], lambda size: 0.5 * size / engine.cost.drift, lambda: 0.0)
        fitting = 6
        deadline = time.monotonic() + 0.5 * fitting * 4 * PRUDENCE + 0.9
        batches: list[int] = []

        def on_step(done: int, total: int) -> None:
            # The first six make four steps; then the deadline comes.
            if done == fitting * 4:
                time.sleep(max(0.0, deadline - time.monotonic()) + 0.01)

        hook = base.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
        job = job_for(base, seeds=seeds, steps=4, deadline=deadline, on_step=on_step)
        partial = engine.submit(job).result(WAIT_S)
        hook.remove()
    assert batches == [fitting] * 4
    assert partial.partial
    assert partial.seeds == seeds[:fitting]
    assert torch.equal(partial.samples, whole.samples[:fitting])
