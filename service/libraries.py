"""What libraries read when they are loaded, so that the service cannot set it itself."""

from __future__ import annotations

import os
import sys
from ctypes.util import find_library
from functools import cache
from pathlib import Path

# Idle threads of NumPy and SciPy spin for 30 ms after each seam, and would take a core from the
# lane. The lane's spin for 10 ms unless told otherwise (300000 turns), and take a core from whoever
# writes the answer; so many turns, 2 to 4 ms, are still longer than the lane's pauses between
# operations. Scenes are made ready by many threads; where each has a heap of its own, memory that
# one scene leaves is not there for the next.
LIBRARIES = {
    "OPENBLAS_NUM_THREADS": "1",
    "GOMP_SPINCOUNT": "50000",
    "MALLOC_ARENA_MAX": "2",
}
PRELOADED = "LD_PRELOAD"


def library_variables() -> dict[str, str]:
    """Variables for a process that serves; what is set already stays as it is."""
    variables = {name: os.environ.get(name, value) for name, value in LIBRARIES.items()}
    allocator = tcmalloc()
    if allocator is not None and PRELOADED not in os.environ:
        variables[PRELOADED] = allocator
    return variables


@cache
def tcmalloc() -> str | None:
    """The file of Google's allocator, if the system has it, by the name that ctypes finds.

    Of a mixed batch's time on a CPU glibc's takes 4 % and this one 1; of one scene's 2 and 0.7
    (docs/engine.md).
    """
    if not sys.platform.startswith("linux"):
        return None
    return find_library("tcmalloc_minimal") or find_library("tcmalloc")


def has_tcmalloc() -> bool:
    """Whether this process allocates by it."""
    maps = Path("/proc/self/maps")
    return maps.is_file() and "/libtcmalloc" in maps.read_text()


def begin_as_served() -> None:
    """Begin this process again with what a serving one would have, unless it has."""
    wanted = library_variables()
    if any(name not in os.environ for name in wanted):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **wanted})
