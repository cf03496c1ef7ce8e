"""Work side by side, also from within the pool that does it."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial

import pytest

from service.threads import after, side_by_side


@pytest.mark.timeout(20)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_thread_of_the_pool_waits_for_none_that_waits(threads: int) -> None:
    """As many at once as the pool has threads: outcomes come in order, and nobody hangs."""
    with ThreadPoolExecutor(threads) as pool:
        tasks = [partial(divmod, k, 2) for k in range(4)]
        asked = [pool.submit(side_by_side, pool, tasks) for _ in range(threads)]
        assert [future.result() for future in asked] == [[divmod(k, 2) for k in range(4)]] * threads


@pytest.mark.timeout(20)
def test_idle_threads_take_part() -> None:
    """Three tasks that each need two others to have begun."""
    met = threading.Barrier(3)
    with ThreadPoolExecutor(2) as pool:
        assert sorted(side_by_side(pool, [met.wait] * 3)) == [0, 1, 2]


def test_the_first_error_is_told() -> None:
    """Whoever met it."""

    def fail() -> None:
        raise ValueError("no")

    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="no"):
        side_by_side(pool, [int, fail, int])
    with ThreadPoolExecutor(2) as pool:
        assert side_by_side(pool, []) == []


@pytest.mark.timeout(20)
def test_work_after_a_future_is_done_by_the_pool() -> None:
    """With its outcome, whether that was there before or comes later, from whichever thread."""
    with ThreadPoolExecutor(1, "pool") as pool:
        first: Future[int] = Future()
        later = after(first, pool, lambda number: (number, threading.current_thread().name))
        first.set_result(3)
        assert later.result() == (3, "pool_0")
        assert after(first, pool, float).result() == 3.0


@pytest.mark.timeout(20)
def test_whoever_waits_for_what_comes_after_gets_the_error() -> None:
    """Of the future, or of the work."""
    with ThreadPoolExecutor(1) as pool:
        first: Future[int] = Future()
        later = after(first, pool, float)
        first.set_exception(KeyError("first"))
        with pytest.raises(KeyError, match="first"):
            later.result()
        whole: Future[int] = Future()
        whole.set_result(0)
        with pytest.raises(ZeroDivisionError):
            after(whole, pool, lambda number: 1 // number).result()


@pytest.mark.timeout(20)
def test_what_comes_after_is_done_although_the_pool_is_closed() -> None:
    """By the thread that brings the outcome: nobody waits for ever. Unless it was given up."""
    pool = ThreadPoolExecutor(1)
    first: Future[int] = Future()
    asked: list[int] = []
    given_up, later = after(first, pool, asked.append), after(first, pool, float)
    pool.shutdown()
    assert given_up.cancel()
    first.set_result(3)
    assert later.result() == 3.0
    assert asked == []
    with pytest.raises(CancelledError):
        given_up.result()
