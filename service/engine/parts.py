"""Which samples of a batch are computed with whose weights, and how a batch is cut."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from service.engine.layers import Packed


@dataclass(frozen=True)
class Parts:
    """Which consecutive samples of a batch use which weights.

    Attributes:
        ends: Where each part ends; of no matter where there is but one.
        weights: For each part, the packed weight of every layer, or None for the layer's own.
    """

    ends: tuple[int, ...] = ()
    weights: tuple[Sequence[Packed | None] | None, ...] = (None,)

    def sizes(self, count: int) -> list[int]:
        """Samples of each part, in a batch of so many."""
        return [count] if len(self.weights) == 1 else self._sizes

    @cached_property
    def _sizes(self) -> list[int]:
        """Of each part."""
        return [end - start for start, end in itertools.pairwise((0, *self.ends))]

    def between(self, start: int, stop: int) -> Parts:
        """The parts, or what is left of them, of the samples from one place to another."""
        if len(self.weights) == 1:
            return self
        kept = [
            (min(end, stop) - start, weights)
            for (begin, end), weights in zip(
                itertools.pairwise((0, *self.ends)), self.weights, strict=True
            )
            if begin < stop and end > start
        ]
        return Parts(tuple(end for end, _ in kept), tuple(weights for _, weights in kept))

    def pieces(self, count: int, most: int) -> Iterator[tuple[int, int]]:
        """Where pieces of a batch start and stop, each of few samples.

        Scenes share a piece where all of each fits; only those of more samples are cut.

        Args:
            count: Samples of the batch.
            most: Of a piece.
        """
        start = stop = 0
        for size in self.sizes(count):
            for first in range(0, size, most):
                more = min(most, size - first)
                if stop - start + more > most:
                    yield start, stop
                    start = stop
                stop += more
        if stop > start:
            yield start, stop


class Parting(threading.local):
    """The parts that the layers of a network go by; each thread has its own."""

    parts = Parts()

    @contextmanager
    def by(self, parts: Parts) -> Iterator[None]:
        """The calling thread goes by these parts, and then by those of before."""
        before, self.parts = self.parts, parts
        try:
            yield
        finally:
            self.parts = before
