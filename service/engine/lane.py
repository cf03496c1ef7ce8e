"""The lane: the one thread that drives a device, and the bounded queue before it."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections import deque
from concurrent.futures import Future
from types import TracebackType

from realfill.base import Base
from service.engine.cost import SampleStepRate
from service.engine.job import Job, Sampled
from service.engine.runner import Attention, Runner
from service.errors import Cancelled, EngineClosed, QueueFull

logger = logging.getLogger(__name__)

# Promised before anything was measured, and the least that is ever promised.
FIRST_RETRY_S = 1.0
SHORTEST_RETRY_S = 0.05


@dataclasses.dataclass(eq=False)
class _Entry:
    """One submitted job and who waits for it."""

    job: Job
    future: Future[Sampled]
    submitted: float


@dataclasses.dataclass(frozen=True)
class EngineMetrics:
    """What the lane has done and has before it, at one moment.

    Attributes:
        queued: Jobs that wait.
        running: 1 while a job is in the lane, else 0.
        pending_sample_steps: Of the waiting jobs and what is left of the running one.
        completed, cancelled, failed: Jobs that ended each way.
        refused: Jobs that found the queue full.
        sample_steps: Made by completed jobs.
        sample_steps_per_s: Running estimate, swap and decode included; None before the first job.
        swaps: Times that the weights were written, for another adapter or for the base.
    """

    queued: int
    running: int
    pending_sample_steps: int
    completed: int
    cancelled: int
    failed: int
    refused: int
    sample_steps: int
    sample_steps_per_s: float | None
    swaps: int


class Engine:
    """Runs jobs one after the other on one device; safe to call from any thread.

    Args:
        base: Becomes the engine's own until it is closed, which leaves its weights as they were.
        attention: xformers, sdpa, or auto for xformers where CUDA and the package are there.
        max_samples: Most samples in one U-Net call.
        max_queue: Most jobs that wait.
    """

    def __init__(
        self,
        base: Base,
        *,
        attention: Attention = "auto",
        max_samples: int = 16,
        max_queue: int = 16,
    ) -> None:
        if max_queue < 1:
            raise ValueError(f"max_queue is {max_queue}; use 1 or more")
        self.runner = Runner(base, attention=attention, max_samples=max_samples)
        self.rate = SampleStepRate()
        self._max_queue = max_queue
        self._queue: deque[_Entry] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._open = False
        self._forgotten: set[str] = set()
        self._running: _Entry | None = None
        self._running_left = 0
        self._running_since = 0.0
        self._counts = dict.fromkeys(
            ("completed", "cancelled", "failed", "refused", "sample_steps"), 0
        )

    def start(self) -> Engine:
        """Start the lane.

        Raises:
            EngineClosed: It was started before.
        """
        with self._wake:
            if self._thread is not None:
                raise EngineClosed("the engine was started before; make a new one")
            self._open = True
            self._thread = threading.Thread(target=self._drive, name="lane", daemon=True)
            self._thread.start()
        return self

    def close(self, *, drain: bool = True) -> None:
        """Take no more jobs, end those that there are, and stop the lane.

        Args:
            drain: Finish the jobs; otherwise cancel them, which takes at most one step.
        """
        with self._wake:
            self._open = False
            if not drain:
                for entry in [*self._queue, *([self._running] if self._running else [])]:
                    entry.job.cancel.set()
            self._wake.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(drain=error is None)

    def submit(self, job: Job) -> Future[Sampled]:
        """Queue a job; first come, first served.

        Returns:
            A future of its samples. It raises Cancelled where the job's flag was set, and whatever
            went wrong otherwise; the lane goes on.

        Raises:
            QueueFull: No room; `retry_after_s` says when there should be.
            EngineClosed: Not started, or closed.
            ValueError: The job does not fit the base.
        """
        self.runner.check(job)
        entry = _Entry(job, Future(), time.perf_counter())
        with self._wake:
            if not self._open:
                raise EngineClosed("the engine is not running; start it, or ask another replica")
            dropped = self._drop_cancelled()
            room = len(self._queue) < self._max_queue
            if room:
                self._queue.append(entry)
                self._wake.notify_all()
            else:
                self._counts["refused"] += 1
                retry_after_s = self._retry_after_s()
        _tell_cancelled(dropped)
        if not room:
            raise QueueFull(
                f"{self._max_queue} jobs wait already; try again in {math.ceil(retry_after_s)} s",
                retry_after_s=retry_after_s,
            )
        return entry.future

    def forget(self, digest: str) -> None:
        """Take an adapter out of the weights before the next job, if they hold it; returns at once.

        A job that was submitted with it brings it back, for as long as that job runs.
        """
        with self._wake:
            self._forgotten.add(digest)
            self._wake.notify_all()

    @property
    def pending(self) -> int:
        """Jobs that wait or run."""
        with self._wake:
            return len(self._queue) + (self._running is not None)

    def backlog_s(self) -> float | None:
        """Expected seconds until a job submitted now would begin, None before the first job."""
        with self._wake:
            return self.rate.seconds_for(self._pending_sample_steps())

    def metrics(self) -> EngineMetrics:
        """What was done and what is before the lane."""
        with self._wake:
            return EngineMetrics(
                queued=len(self._queue),
                running=int(self._running is not None),
                pending_sample_steps=self._pending_sample_steps(),
                sample_steps_per_s=self.rate.per_s,
                swaps=self.runner.swapper.writes,
                **self._counts,
            )

    def _pending_sample_steps(self) -> int:
        return self._running_left + sum(entry.job.sample_steps for entry in self._queue)

    def _retry_after_s(self) -> float:
        """Seconds until the running job ends, which is when the queue has room."""
        running = self._running
        if running is None:
            return SHORTEST_RETRY_S
        expected = self.rate.seconds_for(self._running_left)
        done = running.job.sample_steps - self._running_left
        if expected is None and done:
            # The very first job: its own pace so far is all that is known.
            elapsed = time.perf_counter() - self._running_since
            expected = elapsed / done * self._running_left
        return FIRST_RETRY_S if expected is None else max(expected, SHORTEST_RETRY_S)

    def _drop_cancelled(self) -> list[_Entry]:
        """Free the places of jobs that nobody waits for; the lock is held.

        Returns:
            Those jobs, to be told once the lock is released, since futures call back.
        """
        dropped = [
            entry for entry in self._queue if entry.future.cancelled() or entry.job.cancel.is_set()
        ]
        if dropped:
            self._queue = deque(entry for entry in self._queue if entry not in dropped)
            self._counts["cancelled"] += len(dropped)
        return dropped

    def _next(self) -> _Entry | None:
        """The next job to run, or None when the engine is closed and nothing is left."""
        while True:
            with self._wake:
                dropped = self._drop_cancelled()
                while not (self._queue or dropped or self._forgotten) and self._open:
                    self._wake.wait()
                    dropped = self._drop_cancelled()
                forgotten, self._forgotten = self._forgotten, set()
                entry = self._queue.popleft() if self._queue else None
                if entry is not None and entry.future.set_running_or_notify_cancel():
                    self._running = entry
                    self._running_left = entry.job.sample_steps
                    self._running_since = time.perf_counter()
                finished = not (entry or dropped or forgotten)
            _tell_cancelled(dropped)
            self._take_out(forgotten)
            if finished:
                return None
            if entry is not None and entry.future.running():
                return entry

    def _take_out(self, forgotten: set[str]) -> None:
        """Write the base where the weights hold a forgotten adapter, or parts of any."""
        swapper = self.runner.swapper
        try:
            held = bool(forgotten) and swapper.digest in forgotten
        except RuntimeError:
            held = True
        if held:
            swapper.apply(None, None)

    def _drive(self) -> None:
        """Run jobs until the engine is closed; this is the lane's thread."""
        while (entry := self._next()) is not None:
            try:
                sampled = self._run(entry)
            except Exception as error:  # noqa: BLE001  # whoever submitted the job gets it
                cancelled = isinstance(error, Cancelled)
                if not cancelled:
                    logger.warning("a job failed: %s: %s", type(error).__name__, error)
                self._finish("cancelled" if cancelled else "failed")
                entry.future.set_exception(error)
            else:
                self._finish("completed", entry.job.sample_steps)
                entry.future.set_result(sampled)
        self.runner.swapper.apply(None, None)

    def _run(self, entry: _Entry) -> Sampled:
        job, total = entry.job, entry.job.sample_steps

        def on_step(done: int, steps: int) -> None:
            with self._wake:
                self._running_left = total - total * done // steps
                dropped = self._drop_cancelled()
            _tell_cancelled(dropped)
            if job.on_step is not None:
                job.on_step(done, steps)

        began = time.perf_counter()
        sampled = self.runner.run(dataclasses.replace(job, on_step=on_step))
        self.rate.observe(total, time.perf_counter() - began)
        return dataclasses.replace(sampled, queued_s=began - entry.submitted)

    def _finish(self, outcome: str, sample_steps: int = 0) -> None:
        with self._wake:
            self._running = None
            self._running_left = 0
            self._counts[outcome] += 1
            self._counts["sample_steps"] += sample_steps


def _tell_cancelled(entries: list[_Entry]) -> None:
    """Answer those whose jobs were cancelled while they waited."""
    for entry in entries:
        # False where the future itself was cancelled, and its owner knows.
        if entry.future.set_running_or_notify_cancel():
            entry.future.set_exception(Cancelled("the job was cancelled while it waited"))
