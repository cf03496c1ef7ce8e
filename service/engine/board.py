"""The jobs of one engine: who waits, who runs, and how those ended that are gone."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from service.engine.task import Task
from service.engine.weights import Weights
from service.errors import Cancelled, EngineClosed

OUTCOMES = ("completed", "partial", "cancelled", "failed", "refused", "sample_steps", "steps")


class Board:
    """Jobs and counts under one lock; ``changed`` is notified of whatever the lane should see.

    Attributes:
        waiting, running: In the order in which they came. Only the lane changes ``running``.
        open: Whether jobs are taken.
        failure: What ended the lane, where that was not its owner.
        to_forget: Adapters of which nothing is to be left once no job names them.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: list[Task] = []
        self.running: list[Task] = []
        self.open = False
        self.failure: BaseException | None = None
        self.to_forget: set[str] = set()
        self._coming: Counter[str] = Counter()
        self.counts = dict.fromkeys(OUTCOMES, 0)

    def __len__(self) -> int:
        """Jobs that wait or run."""
        with self.changed:
            return len(self.waiting) + len(self.running)

    def notify(self, _: object = None) -> None:
        """Wake the lane."""
        with self.changed:
            self.changed.notify_all()

    def add_up(self, name: str, count: int = 1) -> None:
        """Count something."""
        with self.changed:
            self.counts[name] += count

    def sample_steps_left(self) -> int:
        """Of all jobs."""
        with self.changed:
            return sum(task.sample_steps_left for task in [*self.waiting, *self.running])

    @contextmanager
    def bringing(self, digest: str) -> Iterator[None]:
        """An adapter is made ready meanwhile, also if the job that it is for goes away."""
        with self.changed:
            self._coming[digest] += 1
        try:
            yield
        finally:
            with self.changed:
                self._coming -= Counter([digest])

    def digests(self) -> set[str]:
        """Of the adapters that jobs wait for or run with, or that are made ready."""
        with self.changed:
            tasks = [*self.waiting, *self.running]
            named = {task.job.digest for task in tasks if task.job.digest is not None}
            return named | set(self._coming)

    def drop_cancelled(self) -> list[Task]:
        """Free the places of waiting jobs that nobody wants; ``tell_cancelled`` them next."""
        with self.changed:
            dropped = [task for task in self.waiting if task.cancelled]
            if dropped:
                self.waiting = [task for task in self.waiting if task not in dropped]
                self.counts["cancelled"] += len(dropped)
            return dropped

    def withdraw(self, task: Task, error: Exception) -> None:
        """Fail a job that waits."""
        with self.changed:
            if task not in self.waiting:
                return
            self.waiting.remove(task)
            self.counts["failed"] += 1
        if task.future.set_running_or_notify_cancel():
            task.future.set_exception(error)

    def promote(self, task: Task) -> bool:
        """Let a waiting job run; False where it was withdrawn or cancelled."""
        with self.changed:
            if task not in self.waiting:
                return False
            self.waiting.remove(task)
            if not task.future.set_running_or_notify_cancel():
                self.counts["cancelled"] += 1
                return False
            self.running.append(task)
            return True

    def remove(self, task: Task, outcome: str, sample_steps: int = 0) -> None:
        """Count a running job out."""
        with self.changed:
            self.running.remove(task)
            self.counts[outcome] += 1
            self.counts["sample_steps"] += sample_steps

    def abandon(self, failure: BaseException) -> None:
        """Fail all jobs and take no more: the lane has ended, and nobody would do them."""
        with self.changed:
            self.open, self.failure = False, failure
            waiting, running = self.waiting, self.running
            self.waiting, self.running = [], []
            self.counts["failed"] += len(waiting) + len(running)
            self.changed.notify_all()
        left = [*running, *(t for t in waiting if t.future.set_running_or_notify_cancel())]
        for task in left:
            task.future.set_exception(ended_by(failure))


def ended_by(failure: BaseException) -> EngineClosed:
    """What jobs of a lane that has ended by itself are told."""
    return EngineClosed(
        f"The lane ended ({type(failure).__name__}: {failure}): restart the service, or ask "
        "another replica."
    )


def forget_unnamed(board: Board, weights: Weights) -> None:
    """Drop what is to be forgotten and no job names any more; the board's lock is held."""
    named = board.digests()
    gone = {digest for digest in board.to_forget - named if weights.forget(digest)}
    board.to_forget -= gone


def tell_cancelled(tasks: Sequence[Task]) -> None:
    """Answer those whose jobs were cancelled while they waited; hold no lock, futures call back."""
    for task in tasks:
        # False where the future itself was cancelled, and its owner knows.
        if task.future.set_running_or_notify_cancel():
            task.future.set_exception(Cancelled("the job was cancelled while it waited"))
