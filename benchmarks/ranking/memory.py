"""How much memory a call takes at its peak, beyond what the process held before."""

from __future__ import annotations

import ctypes
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import torch

STATM = Path("/proc/self/statm")
EVERY_S = 0.001


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes on the device, or most resident bytes seen by a thread that looks each ms.

    On a CPU this needs Linux and its C library.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Memory that was freed but not given back would hide what the call takes.
    ctypes.CDLL(None).malloc_trim(0)
    done = threading.Event()
    before = _resident_bytes()
    highest = [before]

    def watch() -> None:
        while not done.wait(EVERY_S):
            highest[0] = max(highest[0], _resident_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
        highest[0] = max(highest[0], _resident_bytes())
    finally:
        done.set()
        watcher.join()
    return highest[0] - before


def _resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * resource.getpagesize()
