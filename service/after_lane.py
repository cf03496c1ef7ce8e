"""How long a completion takes after the lane: seams, ranking, encoding."""

from __future__ import annotations

import threading

import numpy as np

# Weight of the newest completion: the last five count for two thirds.
NEWEST = 0.2


class AfterLane:
    """Moving means by number of candidates; others lie between them, or are as the nearest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._means: dict[int, float] = {}

    def learn(self, candidates: int, seconds: float) -> None:
        """Take in what one completion took."""
        with self._lock:
            before = self._means.get(candidates, seconds)
            self._means[candidates] = before + NEWEST * (seconds - before)

    def expected_s(self, candidates: int) -> float:
        """Of a completion of so many candidates; 0 before there was any."""
        with self._lock:
            if not self._means:
                return 0.0
            counts = sorted(self._means)
            return float(np.interp(candidates, counts, [self._means[count] for count in counts]))
