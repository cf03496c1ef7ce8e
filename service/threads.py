"""Work that the threads of a pool share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

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
