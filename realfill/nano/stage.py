"""What the stages of the recipe share: the line of a log, random draws, the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from realfill.errors import TrainingDiverged
from realfill.precision import training_dtype

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
    """A running mean of a stage's loss, which a GPU need not be waited for at every step.

    Args:
        stage: What is trained.
        keep: How much of the mean is kept at each step.
        step: Steps that were made before.
        mean: Of those, where it was kept.

    Attributes:
        value: The mean when it was read last.
    """

    def __init__(
        self, stage: str, keep: float, *, step: int = 0, mean: float | None = None
    ) -> None:
        self.value = mean or 0.0
        self._stage, self._keep, self._step = stage, keep, step
        self._mean = None if mean is None else torch.tensor(mean)

    def take(self, loss: Tensor) -> None:
        """Take one step's loss in.

        Raises:
            TrainingDiverged: As ``read``.
        """
        latest = loss.detach()
        before = latest if self._mean is None else self._mean.to(latest.device)
        self._mean = torch.lerp(latest, before, self._keep)
        self._step += 1
        if latest.device.type == "cpu" or self._step % READ_EVERY == 0:
            self.read()

    def read(self) -> float:
        """The mean now. Asked before weights are kept, so that none are that have diverged.

        Raises:
            TrainingDiverged: It is not finite.
        """
        self.value = self.value if self._mean is None else float(self._mean)
        if not math.isfinite(self.value):
            raise TrainingDiverged(
                f"the loss of stage {self._stage} is {self.value} at step {self._step}; lower its "
                "learning rate in realfill/nano/pretrain.py, delete its checkpoint and start again"
            )
        return self.value
