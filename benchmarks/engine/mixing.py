"""What it costs that scenes share batches, and what a new request waits for."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from benchmarks.engine.adapters import random_adapter
from benchmarks.engine.bench import running
from benchmarks.engine.rates import job_of
from benchmarks.engine.timing import repeated
from realfill.adapter import Adapter
from realfill.base import PAPER_MODULES, Base
from service.engine import Engine, Job, Runner, Sampled
from service.engine.attention import Attention
from service.engine.runner import Application
from service.engine.sample import Sample

# So many that no sample is finished before a measurement's end (those that would make more are
# refused), and fewer than the timesteps that a scheduler has.
MANY_STEPS = 800
PAPER_RANK = 8
# Timed as one. A GPU is given the next step before it is through with the last, as by the lane;
# otherwise what the host does for a single step would count, and its noise.
IN_A_ROW = {"cpu": 1, "cuda": 8}


@dataclass(frozen=True)
class Mixing:
    """Seconds of one step of a batch, in turns.

    Attributes:
        one_s: All samples of one scene.
        mixed_s: A scene for every few samples, in one call.
    """

    one_s: list[float]
    mixed_s: list[float]

    @property
    def overhead_pct(self) -> float:
        """How much longer than one scene the mixed batch takes, in per cent."""
        return 100 * (median(self.mixed_s) / median(self.one_s) - 1)


@dataclass(frozen=True)
class Apart:
    """Seconds of one step of a batch of several scenes, in turns.

    Attributes:
        together_s: In one call.
        apart_s: Every scene in a call of its own.
    """

    together_s: list[float]
    apart_s: list[float]


def paper_like(base: Base) -> Base:
    """The same base with the paper's targets: attention alone."""
    return dataclasses.replace(base, adapter_modules=PAPER_MODULES)


def measure_mixing(
    base: Base,
    *,
    scenes: int,
    samples: int,
    rank: int,
    repeats: int,
    application: Application = "auto",
) -> Mixing:
    """Step batches of as many samples, of one scene and of several.

    Args:
        base: The resident model.
        scenes: Of the mixed batch; they have equal shares.
        samples: Of every batch.
        rank: Of the adapters.
        repeats: Timings of each, on a GPU of several steps in a row.
        application: The way of applying adapters.
    """
    with batches(base, scenes, samples, rank, application) as (runner, one, groups):
        mixed = [sample for group in groups for sample in group]
        one_s, mixed_s = _in_turns(
            runner, repeats, partial(runner.step, one), partial(runner.step, mixed)
        )
    return Mixing(one_s, mixed_s)


def measure_apart(base: Base, *, scenes: int, samples: int, rank: int, repeats: int) -> Apart:
    """Step batches of several scenes, in one call and in one for each scene.

    Args:
        base, scenes, samples, rank, repeats: As for ``measure_mixing``.
    """
    with batches(base, scenes, samples, rank) as (runner, _, groups):
        together = [sample for group in groups for sample in group]

        def apart() -> None:
            for group in groups:
                runner.step(group)

        together_s, apart_s = _in_turns(runner, repeats, partial(runner.step, together), apart)
    return Apart(together_s, apart_s)


