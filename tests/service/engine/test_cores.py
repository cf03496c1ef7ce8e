"""The lane has the cores; what begins beside it has one."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from service.engine.cores import MOST_LET_BY, MOST_MEMBERS, Crew, Turns, all_cores, crew_for
from service.engine.cost import MOST_DRIFT, NEWEST
from service.engine.engine import Engine
from tests.products import PRODUCTS
from tests.service.engine.test_lane import WAIT_S, Blocker, job_for
from tests.service.engine.test_sharing import scene
from tests.tiny import tiny_base


def _in_new_thread(work: Callable[[], int]) -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def _compute_and_fail() -> None:
    with all_cores(3):
        raise RuntimeError(f"{torch.get_num_threads()} cores")


# Scenes, their adapters' seeds, and the seeds of their samples: nine in all.
SCENES = (("a", 1, (1, 2, 3, 4)), ("b", 2, (5,)), ("c", 3, (6, 7, 8, 9)))

pytestmark = pytest.mark.usefixtures("two_cores")


def test_threads_that_begin_beside_the_lane_compute_with_one_core() -> None:
    """And with as many as before once it has ended; those that there were keep theirs."""
    base = tiny_base()
    seen: list[tuple[str, int]] = []

    def note(done: int, total: int) -> None:
        seen.append((threading.current_thread().name, torch.get_num_threads()))

    with Engine(base) as engine:
        assert torch.get_num_threads() == 2
        assert _in_new_thread(torch.get_num_threads) == 1
        engine.submit(job_for(base, on_step=note)).result(WAIT_S)
    assert set(seen) == {("lane", 2)}
    assert _in_new_thread(torch.get_num_threads) == 2


def test_cores_are_given_back_after_a_failure() -> None:
    """Whatever ended the lane."""

    def fail() -> int:
        with pytest.raises(RuntimeError, match="3 cores"):
            _compute_and_fail()
        return torch.get_num_threads()

    assert _in_new_thread(fail) == 2
    assert _in_new_thread(torch.get_num_threads) == 2


def test_a_crew_shares_a_batch_among_threads_of_one_core() -> None:
    """Every sample is in one share; all tasks have ended when an error is told."""
    crew = Crew(2)
    assert torch.get_num_threads() == 2
    assert _in_new_thread(torch.get_num_threads) == 2
    assert [crew.shares(count) for count in (1, 2, 5)] == [
        [(0, 1)],
        [(0, 1), (1, 2)],
        [(0, 2), (2, 5)],
    ]
    both = threading.Barrier(2)
    seen = crew.work([lambda: (both.wait(5), torch.get_num_threads())[1]] * 2)
    assert seen == [1, 1]
    ended: list[str] = []

    def fail() -> None:
        raise RuntimeError("out of memory")

    def end() -> None:
        both.wait(5)
        ended.append("well")

    with pytest.raises(RuntimeError, match="out of memory"):
        crew.work([fail, lambda: both.wait(5) and None, end])
    assert ended == ["well"]
    assert crew.work([lambda: 7]) == [7]
    crew.release()


def test_turns_are_taken_one_at_a_time_in_the_order_of_asking() -> None:
    """But whoever lets others go first is last; who has one may take it again, and who waited is
    told for how long.
    """
    turns = Turns()
    order: list[str] = []
    waited: list[float] = []

    def take(name: str) -> None:
        with turns.turn(last=name == "a") as seconds, turns.turn():
            waited.append(seconds)
            order.append(name)

    threads = []
    with turns.turn() as seconds:
        assert seconds == 0
        for name in "abc":
            thread = threading.Thread(target=take, args=name)
            thread.start()
            threads.append(thread)
            # Until this one waits, and the next one may.
            until = time.monotonic() + WAIT_S
            while turns.waiting < len(threads):
                assert time.monotonic() < until
        with turns.turn():
            pass
        assert order == []
        time.sleep(0.05)
    for thread in threads:
        thread.join(WAIT_S)
    assert order == ["b", "c", "a"]
    assert min(waited) > 0.04
    with turns.turn() as seconds:
        assert seconds == 0


def test_the_lane_makes_no_step_while_somebody_else_has_the_turn() -> None:
    """And what it waited counts as time that steps take, so that promises stay true."""
    base = tiny_base()
    with Engine(base) as engine:
        engine.submit(job_for(base, steps=20)).result(WAIT_S)
        before = engine.cost.drift
        with engine.turn():
            future = engine.submit(job_for(base, steps=1))
            with pytest.raises(TimeoutError):
                future.result(0.3)
            assert engine.metrics().steps == 20
        future.result(WAIT_S)
        # The step took as long as one may count, whatever those before it had taken.
        assert engine.cost.drift == pytest.approx(before + NEWEST * (MOST_DRIFT - before))


def test_whoever_is_answered_in_the_lane_may_take_the_turn_there() -> None:
    """As a completion that ranks in the lane's thread while the service ends."""
    base = tiny_base()
    told = threading.Event()

    def rank(engine: Engine) -> None:
        with engine.turn():
            told.set()

    with Engine(base) as engine:
        blocker = Blocker(base)
        future = blocker.submit(engine)
        future.add_done_callback(lambda _: rank(engine))
        blocker.release.set()
        future.result(WAIT_S)
        assert told.wait(WAIT_S)


def test_a_crew_is_for_a_few_cores() -> None:
    """One core has nobody to share with, and many would wait for one interpreter."""
    assert crew_for(1) is None
    assert crew_for(MOST_MEMBERS + 1) is None
    crew = crew_for(2)
    assert crew is not None
    assert crew.members == 2
    crew.release()


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_batch_is_shared_and_its_pictures_are_the_same(products: torch.dtype) -> None:
    """A large batch runs in two threads of the crew; each sample as in the lane's one thread."""
    base = dataclasses.replace(tiny_base(), products=products)
    threads: dict[str, set[int]] = {}

    def note(_: object, args: tuple[torch.Tensor, ...]) -> None:
        threads.setdefault(threading.current_thread().name, set()).add(len(args[0]))

    def drawn() -> list[torch.Tensor]:
        with Engine(base) as engine:
            hook = base.unet.register_forward_pre_hook(note)
            jobs = [scene(base, name, seed, seeds=seeds) for name, seed, seeds in SCENES]
            blocker = Blocker(base)
            blocker.submit(engine)
            futures = [engine.submit(job) for job in jobs]
            blocker.release.set()
            images = [future.result(WAIT_S).samples for future in futures]
            hook.remove()
        return images

    shared = drawn()
    assert {name.rpartition("_")[0] for name in threads if "crew" in name} == {"crew"}
    threads.clear()
    torch.set_num_threads(1)
    alone = drawn()
    assert set(threads) == {"lane"}
    for one, other in zip(shared, alone, strict=True):
        assert torch.equal(one, other)


def test_others_who_come_without_end_do_not_stop_the_lane() -> None:
    """Two of them hand the turn to each other; the lane has one after a few of theirs."""
    turns, over = Turns(), threading.Event()

    def again_and_again() -> None:
        while not over.is_set():
            with turns.turn():
                time.sleep(0.01)

    threads = [threading.Thread(target=again_and_again) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            began = time.perf_counter()
            with turns.turn(last=True):
                assert time.perf_counter() - began < (MOST_LET_BY + 2) * 0.01 + 1
    finally:
        over.set()
        for thread in threads:
            thread.join(WAIT_S)
