"""Every picture that was answered, held against the first one of its kind."""

from __future__ import annotations

import io
import itertools
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from PIL import Image

# Batches of different sizes may differ in the last bit of float32, which can turn the rounding to
# 8 bits over, and no more.
LEVELS = 1


@dataclass(frozen=True, order=True)
class Kind:
    """What a picture follows from; the scene decides about the target and its mask."""

    scene: str
    digest: str
    steps: int
    seed: int


class Gallery:
    """The first picture of each kind, and how the later ones compare.

    Attributes:
        repeated: Pictures that were not the first of their kind.
        near: Of those, unequal ones within ``LEVELS`` in every pixel.
        far: Of those, what differed by more: kind and largest difference.
    """

    def __init__(self) -> None:
        self._first: dict[Kind, bytes] = {}
        self.repeated = 0
        self.near = 0
        self.far: list[tuple[Kind, int]] = []

    def __len__(self) -> int:
        return len(self._first)

    @property
    def kinds(self) -> list[Kind]:
        """All kinds, sorted."""
        return sorted(self._first)

    def add(self, kind: Kind, file: bytes) -> None:
        """Take a picture in, as a PNG file; raises ValueError where it is none."""
        first = self._first.setdefault(kind, file)
        if first is file:
            # Read once, so that a file which is no picture is told at its own request.
            _pixels(file)
            return
        self.repeated += 1
        if first == file:
            return
        difference = largest_difference(first, file)
        if difference > LEVELS:
            self.far.append((kind, difference))
        elif difference:
            self.near += 1

    def pairs(self) -> list[tuple[Kind, Kind]]:
        """Kinds of one scene, steps and seed whose versions differ."""
        groups = defaultdict(list)
        for kind in self.kinds:
            groups[kind.scene, kind.steps, kind.seed].append(kind)
        return [pair for group in groups.values() for pair in itertools.combinations(group, 2)]

    def alike(self) -> list[tuple[Kind, Kind]]:
        """Pairs of versions whose pictures look the same."""
        return [
            (one, other)
            for one, other in self.pairs()
            if largest_difference(self._first[one], self._first[other]) <= LEVELS
        ]


def largest_difference(one: bytes, other: bytes) -> int:
    """Between two pictures, in levels of 0 to 255; 255 where even their sizes differ."""
    first, second = _pixels(one), _pixels(other)
    if first.shape != second.shape:
        return 255
    return int(np.abs(first.astype(np.int16) - second).max())


def _pixels(file: bytes) -> np.ndarray:
    """A picture file's pixels. [H, W, 3] uint8"""
    try:
        return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    except OSError as error:
        raise ValueError(f"{len(file)} bytes are no picture") from error
