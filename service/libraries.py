"""What libraries read when they are loaded, so that the service cannot set it itself."""

from __future__ import annotations

import os

from realfill.allocator import allocator_variables, begin_with

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


def library_variables() -> dict[str, str]:
    """Variables for a process that serves; what is set already stays as it is."""
    variables = {name: os.environ.get(name, value) for name, value in LIBRARIES.items()}
    return {**variables, **allocator_variables()}


def begin_as_served() -> None:
    """Begin this process again with what a serving one would have, unless it has."""
    begin_with(library_variables())
