"""What the stages of the recipe share: the line of a log, random draws, the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from realfill.adapt.training import training_dtype

# A GPU is asked for the loss, and so waited for, once in so many steps.
READ_EVERY = 25


@dataclass(frozen=True)
class Step:
    """One line of a training log."""

    stage: str
    step: int
    steps: int
    loss: float


def learning_rate(step: int, steps: int, peak: float, warm_up: int = 200) -> float:
    """Linear warm-up, then a half cosine down to a hundredth of the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def half_precision(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where the device computes in it; elsewhere nothing is changed."""
    quick = training_dtype(device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=quick)


def drawn_from(seed: int, stage: int, step: int, *, device: torch.device) -> torch.Generator:
    """The source of one step's draws, on the device; steps do not depend on each other."""
    start = int(np.random.default_rng((seed, stage, step)).integers(2**62))
    return torch.Generator(device).manual_seed(start)


class RunningLoss:
    """A running mean of the loss, which a GPU need not be waited for at every step.

    Args:
        keep: How much of the mean is kept at each step.
    """

    def __init__(self, keep: float) -> None:
        self.value = 0.0
        self._keep, self._mean, self._taken = keep, torch.zeros(()), 0

    def take(self, loss: Tensor) -> None:
        """Take one step's loss in."""
        mean = loss.detach()
        self._mean = torch.lerp(mean, self._mean, self._keep) if self._taken else mean
        if self._mean.device.type == "cpu" or self._taken % READ_EVERY == 0:
            self.value = float(self._mean)
        self._taken += 1
