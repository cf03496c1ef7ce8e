"""Who computes with several cores: the lane and its crew, or in turns with them whoever ranks.

Every thread that runs a large operation of torch gets an OpenMP team of its own, which stays until
the thread ends. GNU's OpenMP lets the members of a team wait actively for their next piece of work
only while all teams together have no more members than there are cores; from then on they sleep,
and wake too late for what are a thousand small operations per step and more. A second, idle team
made a step of one scene 12 % longer and one of sixteen scenes 35 %, on two cores and before there
was a crew, whose members have no teams (rows ``engine.idle_team_pct.*``).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

Outcome = TypeVar("Outcome")

# Members of a crew at most. Two were measured; more hold more samples' intermediates in one cache.
MOST_MEMBERS = 4
# Turns of others before whoever lets them go first.
MOST_LET_BY = 4


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


class Turns:
    """One thread at a time computes with all cores, in the order in which they came.

    Who lets others go first waits for a few of them and no longer.

    Two that do so at once wait actively for their own teams on each other's cores, and take longer
    than one after the other. Whoever has the turn may take it again.
    """

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._owner: int | None = None
        self._depth = 0
        self._first: deque[tuple[int, threading.Event]] = deque()
        self._last: deque[tuple[int, threading.Event]] = deque()
        self._let_by = 0

    @contextmanager
    def turn(self, *, last: bool = False) -> Iterator[float]:
        """A turn, for the length of the block.

        Args:
            last: Let others go first who wait, a few of them.

        Yields:
            Seconds that were waited.
        """
        waited_s = self._take(self._last if last else self._first)
        try:
            yield waited_s
        finally:
            self._hand_on()

    @property
    def waiting(self) -> int:
        """Who wait for a turn."""
        return len(self._first) + len(self._last)

    def _take(self, queue: deque[tuple[int, threading.Event]]) -> float:
        me = threading.get_ident()
        with self._changing:
            if self._owner in (None, me):
                self._owner = me
                self._depth += 1
                return 0.0
            handed_on = threading.Event()
            queue.append((me, handed_on))
        began = time.perf_counter()
        handed_on.wait()
        return time.perf_counter() - began

    def _hand_on(self) -> None:
        with self._changing:
            self._depth -= 1
            if self._depth:
                return
            let_by = self._first and not (self._last and self._let_by >= MOST_LET_BY)
            queue = self._first if let_by else self._last
            if not queue:
                self._owner = None
                return
            self._let_by = self._let_by + 1 if let_by else 0
            # Handed on, so that nobody overtakes whoever waits.
            self._depth = 1
            self._owner, handed_on = queue.popleft()
            handed_on.set()


class Crew:
    """Threads of one core each, which compute shares of a batch side by side.

    Where every core has samples of its own, none waits for another between two operations, and what
    an operation costs before and after its computing is paid on all cores at once.

    Args:
        members: Threads.
    """

    def __init__(self, members: int) -> None:
        self.members = members
        before = torch.get_num_threads()
        begun = threading.Barrier(members)

        def begin() -> None:
            torch.get_num_threads()
            torch.set_num_threads(1)

        self._pool = ThreadPoolExecutor(members, thread_name_prefix="crew", initializer=begin)
        wait([self._pool.submit(begun.wait) for _ in range(members)])
        _start_others_with(before)

    def suits(self, samples: int, *, scenes: int) -> bool:
        """Whether a batch is quicker where every core takes samples of its own.

        Not where one core would have nothing to do meanwhile, or a large part of the time.
        """
        if scenes > 1:
            return samples >= self.members
        return samples % self.members == 0 or samples >= 4 * self.members

    def shares(self, count: int) -> list[tuple[int, int]]:
        """Where the share of each member begins and ends, in a batch of so many samples."""
        ends = [count * k // self.members for k in range(self.members + 1)]
        return [(start, stop) for start, stop in itertools.pairwise(ends) if stop > start]

    def work(self, tasks: Sequence[Callable[[], Outcome]]) -> list[Outcome]:
        """The outcomes of some tasks, once all have ended; the first error, if there was one."""
        futures = [self._pool.submit(task) for task in tasks]
        wait(futures)
        return [future.result() for future in futures]

    def release(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def crew_for(cores: int) -> Crew | None:
    """A crew of as many members as there are cores; None where it would not pay."""
    return Crew(cores) if 2 <= cores <= MOST_MEMBERS else None


def _start_others_with(count: int) -> None:
    """Threads take the number that was set last, wherever that was, when they are first asked."""

    def say() -> None:
        torch.get_num_threads()
        torch.set_num_threads(count)

    thread = threading.Thread(target=say, name="cores")
    thread.start()
    thread.join()
