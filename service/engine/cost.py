"""How long work takes, learned from the work that was done."""

from __future__ import annotations

import threading

# Weight of the newest measurement: the last five count for two thirds.
NEWEST = 0.2


class SampleStepRate:
    """A running estimate of the seconds that one sample-step takes.

    Encoding, swapping and decoding are spread over a job's sample-steps, so that the estimate says
    how long jobs like the recent ones keep the lane.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: float | None = None

    def observe(self, sample_steps: int, seconds: float) -> None:
        """Take in one finished job."""
        newest = seconds / sample_steps
        with self._lock:
            if self._seconds is None:
                self._seconds = newest
            else:
                self._seconds += NEWEST * (newest - self._seconds)

    def seconds_for(self, sample_steps: float) -> float | None:
        """Expected seconds of lane time, None before the first observation."""
        with self._lock:
            return None if self._seconds is None else sample_steps * self._seconds

    @property
    def per_s(self) -> float | None:
        """Sample-steps per second, None before the first observation."""
        seconds = self.seconds_for(1)
        return 1.0 / seconds if seconds else None
