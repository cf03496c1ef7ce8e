"""Work that the threads of a pool share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def side_by_side(pool: ThreadPoolExecutor, tasks: Sequence[Callable[[], T]]) -> list[T]:
    """The outcomes of tasks, by the calling thread and whichever of the pool's have nothing to do.

    For a thread of that very pool too: what nobody has begun, it does itself, so that nobody ever
    waits for a thread that waits.
    """
    futures = [pool.submit(task) for task in tasks[1:]]
    outcomes = [task() for task in tasks[:1]]
    for task, future in zip(tasks[1:], futures, strict=True):
        outcomes.append(task() if future.cancel() else future.result())
    return outcomes


def after(first: Future[S], pool: ThreadPoolExecutor, work: Callable[[S], T]) -> Future[T]:
    """What work makes of a future's outcome, in a thread of a pool.

    Whoever brings the outcome hands it on: no third thread has to wake up for that.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        if not outcome.set_running_or_notify_cancel():
            return
        try:
            outcome.set_result(work(first.result()))
        except BaseException as error:  # noqa: BLE001  # whoever waits gets it
            outcome.set_exception(error)

    def hand_on(_: Future[S]) -> None:
        try:
            pool.submit(run)
        except RuntimeError:
            # The pool is closed: nobody else is left to do it.
            run()

    first.add_done_callback(hand_on)
    return outcome
