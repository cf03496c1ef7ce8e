"""What steps and decoding take here, timed before the first job."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import torch

from service.engine.buckets import bucket_sizes
from service.engine.cost import CostModel
from service.engine.job import Job
from service.engine.runner import Runner

logger = logging.getLogger(__name__)

# Of a step and of decoding.
TIMES = 2


def calibrate(cost: CostModel, runner: Runner) -> None:
    """Time steps of rising batches on grey, and the decoding of one sample.

    Args:
        cost: Takes in what was timed.
        runner: Warmed up; the calling thread is the one that will drive it.
    """
    base, most = runner.base, runner.max_samples
    width = int(base.unet.config.cross_attention_dim)
    job = Job(
        digest=None,
        adapter=None,
        prompt_embedding=torch.zeros(77, width),
        target=torch.full((3, base.size_px, base.size_px), 0.5),
        mask=torch.ones(base.size_px, base.size_px),
        seeds=tuple(range(most)),
        steps=1 + TIMES,
        sampler=base.sampler,
    )
    samples = runner.begin(job)

    def step_s(size: int) -> float:
        # The first step warms up.
        for sample in samples[:size]:
            sample.index = 0
        runner.step(samples[:size])
        return _seconds(runner, lambda: runner.step(samples[:size]))

    decode = partial(runner.decode, [samples[0].latents])
    cost.calibrate(bucket_sizes(most), step_s, lambda: _seconds(runner, decode))
    numbers = str(base.multiplies_in).removeprefix("torch.")
    logger.info("calibrated: %.4g sample-steps/s, multiplying in %s", cost.per_s, numbers)


def _seconds(runner: Runner, work: Callable[[], object]) -> float:
    """Of the quickest of a few: what a stall made of one is no measure."""
    return min(_timed(runner, work) for _ in range(TIMES))


def _timed(runner: Runner, work: Callable[[], object]) -> float:
    runner.synchronize()
    began = time.perf_counter()
    work()
    runner.synchronize()
    return time.perf_counter() - began
