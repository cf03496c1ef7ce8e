"""Repeated timing, and its quantiles."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch

Outcome = TypeVar("Outcome")


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, the device's work included."""
    _finish(device)
    began = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - began


def repeated(
    work: Callable[[], object],
    repeats: int,
    device: torch.device,
    *,
    warm_up: int = 2,
    after: Callable[[], object] | None = None,
) -> list[float]:
    """Seconds of each of several calls.

    Args:
        work: What to time.
        repeats: Calls that count.
        device: To wait for before the clock is read.
        warm_up: Calls before those.
        after: Called after each call, off the clock.
    """
    seconds = []
    for _ in range(warm_up + repeats):
        seconds.append(seconds_of(work, device))
        if after is not None:
            after()
    return seconds[warm_up:]


def alone(work: Callable[[], Outcome]) -> Outcome:
    """Do it in a thread that ends, as the lane is one.

    Threads that have computed keep a team of OpenMP, which slows down those of other threads.
    """
    with ThreadPoolExecutor(1, "measure") as pool:
        return pool.submit(work).result()


@contextmanager
def idle_team() -> Iterator[None]:
    """Another thread that has computed with all cores, and now waits."""
    computed, over = threading.Event(), threading.Event()

    def compute_and_wait() -> None:
        square = torch.ones(1024, 1024)
        torch.mm(square, square)
        computed.set()
        over.wait()

    thread = threading.Thread(target=compute_and_wait)
    thread.start()
    computed.wait()
    try:
        yield
    finally:
        over.set()
        thread.join()


def quantile(seconds: Sequence[float], percent: float) -> float:
    """A percentile of the timings, in seconds."""
    return float(np.percentile(seconds, percent))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
