"""Who computes with several cores: the lane, and nobody else while it runs.

Every thread that runs a large operation of torch gets an OpenMP team of its own, which stays until
the thread ends. GNU's OpenMP lets the members of a team wait actively for their next piece of work
only while all teams together have no more members than there are cores; from then on they sleep,
and wake too late for what are a thousand small operations per step and more. A second, idle team
made a step of one scene 12 % longer and one of sixteen scenes 35 % (two cores, rows
``engine.idle_team_pct.*``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def all_cores(count: int) -> Iterator[None]:
    """The calling thread computes with so many cores, threads that begin meanwhile with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    _start_others_with(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _start_others_with(before)


def _start_others_with(count: int) -> None:
    """Threads take the number that was set last, wherever that was, when they are first asked."""

    def say() -> None:
        torch.get_num_threads()
        torch.set_num_threads(count)

    thread = threading.Thread(target=say, name="cores")
    thread.start()
    thread.join()
