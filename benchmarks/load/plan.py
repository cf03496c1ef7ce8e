"""When each request is due and for which scene, drawn before the first answer can shape it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Arrival:
    """One request: due ``at_s`` seconds after the start."""

    at_s: float
    scene: str
    seed: int


def popularity(count: int, zipf_s: float) -> list[float]:
    """Zipf's weights: the k-th of ``count`` gets ``1 / k**zipf_s``."""
    return [1 / k**zipf_s for k in range(1, count + 1)]


def arrivals(
    scenes: Sequence[str], *, rate_per_s: float, duration_s: float, zipf_s: float, seed: int
) -> list[Arrival]:
    """Poisson arrivals over Zipf-popular scenes; the same seed gives the same list.

    Args:
        scenes: Names, the most popular first: the k-th gets weight ``1 / k**zipf_s``.
        rate_per_s: Mean arrivals per second.
        duration_s: Arrivals are due in [0, duration_s).
        zipf_s: 0 for equal popularity, 1 for the classical law.
        seed: Of the draws, and the first of the requests' own seeds.

    Raises:
        ValueError: No scenes, or a rate or duration that is not positive.
    """
    if not scenes:
        raise ValueError("No scene to ask for: name at least one.")
    if rate_per_s <= 0 or duration_s <= 0:
        raise ValueError(
            f"Rate {rate_per_s} and duration {duration_s} must both be positive seconds."
        )
    draw = random.Random(seed)
    weights = popularity(len(scenes), zipf_s)
    planned: list[Arrival] = []
    at_s = draw.expovariate(rate_per_s)
    while at_s < duration_s:
        scene = draw.choices(scenes, weights)[0]
        planned.append(Arrival(at_s=at_s, scene=scene, seed=seed + len(planned)))
        at_s += draw.expovariate(rate_per_s)
    return planned
