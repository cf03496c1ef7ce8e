"""How long work takes: measured at the start, corrected by what then happens."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Sequence

# Weight of the newest measurement: the last five count for two thirds.
NEWEST = 0.2
# Larger batches are not tried once a step takes so long; their time is extrapolated.
LONGEST_TRIAL_S = 1.0
# One step counts as so many times slower or faster than expected at most: a stall is no trend.
MOST_DRIFT = 4.0


class CostModel:
    """Seconds of lane time by batch size, and how far reality is from them.

    Until it is calibrated it knows nothing and promises nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sizes: list[int] = []
        self._step_s: list[float] = []
        self._decode_s = 0.0
        self._drift = 1.0

    def calibrate(
        self,
        sizes: Sequence[int],
        step_s: Callable[[int], float],
        decode_s: Callable[[], float],
    ) -> None:
        """Measure steps of rising batch sizes and the decoding of one sample.

        Args:
            sizes: Rising.
            step_s: Seconds of one step of so many samples.
            decode_s: Seconds to decode one sample.
        """
        tried: list[tuple[int, float]] = []
        for size in sizes:
            if tried and tried[-1][1] > LONGEST_TRIAL_S:
                break
            tried.append((size, step_s(size)))
        decode = decode_s()
        with self._lock:
            self._sizes = [size for size, _ in tried]
            self._step_s = [seconds for _, seconds in tried]
            self._decode_s = decode

    def observe(self, predicted_s: float, actual_s: float) -> None:
        """Take in how long something took for which the model, uncorrected, said something else."""
        if predicted_s <= 0:
            return
        with self._lock:
            ratio = min(max(actual_s / predicted_s, 1 / MOST_DRIFT), MOST_DRIFT)
            self._drift += NEWEST * (ratio - self._drift)

    @property
    def drift(self) -> float:
        """Actual over predicted seconds of recent steps; 1 where the calibration holds."""
        with self._lock:
            return self._drift

    @property
    def per_s(self) -> float | None:
        """Sample-steps per second of the largest batch measured; None before the calibration."""
        with self._lock:
            if not self._sizes:
                return None
            return self._sizes[-1] / (self._step_s[-1] * self._drift)

    def step_s(self, size: int, *, corrected: bool = True) -> float | None:
        """Seconds of one step of so many samples, interpolated; None before the calibration."""
        with self._lock:
            sizes, seconds = self._sizes, self._step_s
            if not sizes:
                return None
            at = bisect.bisect_left(sizes, size)
            if at == len(sizes):
                value = seconds[-1] * size / sizes[-1]
            elif sizes[at] == size or at == 0:
                value = seconds[at]
            else:
                share = (size - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
                value = seconds[at - 1] + share * (seconds[at] - seconds[at - 1])
            return value * (self._drift if corrected else 1.0)

    def decoding_s(self, samples: int) -> float:
        """Seconds to decode so many; 0 before the calibration."""
        with self._lock:
            return samples * self._decode_s

    def seconds_for(self, sample_steps: float, samples: int = 0) -> float | None:
        """Lane time of sample-steps in full batches and of decoding samples; None as above."""
        rate = self.per_s
        if rate is None:
            return None
        with self._lock:
            return sample_steps / rate + samples * self._decode_s

    def alone_s(
        self, samples: int, steps: int, at_once: int, *, corrected: bool = True
    ) -> float | None:
        """Seconds of a job that has the lane to itself; None before the calibration.

        Args:
            samples: Its seeds.
            steps: Of each.
            at_once: Most samples in one call.
            corrected: Whether what recent steps took is considered.
        """
        whole, rest = divmod(samples, at_once)
        full = self.step_s(at_once, corrected=corrected)
        last = self.step_s(rest, corrected=corrected) if rest else 0.0
        if full is None or last is None:
            return None
        with self._lock:
            return steps * (whole * full + last) + samples * self._decode_s

    def beside_s(self, samples: int, steps: int, others: int, at_once: int) -> float | None:
        """Seconds of a job whose batches are filled up with others; None before the calibration.

        Args:
            samples: Its seeds.
            steps: Of each.
            others: Samples of other jobs that are there.
            at_once: Most samples in one call.
        """
        full = -(-samples // at_once) * at_once
        together = min(samples + others, full)
        alone = self.alone_s(together, steps, at_once)
        return None if alone is None else alone - self.decoding_s(together - samples)
