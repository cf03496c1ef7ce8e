"""One step by every implementation of attention that runs here."""

from __future__ import annotations

from functools import partial
from typing import get_args

from benchmarks.engine.mixing import batches, check_timings, timed
from realfill.base import Base
from service.engine.attention import Chosen, xformers_obstacle


def ways(base: Base) -> list[Chosen]:
    """What runs on the base's device, torch's own first."""
    found: list[Chosen] = ["sdpa"]
    if base.device.type == "cuda":
        found += [way for way in get_args(Chosen) if way != "sdpa"]
    if "xformers" in found and xformers_obstacle(base.device, base.dtype) is not None:
        found.remove("xformers")
    return found


def measure_attention(
    base: Base, *, samples: int, rank: int, repeats: int
) -> dict[Chosen, list[float]]:
    """Seconds of a step of one scene, by each way; there and back, since only one can be installed.

    Args:
        base: The resident model.
        samples: Of the batch.
        rank: Of its adapter.
        repeats: Timings of each in either direction, on a GPU of several steps in a row.
    """
    check_timings(repeats + 1, base.device)
    there = ways(base)
    seconds: dict[Chosen, list[float]] = {way: [] for way in there}
    for way in (*there, *reversed(there)):
        with batches(base, 1, samples, rank, attention=way) as (runner, one, _):
            step = partial(runner.step, one)
            for turn in range(repeats):
                seconds[way] += timed(step, base.device, warm_up=turn == 0)
    return seconds
