"""How long a completion takes after the lane: waiting, seams, ranking, encoding."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np

# Weight of the newest completion: the last five count for two thirds.
NEWEST = 0.2
# Mean deviations above the mean that are allowed for.
DEVIATIONS = 2.0
# One completion counts as so many times what was expected at most: a stall is no trend.
MOST_GROWTH = 4.0
LEAST_S = 0.001
# What was learned so long before the newest is forgotten, and nobody is refused by what is so old:
# otherwise completions that nobody lets in any more would be expected to stay slow for ever.
FRESH_S = 30.0


@dataclass
class Seen:
    """Moving mean of some seconds, how far they lie from it, and about the fewest of late.

    Attributes:
        at: When it was learned last, on ``time.monotonic``'s clock.
    """

    mean_s: float
    at: float
    fewest_s: float
    deviation_s: float = 0.0

    def learn(self, seconds: float, at: float) -> None:
        """Take in one more."""
        seconds = min(seconds, MOST_GROWTH * max(self.expected_s, LEAST_S))
        # It rises again, so that one that had little to do does not count for ever.
        self.fewest_s = min(seconds, self.fewest_s + NEWEST * (seconds - self.fewest_s))
        off = seconds - self.mean_s
        self.mean_s += NEWEST * off
        self.deviation_s += NEWEST * (abs(off) - self.deviation_s)
        self.at = at

    @property
    def expected_s(self) -> float:
        """What one may well take."""
        return self.mean_s + DEVIATIONS * self.deviation_s


class AfterLane:
    """What completions took, by number of candidates.

    Other numbers lie between, or are in proportion to the nearest.

    Source: van Jacobson, "Congestion Avoidance and Control", 1988 (mean and mean deviation).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[int, Seen] = {}

    def learn(self, candidates: int, seconds: float) -> None:
        """Take in what one completion took, from the lane's answer on."""
        now = time.monotonic()
        with self._lock:
            self._seen.setdefault(candidates, Seen(seconds, now, seconds)).learn(seconds, now)
            self._seen = {n: seen for n, seen in self._seen.items() if now - seen.at <= FRESH_S}

    def expected_s(self, candidates: int) -> float:
        """What a completion of so many candidates may well take; 0 before there was any."""
        with self._lock:
            return self._between(candidates, {n: s.expected_s for n, s in self._seen.items()})

    def least_s(self, candidates: int) -> float:
        """About the fewest seconds that one took; 0 where none was seen of late."""
        since = time.monotonic() - FRESH_S
        with self._lock:
            fresh = {n: seen.fewest_s for n, seen in self._seen.items() if seen.at >= since}
            return self._between(candidates, fresh)

    @staticmethod
    def _between(candidates: int, known: dict[int, float]) -> float:
        counts = sorted(known)
        if not counts:
            return 0.0
        nearest = min(max(candidates, counts[0]), counts[-1])
        seconds = float(np.interp(nearest, counts, [known[count] for count in counts]))
        return seconds * candidates / nearest
