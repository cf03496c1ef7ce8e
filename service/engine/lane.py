"""The lane: the one thread that drives a device, and takes the jobs on the board step by step."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from service.engine.batcher import Batcher
from service.engine.board import Board, forget_unnamed, tell_cancelled
from service.engine.calibration import calibrate
from service.engine.cores import Turns, all_cores
from service.engine.cost import CostModel
from service.engine.moment import Step
from service.engine.runner import Runner
from service.engine.sample import Sample
from service.engine.task import Task
from service.engine.weights import SpoiltWeights
from service.errors import Cancelled, DeadlineExceeded

logger = logging.getLogger(__name__)

# Samples decoded in one call. Between two steps there are as many calls as a step takes time for,
# at least one: a large job's images do not hold up the others, and jobs that have made their last
# step are not kept waiting behind ever more steps.
DECODED_AT_ONCE = 4
# Running jobs may have so many batches of samples among them; the others wait.
RUNNING_BATCHES = 4
# Ranks whose adapters may share a batch from the start, without a capture: the paper's.
SHARED_RANKS = (8,)
# Jobs that may begin before one whose adapter found no room; then its turn comes first.
MOST_OVERTAKEN = 8
# What a step may take beyond what is expected of it before a deadline is missed.
PRUDENCE = 1.15
# While judges look at all samples that there are, the lane looks up this often.
PAUSE_S = 0.05
# Before a device is through with a step the lane takes its next turn: by what the last turn took,
# and so much more, so that the device waits for nothing; no sooner, so that who comes meanwhile is
# in the next step.
LEAD_S = 0.002
# How often it looks whether the device is through sooner than was expected.
GLANCE_S = 0.0005


class Lane:
    """Takes turns: end what has to end, begin what can begin, decode a little, make one step.

    A device that computes by itself, as a GPU does, is given a step shortly before it is through
    with the one before, so that it never waits for a turn. It is at most that one step behind:
    whoever comes, leaves or is late counts for the step after.

    Args:
        runner: The resident base.
        board: The jobs; the lane alone changes those that run.
        cost: Calibrated before the first turn and corrected by every step.
        max_running: Most jobs that share the batches.
        cores: That the lane computes with, where the device is a CPU.

    Attributes:
        turns: It has one while it computes, and others who need its cores take theirs between.
        ready: Set once turns are taken, or once it is clear that none will be.
    """

    def __init__(
        self, runner: Runner, board: Board, cost: CostModel, max_running: int, cores: int
    ) -> None:
        self.runner = runner
        self.board = board
        self.cost = cost
        self.ready = threading.Event()
        self._batcher = Batcher(runner.max_samples)
        self._max_running = max_running
        self._cores = cores
        self.turns = Turns()
        # For its turns, since the last step was counted.
        self._waited_s = 0.0
        self._most_samples = RUNNING_BATCHES * runner.max_samples
        self._under_way: Step | None = None
        self._judges = ThreadPoolExecutor(1, thread_name_prefix="judge")

    def room_for(self, samples: int, beside: Sequence[Task]) -> bool:
        """Whether a job of so many samples runs beside these jobs, and does not wait for them."""
        if not beside:
            return True
        taken = sum(len(task.samples) or len(task.job.seeds) for task in beside)
        return len(beside) < self._max_running and samples + taken <= self._most_samples

    def drive(self) -> None:
        """Turn after turn until the board is closed and empty; this is the lane's thread.

        Whatever fails outside of a single job, such as a device that is lost, ends the lane: its
        jobs are told at once rather than left to their timeouts.
        """
        try:
            with all_cores(self._cores):
                self._take_turns()
        except BaseException as failure:
            logger.critical("the lane has ended", exc_info=failure)
            self.board.abandon(failure)
        finally:
            self.ready.set()
            self._judges.shutdown()
            self.runner.release()

    def _take_turns(self) -> None:
        self.runner.warm_up(SHARED_RANKS)
        calibrate(self.cost, self.runner)
        self.ready.set()
        while self._attend():
            # Who rank finish what is begun.
            with self.turns.turn(last=True) as waited_s:
                self._waited_s += waited_s
                moved = self._turn()
            if not moved:
                with self.board.changed:
                    self.board.changed.wait(PAUSE_S)

    def _attend(self) -> bool:
        """Wait for jobs; False when it is time to end."""
        board = self.board
        while True:
            dropped = board.drop_cancelled()
            tell_cancelled(dropped)
            with board.changed:
                # Under the lock, so that whoever forgets an adapter now wakes the lane again.
                forget_unnamed(board, self.runner.weights)
                self.runner.weights.settle()
                if board.waiting or board.running:
                    return True
                if not board.open:
                    return False
                board.changed.wait()

    def _turn(self) -> bool:
        """One turn; False where nothing could be done."""
        began = time.perf_counter()
        for task in list(self.board.running):
            if task.cancelled:
                self._end(task, Cancelled("the job was cancelled"))
            elif task.late(self.cost.decoding_s):
                self._stop(task)
        self._begin_jobs()
        for task in list(self.board.running):
            self._guard(task, self._look)
        if any(task.all_finished for task in self.board.running):
            # Listeners hear of the last step before the answer is there.
            self._catch_up()
        decoded = self._decode_some()
        looking = any(task.wants_look for task in self.board.running)
        return self._step(began) or decoded or looking

    def _begin_jobs(self) -> None:
        """Let waiting jobs run, in their order, as far as samples and adapters have room."""
        with self.board.changed:
            waiting = list(self.board.waiting)
        late = [task for task in waiting if task.late(self.cost.decoding_s)]
        for task in late:
            self.board.withdraw(task, _too_late())
        passed: list[Task] = []
        for task in waiting:
            if task in late:
                continue
            if not self.room_for(len(task.job.seeds), self.board.running):
                break
            try:
                ready = self._take(task)
            except Exception as error:  # noqa: BLE001  # whoever submitted the job gets it
                self.board.withdraw(task, error)
                continue
            if not ready:
                # Others may have adapters that are there already, but not for ever.
                passed.append(task)
                if task.overtaken >= MOST_OVERTAKEN:
                    break
                continue
            for other in passed:
                other.overtaken += 1
            if self.board.promote(task):
                self._guard(task, self._begin)
            else:
                self._give_back(task)

    def _begin(self, task: Task) -> None:
        """Encode a job; where its deadline is near, move only as many samples as it leaves time."""
        job = task.job
        task.begin(self.runner.begin(job))
        if job.deadline is None or job.halving is not None:
            return
        left = job.deadline - time.monotonic()
        at_once = self.runner.max_samples
        others = sum(other.unfinished for other in self.board.running if other is not task)
        for count in range(len(job.seeds), 0, -1):
            needs = self.cost.beside_s(count, job.steps, others, at_once)
            fits = needs is not None and needs * PRUDENCE + job.after.expected_s(count) <= left
            if count == 1 or fits:
                task.at_once = count
                return

    def _take(self, task: Task) -> bool:
        """Pin a job's adapter; False where there is no room for it now."""
        job = task.job
        began = time.perf_counter()
        if job.digest is not None and job.adapter is not None:
            task.taken = self.runner.weights.take(job.digest, job.adapter, wait=False)
            if not task.taken:
                return False
        task.taken_at = began
        task.swap_s = time.perf_counter() - began
        return True

    def _give_back(self, task: Task) -> None:
        if task.taken and task.job.digest is not None:
            task.taken = False
            self.runner.weights.give_back(task.job.digest)

    def _stop(self, task: Task) -> None:
        """A deadline has come: decode what is finished, if anything is."""
        task.stop()
        if not task.samples:
            self._end(task, _too_late())

    def _look(self, task: Task) -> None:
        """Show a job's samples to its judge, or hear the verdict."""
        verdict, halving = task.verdict, task.job.halving
        if verdict is not None and verdict.done():
            error = verdict.exception()
            if error is not None:
                logger.warning("a judge failed, so all samples go on: %s", error)
            task.judged(None if error is not None else verdict.result())
        elif task.wants_look and halving is not None:
            # A few in a turn, as pictures are: a large job's previews do not hold up the others.
            waiting = task.samples[len(task.previews) :][:DECODED_AT_ONCE]
            task.previews += self.runner.decode([sample.history for sample in waiting])
            if len(task.previews) == len(task.samples):
                previews, task.previews = torch.stack(task.previews), []
                task.verdict = self._judges.submit(halving.judge, previews)
                task.verdict.add_done_callback(self.board.notify)

    def _decode_some(self) -> bool:
        """Decode for about as long as a step takes, the earliest deadline first."""
        finished = [task for task in self.board.running if task.all_finished]
        finished.sort(key=lambda task: task.job.deadline or math.inf)
        decode_s = self.cost.decoding_s(DECODED_AT_ONCE)
        step_s = self.cost.step_s(self.runner.max_samples, corrected=False) or 0.0
        calls = max(1, int(step_s / decode_s)) if decode_s > 0 else 1
        for task in finished:
            while calls > 0 and task in self.board.running:
                self._guard(task, self._decode)
                calls -= 1
        return bool(finished)

    def _decode(self, task: Task) -> None:
        """Decode a few samples of a job, and answer it once all are there."""
        if not task.sampled_at:
            task.sampled_at = time.perf_counter()
        began = time.perf_counter()
        waiting = task.to_decode(DECODED_AT_ONCE)
        images = self.runner.decode([latents for _, latents in waiting])
        for (place, _), image in zip(waiting, images, strict=True):
            task.images[place] = image[None]
        self.runner.synchronize()
        task.decode_s += time.perf_counter() - began
        if task.done:
            self._answer(task)

    def _step(self, turn_began: float) -> bool:
        """Give the device a step of the samples that are chosen for it.

        Args:
            turn_began: On ``time.perf_counter``'s clock.

        Returns:
            False where none can move, and nothing was under way either.
        """
        step_s = self.cost.step_s(self.runner.max_samples)
        places = self.runner.max_samples
        ready = [task.ready(step_s, places) for task in self.board.running]
        chosen = self._batcher.choose([entry for entry in ready if entry is not None])
        moving = [
            (task, task.movable()[: chosen[task]]) for task in self.board.running if task in chosen
        ]
        if not moving:
            return self._catch_up()
        # Samples of one scene stand side by side, scenes in the order in which they came.
        came = list(dict.fromkeys(task.job.digest for task, _ in moving))
        moving.sort(key=lambda pair: came.index(pair[0].job.digest))
        began = self.runner.moment()
        self._advance(moving, [sample for _, samples in moving for sample in samples])
        counts = {task: len(samples) for task, samples in moving}
        step = Step(counts, began, self.runner.moment())
        lead_s = LEAD_S + time.perf_counter() - turn_began
        self._catch_up()
        self._under_way = step
        self._rest(step, lead_s)
        return True

    def _rest(self, step: Step, lead_s: float) -> None:
        """Until the device is through with a step that it has just begun, or so soon before."""
        lasts_s = self.cost.step_s(step.size) or 0.0
        until = time.perf_counter() + lasts_s - lead_s
        while not step.ended.passed():
            if time.perf_counter() >= until:
                return
            time.sleep(GLANCE_S)
        self._catch_up()

    def _catch_up(self) -> bool:
        """Wait for the step that is under way, and count it; False where there is none."""
        step, self._under_way = self._under_way, None
        if step is None:
            return False
        step.ended.wait()
        expected = self.cost.step_s(step.size, corrected=False)
        if expected is not None:
            self.cost.observe(expected, self._waited_s + step.ended.since(step.began))
        self._waited_s = 0.0
        self.board.add_up("steps")
        for task, count in step.counts.items():
            if task in self.board.running:
                self._guard(task, partial(self._count, count=count))
        return True

    def _advance(self, moving: list[tuple[Task, list[Sample]]], batch: list[Sample]) -> None:
        """Step a batch; where that fails, step each job by itself, so that one fails alone."""
        before = {id(sample): sample.index for sample in batch}
        try:
            self.runner.step(batch)
        except SpoiltWeights as error:
            for task, _ in moving:
                self._end(task, error)
        except Exception as error:  # noqa: BLE001  # whoever submitted the job gets it
            if len(moving) == 1:
                self._end(moving[0][0], error)
                return
            for task, samples in moving:
                left = [sample for sample in samples if sample.index == before[id(sample)]]
                if left:
                    self._guard(task, partial(self._step_alone, samples=left))

    def _step_alone(self, _: Task, samples: list[Sample]) -> None:
        self.runner.step(samples)

    def _count(self, task: Task, count: int) -> None:
        """Take in that a job has made a step, and tell its listener."""
        with self.board.changed:
            task.sample_steps_left -= count
            task.sample_steps_done += count
        if task.job.on_step is not None:
            task.job.on_step(task.sample_steps_done, task.job.sample_steps)

    def _guard(self, task: Task, work: Callable[[Task], None]) -> None:
        """Do something for one job; if it fails, that job alone ends with the error."""
        try:
            work(task)
        except Exception as error:  # noqa: BLE001  # whoever submitted the job gets it
            if task in self.board.running:
                self._end(task, error)

    def _answer(self, task: Task) -> None:
        sampled = task.answer()
        self._give_back(task)
        took_s = time.perf_counter() - task.submitted
        if task.promised_s is not None:
            logger.info(
                "%d samples of %d steps: expected in %.3g s, answered in %.3g s",
                len(task.job.seeds), task.job.steps, task.promised_s, took_s,
            )  # fmt: skip
        outcome = "partial" if sampled.partial else "completed"
        self.board.remove(task, outcome, task.sample_steps_done)
        task.future.set_result(sampled)

    def _end(self, task: Task, error: Exception) -> None:
        """End a running job with an error."""
        self._give_back(task)
        cancelled = isinstance(error, Cancelled)
        if not cancelled:
            logger.warning("a job failed: %s: %s", type(error).__name__, error)
        self.board.remove(task, "cancelled" if cancelled else "failed")
        task.future.set_exception(error)


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded(
        "The deadline came before one candidate was finished: ask for fewer steps, or allow more "
        "time."
    )
