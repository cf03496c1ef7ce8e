"""Adapters under a running lane: brought ahead, forgotten, and weights that cannot be written."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from realfill.base import Base
from service.engine import Engine
from service.engine.fused import FusedSet, FusedWeights
from service.engine.segmented import SegmentedWeights
from service.engine.staging import StagedAdapter
from service.engine.weights import SpoiltWeights
from tests.service.engine.test_lane import WAIT_S, Blocker, job_for
from tests.tiny import tiny_adapter, tiny_base


@pytest.fixture(scope="module")
def base() -> Base:
    """One tiny base, handed from engine to engine."""
    return tiny_base()


@pytest.mark.parametrize("application", ["fused", "segmented"])
def test_forgotten_adapter_leaves_the_device_while_the_lane_is_idle(
    base: Base, application: Any
) -> None:
    """It alone: an adapter that nobody forgot stays where it is."""
    with Engine(base, application=application) as engine:
        a = job_for(base, digest="a", adapter=tiny_adapter(base, 1))
        b = job_for(base, digest="b", adapter=tiny_adapter(base, 2))
        for job in (b, a):
            engine.submit(job).result(WAIT_S)
        weights = engine.runner.weights
        assert weights.traces() == {"a", "b"}
        engine.forget("a")
        ends = time.monotonic() + WAIT_S
        while "a" in weights.traces() and time.monotonic() < ends:
            time.sleep(0.01)
        assert weights.traces() == {"b"}
        # And the lane goes on.
        assert engine.submit(a).result(WAIT_S).digest == "a"


@pytest.mark.parametrize("application", ["fused", "segmented"])
def test_adapter_that_is_forgotten_while_jobs_wait_leaves_after_the_last(
    base: Base, application: Any
) -> None:
    """Each of them makes it ready again; once both are done nothing is left."""
    with Engine(base, application=application, max_running=1) as engine:
        blocker = Blocker(base)
        blocker.submit(engine)
        job = job_for(base, digest="a", adapter=tiny_adapter(base, 1))
        waiting = [engine.submit(job), engine.submit(job)]
        engine.forget("a")
        blocker.release.set()
        for future in waiting:
            assert future.result(WAIT_S).digest == "a"
        ends = time.monotonic() + WAIT_S
        while engine.runner.weights.traces() and time.monotonic() < ends:
            time.sleep(0.01)
        assert engine.runner.weights.traces() == set()


def test_adapter_that_is_forgotten_while_it_comes_does_not_stay(base: Base) -> None:
    """Also where its job went away meanwhile, so that nobody names it."""
    with Engine(base) as engine:
        weights = engine.runner.weights
        bring, coming, on = weights.bring, threading.Event(), threading.Event()

        def slow(*given: Any, **options: Any) -> None:
            coming.set()
            assert on.wait(WAIT_S)
            bring(*given, **options)

        weights.bring = slow  # type: ignore[method-assign]
        job = job_for(base, digest="a", adapter=tiny_adapter(base, 1))
        with ThreadPoolExecutor(1) as pool:
            submitted = pool.submit(engine.submit, job)
            assert coming.wait(WAIT_S)
            job.cancel.set()
            engine.forget("a")
            while engine.pending:
                time.sleep(0.01)
            on.set()
            submitted.result(WAIT_S)
        ends = time.monotonic() + WAIT_S
        while weights.traces() and time.monotonic() < ends:
            time.sleep(0.01)
        assert weights.traces() == set()


def test_waiting_scenes_are_not_pushed_out_by_those_behind_them(base: Base) -> None:
    """What cannot be made ready ahead is made when its turn comes, and everything once."""
    made: list[str] = []
    with Engine(base, max_running=1) as engine:
        weights = engine.runner.weights
        assert isinstance(weights, FusedWeights)
        weights._tier.budget_bytes = 3 * weights._set_bytes()
        fuse = weights._fuse

        def noted(staged: StagedAdapter) -> FusedSet:
            made.append(staged.digest)
            return fuse(staged)

        weights._fuse = noted  # type: ignore[method-assign]
        blocker = Blocker(base, digest="s0", adapter=tiny_adapter(base, 0))
        futures = [blocker.submit(engine)]
        for k in range(1, 8):
            job = job_for(base, digest=f"s{k}", adapter=tiny_adapter(base, k))
            futures.append(engine.submit(job))
        assert made == ["s0", "s1", "s2"]
        blocker.release.set()
        assert [future.result(WAIT_S).digest for future in futures] == [f"s{k}" for k in range(8)]
    assert made == [f"s{k}" for k in range(8)]


def test_weights_that_a_failed_swap_left_torn_do_not_end_the_lane(base: Base) -> None:
    """The job fails, and the next one mends them."""
    with Engine(base, application="segmented") as engine:
        weights = engine.runner.weights
        assert isinstance(weights, SegmentedWeights)
        swapper = weights._swapper
        engine.submit(job_for(base, digest="a", adapter=tiny_adapter(base, 1))).result(WAIT_S)
        write, failures = swapper._write, [2]

        def failing(staged: StagedAdapter | None) -> None:
            if failures[0]:
                failures[0] -= 1
                raise RuntimeError("out of memory")
            write(staged)

        swapper._write = failing  # type: ignore[method-assign]
        job = job_for(base, digest="b", adapter=tiny_adapter(base, 2))
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.submit(job).result(WAIT_S)
        assert swapper.torn
        with pytest.raises(SpoiltWeights):
            engine.submit(job).result(WAIT_S)
        assert engine.submit(job).result(WAIT_S).digest == "b"
        assert engine.failure is None


def test_job_whose_adapter_fails_in_an_unknown_way_is_not_left_behind(base: Base) -> None:
    """Its future has the error, and the lane nothing to do."""
    with Engine(base) as engine:

        def failing(*_: object, **__: object) -> None:
            raise MemoryError("no room")

        engine.runner.weights.bring = failing  # type: ignore[method-assign]
        job = job_for(base, digest="a", adapter=tiny_adapter(base, 1))
        with pytest.raises(MemoryError):
            engine.submit(job).result(WAIT_S)
        assert engine.pending == 0
