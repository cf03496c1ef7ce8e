"""The engine as its callers see it: jobs in, futures out, promises that can be kept."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch

from realfill.base import Base
from service.engine.admission import Admission
from service.engine.attention import Attention
from service.engine.board import Board, ended_by, forget_unnamed, tell_cancelled
from service.engine.cost import CostModel
from service.engine.job import Job, Sampled
from service.engine.lane import RUNNING_BATCHES, Lane
from service.engine.metrics import EngineMetrics
from service.engine.runner import Application, Runner
from service.engine.task import Task
from service.errors import EngineClosed


class Engine:
    """Runs many jobs at once on one device, step by step; safe to call from any thread.

    Every step is one batch of samples from whichever jobs are there, each with its own adapter and
    at its own step, so that a new job is in the very next batch.

    While it runs, its lane computes with as many cores as torch does where the engine is made, and
    threads that begin meanwhile with one (``service.engine.cores`` says why).

    Args:
        base: Becomes the engine's own until it is closed, which leaves it as it was.
        attention, application, arena_bytes, split_from, max_samples: As for ``Runner``.
        max_queue: Most jobs that wait to run.
        max_running: Most jobs that share the lane; None for as many as four batches hold.
    """

    def __init__(
        self,
        base: Base,
        *,
        attention: Attention = "auto",
        application: Application = "auto",
        arena_bytes: int | None = None,
        split_from: int | None = None,
        max_samples: int = 16,
        max_queue: int = 16,
        max_running: int | None = None,
    ) -> None:
        if max_queue < 1:
            raise ValueError(f"max_queue is {max_queue}; use 1 or more")
        self.runner = Runner(
            base,
            attention=attention,
            application=application,
            arena_bytes=arena_bytes,
            split_from=split_from,
            max_samples=max_samples,
        )
        self.cost = CostModel()
        self._admission = Admission(self.cost, max_samples, max_queue)
        self._board = Board()
        most = RUNNING_BATCHES * max_samples
        cores = torch.get_num_threads()
        self._lane = Lane(self.runner, self._board, self.cost, max_running or most, cores)
        self._thread: threading.Thread | None = None

    def start(self) -> Engine:
        """Start the lane, and wait until it has warmed up and timed its steps.

        Raises:
            EngineClosed: It was started before, or the lane could not start.
        """
        with self._board.changed:
            if self._thread is not None:
                raise EngineClosed("the engine was started before; make a new one")
            self._board.open = True
            self._thread = threading.Thread(target=self._lane.drive, name="lane", daemon=True)
            self._thread.start()
        self._lane.ready.wait()
        if self.failure is not None:
            raise ended_by(self.failure) from self.failure
        return self

    def turn(self) -> AbstractContextManager[float]:
        """For whoever computes with the lane's cores: it makes no step meanwhile.

        On a CPU both would take longer at once than one after the other. Nothing on a GPU.
        """
        on_cpu = self.runner.base.device.type == "cpu"
        return self._lane.turns.turn() if on_cpu else nullcontext(0.0)

    def close(self, *, drain: bool = True) -> None:
        """Take no more jobs, end those that there are, and stop the lane.

        Args:
            drain: Finish the jobs; otherwise cancel them, which takes at most one step.
        """
        board = self._board
        with board.changed:
            board.open = False
            if not drain:
                for task in [*board.waiting, *board.running]:
                    task.job.cancel.set()
            board.changed.notify_all()
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
        """Hand a job in; its adapter is made ready here, in the caller's thread, if there is room.

        Returns:
            A future of its samples. It raises Cancelled where the job's flag was set,
            DeadlineExceeded where the deadline came before one sample was finished, and whatever
            went wrong otherwise; the lane goes on.

        Raises:
            QueueFull: No room, or not enough time for the deadline; ``retry_after_s`` says when.
            DeadlineExceeded: The job could not meet its deadline on an idle lane either.
            EngineClosed: Not started, or closed.
            ValueError: The job does not fit the base.
        """
        self.runner.check(job)
        board = self._board
        task = Task(job, Future(), time.perf_counter())
        with board.changed:
            if board.failure is not None:
                raise ended_by(board.failure) from board.failure
            if not board.open:
                raise EngineClosed("the engine is not running; start it, or ask another replica")
            dropped = board.drop_cancelled()
            waiting, running = board.waiting, board.running
            room = self._lane.room_for(len(job.seeds), [*running, *waiting])
            refusal = self._admission.refusal(job, waiting=waiting, running=running, room=room)
            if refusal is None:
                task.promised_s = self._admission.promise_s(job, [*running, *waiting])
                board.waiting.append(task)
            else:
                board.counts["refused"] += 1
        tell_cancelled(dropped)
        if refusal is not None:
            raise refusal
        try:
            if job.digest is not None and job.adapter is not None:
                with board.bringing(job.digest):
                    self.runner.weights.bring(job.digest, job.adapter, spare=board.digests())
        except Exception as error:  # noqa: BLE001  # whoever submitted the job gets it
            board.withdraw(task, error)
        board.notify()
        return task.future

    def forget(self, digest: str) -> None:
        """Keep nothing of an adapter on the device, unless jobs need it: then it goes after them.

        A job that is submitted with it brings it back.
        """
        with self._board.changed:
            self._board.to_forget.add(digest)
            forget_unnamed(self._board, self.runner.weights)
        self._board.notify()

    @property
    def failure(self) -> BaseException | None:
        """What ended the lane, if it was not ``close``; there is no way back but a new engine."""
        return self._board.failure

    @property
    def pending(self) -> int:
        """Jobs that wait or run."""
        return len(self._board)

    def backlog_s(self) -> float | None:
        """Expected seconds until all that was submitted is done, None before the calibration.

        Jobs with deadlines have left by then, whatever they asked for.
        """
        with self._board.changed:
            return self._admission.backlog_s([*self._board.waiting, *self._board.running])

    def metrics(self) -> EngineMetrics:
        """What was done and what is before the lane."""
        board = self._board
        with board.changed:
            return EngineMetrics(
                waiting=len(board.waiting),
                running=len(board.running),
                pending_sample_steps=board.sample_steps_left(),
                sample_steps_per_s=self.cost.per_s,
                cost_drift=self.cost.drift,
                swaps=self.runner.weights.writes,
                programs=self.runner.programs,
                tiers=dict(self.runner.weights.tiers()),
                **board.counts,
            )
