"""How long a completion takes after the lane: waiting, seams, ranking, encoding."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

# Weight of the newest completion: the last five count for two thirds.
NEWEST = 0.2
# Mean deviations above the mean that are allowed for.
DEVIATIONS = 2.0


@dataclass
class Seen:
    """Moving mean of some seconds, and of how far they lie from it."""

    mean_s: float
    deviation_s: float = 0.0

    def learn(self, seconds: float) -> None:
        """Take in one more."""
        off = seconds - self.mean_s
        self.mean_s += NEWEST * off
        self.deviation_s += NEWEST * (abs(off) - self.deviation_s)

    @property
    def expected_s(self) -> float:
        """What one may well take."""
        return self.mean_s + DEVIATIONS * self.deviation_s


class AfterLane:
    """What completions took, by number of candidates; others lie between, or are as the nearest.

    Source: van Jacobson, "Congestion Avoidance and Control", 1988 (mean and mean deviation).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[int, Seen] = {}

    def learn(self, candidates: int, seconds: float) -> None:
        """Take in what one completion took, from the lane's answer on."""
        with self._lock:
            self._seen.setdefault(candidates, Seen(seconds)).learn(seconds)

    def expected_s(self, candidates: int) -> float:
        """Of a completion of so many candidates; 0 before there was any."""
        with self._lock:
            if not self._seen:
                return 0.0
            counts = sorted(self._seen)
            expected = [self._seen[count].expected_s for count in counts]
        return float(np.interp(candidates, counts, expected))