@contextmanager
def batches(
    base: Base,
    scenes: int,
    samples: int,
    rank: int,
    application: Application = "auto",
    attention: Attention = "auto",
) -> Iterator[tuple[Runner, list[Sample], list[list[Sample]]]]:
    """A runner, a batch of its first scene, and as many samples of all its scenes, by scene."""
    adapters = [random_adapter(base, rank=rank, seed=seed) for seed in range(scenes)]
    with running(
        base,
        attention=attention,
        application=application,
        max_samples=samples,
        split_from=samples + 1,
    ) as runner:
        groups = [
            _begun(runner, base, adapter, f"{k:064d}", samples // scenes)
            for k, adapter in enumerate(adapters)
        ]
        yield runner, _begun(runner, base, adapters[0], f"{0:064d}", samples), groups


def _in_turns(
    runner: Runner, repeats: int, *steps: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """Seconds of either way to step, each as often the first of a turn as the other.

    What comes before moves a GPU's clock: who always follows the other might find a slower one.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    # Where weights are merged in place, and steps have buffers of their own, only the second
    # step in a row is one of a batch that stays as it is.
    always_warm = runner.weights.name == "segmented"
    check_timings(2 * repeats if always_warm else repeats + 1, runner.base.device)
    for turn in range(repeats):
        warm_up = turn == 0 or always_warm
        for way in (0, 1) if turn % 2 == 0 else (1, 0):
            seconds[way].extend(timed(steps[way], runner.base.device, warm_up=warm_up))
    return seconds


def check_timings(timings: int, device: torch.device) -> None:
    """Whether samples have steps for so many timings, warm-ups included.

    Raises:
        RuntimeError: They have not.
    """
    _check_steps(timings * IN_A_ROW[device.type])


def _check_steps(needed: int) -> None:
    if needed > MANY_STEPS:
        raise RuntimeError(
            f"this takes {needed} steps of samples that have {MANY_STEPS}: give fewer --repeats or"
            " --steps"
        )


def timed(step: Callable[[], None], device: torch.device, *, warm_up: bool) -> list[float]:
    """Seconds of one step, on a GPU of one of several in a row; once before if it is to be warm."""
    in_a_row = IN_A_ROW[device.type]

    def several() -> None:
        for _ in range(in_a_row):
            step()

    return [s / in_a_row for s in repeated(several, 1, device, warm_up=int(warm_up))]


def _begun(runner: Runner, base: Base, adapter: Adapter, digest: str, samples: int) -> list[Sample]:
    job = dataclasses.replace(_job(base, samples, MANY_STEPS), digest=digest, adapter=adapter)
    if not runner.weights.take(digest, adapter):
        raise RuntimeError("the arena has no room for so many scenes: measure fewer")
    return runner.begin(job)


def _job(base: Base, samples: int, steps: int) -> Job:
    return dataclasses.replace(job_of(base, samples=samples, steps=1), steps=steps, sampler="ddim")


@dataclass(frozen=True)
class Waits:
    """Seconds that a request of one candidate waits while a large job is in the lane.

    Attributes:
        join_s: From its submission to the end of its first step.
        answer_s: From its submission to its answer.
        idle_s: The same answer by an idle lane.
        step_s: One step of the large job by itself.
    """

    join_s: list[float]
    answer_s: list[float]
    idle_s: list[float]
    step_s: list[float]


class Clock:
    """Listens to a job and keeps the time of each of its steps."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def tick(self, done: int, total: int) -> None:
        """One more step."""
        self.ticks.append(time.perf_counter())


def measure_waits(base: Base, *, samples: int, steps: int, repeats: int) -> Waits:
    """Submit small jobs beside a large one.

    Args:
        base: The resident model.
        samples: Of the large job.
        steps: Of the small jobs, of one sample each.
        repeats: Small jobs, one after the other.

    Raises:
        RuntimeError: The large job was over before the last small one, or would be.
    """
    # Those alone, and those that small jobs join, with the one that is under way when they come.
    _check_steps(repeats + 1 + repeats * (steps + 1))
    small = _job(base, 1, steps)
    waits = Waits([], [], [], [])
    with Engine(base, max_samples=samples + 1) as engine:
        engine.submit(small).result()
        for _ in range(repeats):
            began = time.perf_counter()
            engine.submit(small).result()
            waits.idle_s.append(time.perf_counter() - began)
        steps_of = Clock()
        large = dataclasses.replace(
            _job(base, samples, MANY_STEPS), cancel=threading.Event(), on_step=steps_of.tick
        )
        running = engine.submit(large)
        while len(steps_of.ticks) < repeats + 1:
            _check_busy(running)
            time.sleep(0.005)
        ticks = list(steps_of.ticks)
        waits.step_s.extend(later - sooner for sooner, later in itertools.pairwise(ticks))
        for _ in range(repeats):
            clock = Clock()
            job = dataclasses.replace(small, on_step=clock.tick)
            began = time.perf_counter()
            engine.submit(job).result()
            waits.answer_s.append(time.perf_counter() - began)
            waits.join_s.append(clock.ticks[0] - began)
            _check_busy(running)
        large.cancel.set()
        running.exception()
    return waits


def _check_busy(running: Future[Sampled]) -> None:
    if running.done():
        raise RuntimeError(
            "the large job was over before all small ones were: give fewer --repeats or --steps"
        ) from running.exception()


@dataclass(frozen=True)
class Lone:
    """Seconds of one job on an idle engine and on a runner without a lane, in turns."""

    engine_s: list[float]
    runner_s: list[float]

    @property
    def overhead_pct(self) -> float:
        """What the lane adds, in per cent, by medians."""
        return 100 * (median(self.engine_s) / median(self.runner_s) - 1)


def measure_lone(base: Base, *, samples: int, steps: int, repeats: int) -> Lone:
    """One job at a time, with a lane and without; both on the same resident base."""
    job = _job(base, samples, steps)
    lone = Lone([], [])
    with Engine(base) as engine:
        engine.submit(job).result()
        for turn in range(-1, repeats):
            began = time.perf_counter()
            engine.submit(job).result()
            between = time.perf_counter()
            engine.runner.run(job)
            if turn >= 0:
                lone.engine_s.append(between - began)
                lone.runner_s.append(time.perf_counter() - between)
    return lone


def captures_after_start(base: Base, *, samples: int) -> int:
    """Programs traced and graphs captured for jobs of two scenes, alone and in shared batches.

    Args:
        base: Resident; the scenes' adapters have the paper's rank.
        samples: Jobs of one, two, four and so on are submitted, up to so many.
    """
    scenes = [(f"scene{k}", random_adapter(base, rank=PAPER_RANK, seed=k)) for k in range(2)]
    with Engine(base) as engine:
        before = engine.metrics().programs
        count = 1
        while count <= samples:
            plain = job_of(base, samples=count, steps=2)
            jobs = [plain, *(dataclasses.replace(plain, digest=d, adapter=a) for d, a in scenes)]
            for job in jobs:
                engine.submit(job).result()
            for future in [engine.submit(job) for job in jobs]:
                future.result()
            count *= 2
        return engine.metrics().programs - before
