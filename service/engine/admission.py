"""Who is let in: what the cost model expects of the jobs there are, and of one that comes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from service.engine.cost import CostModel
from service.engine.job import Job
from service.engine.task import Task
from service.errors import DeadlineExceeded, QueueFull

# Promised before anything was measured, and the least that is ever promised.
FIRST_RETRY_S = 1.0
SHORTEST_RETRY_S = 0.05


class Admission:
    """Refuses a job rather than miss its deadline, or one that was promised before.

    Jobs with deadlines go first as soon as they have to (``Batcher``), so that only others with
    deadlines stand before one that runs at once. Before one that has to wait for a place stands
    everything.

    Args:
        cost: Says nothing before it is calibrated; then every job is let in.
        places: Samples of a full batch.
        most_waiting: Jobs that may wait to run.
    """

    def __init__(self, cost: CostModel, places: int, most_waiting: int) -> None:
        self._cost = cost
        self._places = places
        self._most_waiting = most_waiting

    def backlog_s(self, tasks: Sequence[Task]) -> float | None:
        """Expected seconds until all of these are done, None before the calibration.

        Those with deadlines have left by then, whatever they asked for.
        """
        needs = [self._needs_s(task) for task in tasks]
        now = time.monotonic()
        total = 0.0
        for task, needs_s in sorted(zip(tasks, needs, strict=True), key=lambda pair: _due(pair[0])):
            if needs_s is None:
                return None
            total = _through(total, needs_s, _due(task) - now)
        return total

    def promise_s(self, job: Job, tasks: Sequence[Task]) -> float | None:
        """Expected seconds until a job that comes now is done, after all of these."""
        backlog = self.backlog_s(tasks)
        alone = self._cost.alone_s(len(job.seeds), job.steps, self._places)
        return None if backlog is None or alone is None else backlog + alone

    def refusal(
        self, job: Job, *, waiting: Sequence[Task], running: Sequence[Task], room: bool
    ) -> Exception | None:
        """Why a job is not let in; None where it is.

        Args:
            job: That comes now.
            waiting, running: Jobs that there are.
            room: Whether it would run at once.
        """
        tasks = [*running, *waiting]
        if len(waiting) >= self._most_waiting:
            backlog = self.backlog_s(tasks)
            retry = FIRST_RETRY_S if backlog is None else backlog / len(tasks)
            retry = max(retry, SHORTEST_RETRY_S)
            return QueueFull(
                f"{len(waiting)} jobs wait already; try again in {math.ceil(retry)} s",
                retry_after_s=retry,
            )
        least = self._least_s(job)
        if job.deadline is None or least is None:
            return None
        left = job.deadline - time.monotonic()
        if least > left:
            return DeadlineExceeded(
                f"One candidate takes about {least:.2g} s and the deadline is in "
                f"{max(left, 0):.2g} s: ask for fewer steps, or allow more time."
            )
        # Those without deadlines are in its batches, not before it.
        patient = [task for task in tasks if room and task.job.deadline is None]
        later = [task for task in tasks if room and job.deadline < _due(task) < math.inf]
        own, alone = self._own_s(job, patient), self._own_s(job, [])
        before = self.backlog_s([task for task in tasks if task not in [*patient, *later]])
        if own is None or alone is None or before is None:
            return None
        if alone > left:
            # An idle lane could not finish all of it either: waiting would not help.
            own = left
        late = before + own - left
        if late > 0:
            retry = max(late, SHORTEST_RETRY_S)
            return QueueFull(
                f"the lane has {before:.2g} s of work before this job, whose deadline is in "
                f"{left:.2g} s; try again in {math.ceil(retry)} s",
                retry_after_s=retry,
            )
        late = self._delay_s(before, own, later)
        if late > 0:
            retry = max(late, SHORTEST_RETRY_S)
            return QueueFull(
                f"the lane has promised others what this job would need by its deadline, in "
                f"{left:.2g} s; try again in {math.ceil(retry)} s",
                retry_after_s=retry,
            )
        return None

    def _needs_s(self, task: Task) -> float | None:
        return self._cost.seconds_for(task.sample_steps_left, len(task.job.seeds))

    def _own_s(self, job: Job, patient: Sequence[Task]) -> float | None:
        """Seconds that a job takes with what comes after the lane, in batches with these."""
        count = len(job.seeds)
        beside = sum(len(task.samples) or len(task.job.seeds) for task in patient)
        together = max(count, min(self._places, count + beside))
        alone = self._cost.alone_s(together, job.steps, self._places)
        if alone is None:
            return None
        return alone - self._cost.decoding_s(together - count) + job.after.expected_s(count)

    def _delay_s(self, before: float, own: float, tasks: Sequence[Task]) -> float:
        """By how much, at most, others would be late that would be in time without a job.

        Args:
            before: Seconds of work that goes before all of them.
            own: Seconds that the job would take from them.
            tasks: With later deadlines.
        """
        now, late, total = time.monotonic(), 0.0, before
        for task in sorted(tasks, key=_due):
            left = _due(task) - now
            needs = (self._needs_s(task) or 0.0) + task.job.after.expected_s(len(task.job.seeds))
            if total + needs <= left:
                late = max(late, total + needs + own - left)
            total = _through(total, self._needs_s(task) or 0.0, left)
        return late

    def _least_s(self, job: Job) -> float | None:
        """Seconds in which an idle lane may well make one sample, and that be of use.

        The least that speaks for it: who is refused teaches nothing, so that a machine which was
        slow a moment ago, or when it was calibrated, would refuse every job for ever.
        """
        ways = [
            self._cost.alone_s(1, job.steps, self._places, corrected=corrected)
            for corrected in (False, True)
        ]
        known = [seconds for seconds in ways if seconds is not None]
        return min(known) + job.after.least_s(1) if known else None


def _due(task: Task) -> float:
    return math.inf if task.job.deadline is None else task.job.deadline


def _through(total: float, needs: float, left: float) -> float:
    """Seconds until a job has left that begins after ``total``: when it is done, or is due."""
    return min(total + needs, max(total, left))
