"""Correspondences between images, and the ``Matcher`` protocol of what finds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

CELL_PX = 8


@dataclass(frozen=True)
class Features:
    """What a matcher keeps of a batch of images of one size.

    Attributes:
        tokens: One row per coarse cell in reading order, or per point. [N, L, C]
        grid: Rows and columns of cells of 8 px at working size.
        points: Columns and rows of the points in px, of a matcher that finds its own; absent
            points are negative. [N, L, 2]
    """

    tokens: Tensor
    grid: tuple[int, int]
    points: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def places(self) -> Tensor:
        """Columns and rows of what the tokens stand for, in px. [N, L, 2]"""
        if self.points is not None:
            return self.points
        cells = torch.arange(self.grid[0] * self.grid[1], device=self.tokens.device)
        return cell_points(cells, self.grid[1]).expand(len(self), -1, -1)


@dataclass(frozen=True)
class Correspondences:
    """Matched points of many image pairs, ordered by pair.

    Attributes:
        points0: Columns and rows in image 0, in px. [K, 2]
        points1: Columns and rows in image 1, in px. [K, 2]
        confidence: In (0, 1]. [K]
        pair: Index of the pair each match belongs to. [K]
    """

    points0: Tensor
    points1: Tensor
    confidence: Tensor
    pair: Tensor

    def __len__(self) -> int:
        return len(self.pair)

    def where(self, keep: Tensor) -> Correspondences:
        """Only the matches that ``keep`` selects, a boolean row or indices. [K]"""
        return Correspondences(
            self.points0[keep], self.points1[keep], self.confidence[keep], self.pair[keep]
        )

    def of_pair(self, pair: int) -> Correspondences:
        """Only the matches of one pair."""
        return self.where(self.pair == pair)


@dataclass(frozen=True)
class Matches:
    """The same with an entry for every point of image 0, so that no size depends on the images.

    Attributes:
        points0: Columns and rows in image 0, in px. [N, L, 2]
        points1: Columns and rows in image 1, in px; anything where there is no match. [N, L, 2]
        confidence: In (0, 1], 0 where there is no match. [N, L]
    """

    points0: Tensor
    points1: Tensor
    confidence: Tensor

    def correspondences(self) -> Correspondences:
        """Only what matched; the host waits for the device here."""
        pair, place = torch.where(self.confidence > 0)
        return Correspondences(
            self.points0[pair, place],
            self.points1[pair, place],
            self.confidence[pair, place],
            pair,
        )

    def above(self, threshold: float) -> Matches:
        """Only those of more confidence."""
        return replace(self, confidence=self.confidence * (self.confidence > threshold))

    def split(self, images: int) -> list[Matches]:
        """By so many images 0 each."""
        parts = (part.split(images) for part in (self.points0, self.points1, self.confidence))
        return [Matches(*each) for each in zip(*parts, strict=True)]


class Matcher(Protocol):
    """Finds correspondences between images.

    Attributes:
        name: For records and evidence.
        size_multiple: Heights and widths must be multiples of it, itself one of 8.
        working_px: Long side at which it matches best.
        threshold: Confidence above which it takes a match for sure, at least 0.
        takes_all_cores: Whether it computes with every core, whatever the calling thread may use.
    """

    name: str
    size_multiple: int
    working_px: int
    threshold: float
    takes_all_cores: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 of all that features depend on beside the image: weights and configuration."""
        ...

    def features(self, images: Tensor) -> Features:
        """Look at each image once; grey, in [0, 1]. [N, 1, H, W]

        Raises:
            ValueError: A side is no multiple of ``size_multiple``.
        """
        ...

    def compare(
        self, features0: Features, features1: Features, *, threshold: float | None = None
    ) -> Matches:
        """Match image k with image k; a single image 1 is matched with every image 0.

        The host does not wait for the device.

        Args:
            features0: Of images 0.
            features1: Of images 1, as many or one.
            threshold: Confidence that a match exceeds: the matcher's own, or 0 for all that are
                each other's best.

        Raises:
            ValueError: There are neither as many images 1 as images 0, nor one.
        """
        ...

    def compare_each(
        self, features0: Features, others: Sequence[Features], *, threshold: float | None = None
    ) -> list[Matches]:
        """Match every image 0 with each of several single images 1.

        Args:
            features0: Of images 0.
            others: Each of one image.
            threshold: As for ``compare``.
        """
        return [self.compare(features0, other, threshold=threshold) for other in others]

    def match(self, features0: Features, features1: Features) -> Correspondences:
        """What ``compare`` finds, without the places that found nothing."""
        return self.compare(features0, features1).correspondences()


def cell_points(cells: Tensor, columns: int) -> Tensor:
    """The pixel each cell sits on, column first. [..., 2]"""
    return torch.stack([cells % columns, cells // columns], -1).float() * CELL_PX


def cell_matches(
    confidence: Tensor, partner: Tensor, features0: Features, features1: Features
) -> Matches:
    """Matches of what ``kernels.match_count`` found.

    Args:
        confidence: Of each token of image 0, 0 without a match. [N, L]
        partner: Token of image 1. [N, L]
        features0: Of images 0.
        features1: Of images 1, as many or one.
    """
    places = features1.places().expand(len(features0), -1, -1)
    points1 = places.gather(1, partner[..., None].expand(-1, -1, 2))
    return Matches(features0.places(), points1, confidence)


def check_images(images: Tensor, multiple: int) -> None:
    """Refuse sides that a matcher cannot divide.

    Raises:
        ValueError: A side is no multiple.
    """
    height, width = images.shape[-2:]
    if height % multiple or width % multiple:
        raise ValueError(f"image size {height}x{width}: sides must be multiples of {multiple}")


def check_pairs(features0: Features, features1: Features) -> None:
    """Refuse batches that cannot be paired.

    Raises:
        ValueError: There are neither as many images 1 as images 0, nor one.
    """
    if len(features1) not in (1, len(features0)):
        raise ValueError(
            f"{len(features0)} images cannot be paired with {len(features1)}; pass as many, or one"
        )
