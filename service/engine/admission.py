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
    """Refuses a job rather than miss its deadline, or that of one with a later deadline.

    Jobs with deadlines go first as soon as they have to (``Batcher``), so that before one that runs
    at once stand only those due before it; all others share its batches, and make its steps longer.
    Before one that has to wait for a place stands everything.

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
            return _later(retry, f"{len(waiting)} jobs wait already")
        least = self._least_s(job)
        if job.deadline is None or least is None:
            return None
        left = job.deadline - time.monotonic()
        if least > left:
            return DeadlineExceeded(
                f"One candidate takes about {least:.2g} s and the deadline is in "
                f"{max(left, 0):.2g} s: ask for fewer steps, or allow more time."
            )
        earlier = [task for task in tasks if not room or _due(task) <= job.deadline]
        beside = [task for task in tasks if task not in earlier]
        before, behind = self.backlog_s(earlier), self.backlog_s(beside)
        own, alone = self._takes_s(job, beside), self._takes_s(job, [])
        if before is None or behind is None or own is None or alone is None:
            return None
        own = min(own, behind + alone)
        if alone > left:
            # An idle lane could not finish all of it either: one sample has to be finished.
            one = self._takes_s(job, beside, 1) or 0.0
            own = max(left, min(one, behind + alone)) if beside else left
        if before + own > left:
            work, where = before, "before"
            if own > left:
                work, where = before + behind, "before or beside"
            return _later(
                work + min(own, alone, left) - left,
                f"the lane has {work:.2g} s of work {where} this job, whose deadline is in "
                f"{left:.2g} s",
            )
        dated = [task for task in beside if task.job.deadline is not None]
        work = self._cost.seconds_for(job.sample_steps, len(job.seeds)) or 0.0
        free = self._free_s(min(work, left), before, dated)
        if free > 0:
            return _later(
                free,
                f"the lane has promised others what this job would need by its deadline, in "
                f"{left:.2g} s",
            )
        return None

    def _needs_s(self, task: Task) -> float | None:
        return self._cost.seconds_for(task.sample_steps_left, len(task.job.seeds))

    def _takes_s(self, job: Job, beside: Sequence[Task], count: int | None = None) -> float | None:
        """Seconds that a job, or so many of its samples, takes in batches with these, and after."""
        count = count or len(job.seeds)
        others = sum(task.unfinished for task in beside)
        lane_s = self._cost.beside_s(count, job.steps, others, self._places)
        return None if lane_s is None else lane_s + job.after.expected_s(count)

    def _free_s(self, work: float, before: float, tasks: Sequence[Task]) -> float:
        """Seconds until those are through that one job more would make late; 0 for none.

        Args:
            work: Seconds of full batches that the job takes from them.
            before: Seconds of work that goes before it.
            tasks: With deadlines, later than its own.
        """
        now, free, total = time.monotonic(), 0.0, before
        for task in sorted(tasks, key=_due):
            left, needs = _due(task) - now, self._needs_s(task) or 0.0
            ends = total + needs + task.job.after.expected_s(len(task.job.seeds))
            total = _through(total, needs, left)
            if ends <= left < ends + work:
                free = total
        return free

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


def _later(seconds: float, why: str) -> QueueFull:
    """A refusal that says when to come back."""
    retry = max(seconds, SHORTEST_RETRY_S)
    return QueueFull(f"{why}; try again in {math.ceil(retry)} s", retry_after_s=retry)
