"""Memory of a process and of all that it started, over time."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

PROC = Path("/proc")
WARM_UP = 1 / 3
# Of what follows the warm-up, the part at either end that is compared.
END = 1 / 4


@dataclass(frozen=True)
class MemorySample:
    """Resident memory of the whole tree, so many seconds after the start."""

    at_s: float
    rss_bytes: int


def tree_of(pid: int) -> list[int]:
    """A process and all its descendants, in whatever sessions they are; needs Linux."""
    children = defaultdict(list)
    for stat in PROC.glob("[0-9]*/stat"):
        try:
            # The name in brackets may hold blanks and brackets itself.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children[parent].append(int(stat.parent.name))
    tree = [pid]
    for process in tree:
        tree += children[process]
    return tree


def resident_bytes(pid: int) -> int:
    """Resident memory of a process tree; pages that processes share count once for each."""
    total = 0
    for process in tree_of(pid):
        try:
            pages = int((PROC / str(process) / "statm").read_text().split()[1])
        except OSError:
            # It ended meanwhile.
            continue
        total += pages * os.sysconf("SC_PAGE_SIZE")
    return total


def growth_pct(samples: Sequence[MemorySample]) -> float | None:
    """How far memory grew after the warm-up, which is the first third of the time.

    The median of the last quarter of the rest is held against that of its first quarter: one
    request's peak is not growth, and what grows slowly is seen at the far end.

    Returns:
        Per cent, negative where memory fell; None where there are fewer than twelve samples.
    """
    if len(samples) < 12:
        return None
    began, ended = samples[0].at_s, samples[-1].at_s
    warm = began + WARM_UP * (ended - began)
    span = END * (ended - warm)
    first = [s.rss_bytes for s in samples if warm <= s.at_s <= warm + span]
    last = [s.rss_bytes for s in samples if s.at_s >= ended - span]
    if not first or not last:
        return None
    return 100 * (median(last) / median(first) - 1)
