"""Two training runs, a stretch of each in turns, so that a busy minute touches both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice

from realfill.adapt.training import train
from realfill.base import Base
from realfill.config import TrainingConfig
from realfill.scene import Scene

STRETCH = 10


def seconds_in_turns(
    bases: Sequence[Base],
    scene: Scene,
    configs: Sequence[TrainingConfig],
    on_step: Callable[[], object] = lambda: None,
) -> list[float]:
    """How long each run takes, all that it does before its first step included.

    Args:
        bases: One for each run: factors lie beside the layers of the base that they are trained on.
        scene: Of all runs.
        configs: Of each run, of equal numbers of steps.
        on_step: Called after every step.
    """
    runs = [train(base, scene, config) for base, config in zip(bases, configs, strict=True)]
    seconds = [0.0] * len(runs)
    for turn in range(0, configs[0].steps, STRETCH):
        order = range(len(runs)) if turn // STRETCH % 2 == 0 else reversed(range(len(runs)))
        for k in order:
            began = time.perf_counter()
            for _ in islice(runs[k], STRETCH):
                on_step()
            seconds[k] += time.perf_counter() - began
    return seconds
