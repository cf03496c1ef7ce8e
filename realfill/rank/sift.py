"""SIFT as a ``Matcher``: needs no weights, and finds less than LoFTR.

Confidence is one minus the larger of the two distance ratios, so that 0.15 is Lowe's ratio of 0.85.

Source: Lowe, Distinctive Image Features from Scale-Invariant Keypoints, 2004; kornia's SIFTFeature.
"""

from __future__ import annotations

import hashlib

import kornia
import torch
from kornia.feature import SIFTFeature
from torch import Tensor

from realfill.rank.correspondences import (
    CELL_PX,
    Features,
    Matcher,
    Matches,
    check_images,
    check_pairs,
)

ABSENT = -1.0


class SiftMatcher(Matcher):
    """SIFT points, matched as mutual nearest descriptors that pass the ratio test both ways."""

    name = "sift"
    size_multiple = CELL_PX
    working_px = 512

    def __init__(
        self, device: str | torch.device = "cpu", *, most: int = 1024, ratio: float = 0.85
    ) -> None:
        """Look for at most that many points in each image."""
        self.device = torch.device(device)
        self.threshold = 1 - ratio
        self._most = most
        self._sift = SIFTFeature(most, device=self.device).eval()

    @property
    def digest(self) -> str:
        """SHA-256 over kornia's version and what points depend on."""
        text = f"sift {kornia.__version__} {self._most} {self.working_px}"
        return hashlib.sha256(text.encode()).hexdigest()

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """Points and their descriptors, the strongest first. [N, 1, H, W]"""
        check_images(images, CELL_PX)
        height, width = images.shape[-2:]
        points, tokens = [], []
        for image in images.to(self.device, torch.float32).split(1):
            frames, strength, descriptors = self._sift(image)
            centres = frames[..., 2]
            inside = (centres >= 0).all(-1) & (centres[..., 0] < width)
            there = (strength > 0) & inside & (centres[..., 1] < height)
            points.append(torch.where(there[..., None], centres, ABSENT))
            tokens.append(descriptors * there[..., None])
        return Features(torch.cat(tokens), (height // CELL_PX, width // CELL_PX), torch.cat(points))

    @torch.no_grad()
    def compare(
        self, features0: Features, features1: Features, *, threshold: float | None = None
    ) -> Matches:
        """Mutual nearest descriptors, the distance to the second nearest being larger by far."""
        threshold = self.threshold if threshold is None else threshold
        check_pairs(features0, features1)
        count = len(features0)
        places0 = features0.places().to(self.device)
        places1 = features1.places().to(self.device).expand(count, -1, -1)
        tokens1 = features1.tokens.to(self.device).expand(count, -1, -1)
        confidence, points1 = [], []
        for k, tokens0 in enumerate(features0.tokens.to(self.device)):
            distance = (2 - 2 * tokens0 @ tokens1[k].T).clamp(min=0).sqrt()
            there0, there1 = places0[k, :, 0] >= 0, places1[k, :, 0] >= 0
            distance = torch.where(there0[:, None] & there1, distance, torch.inf)
            ratio0, nearest0 = _nearest(distance)
            ratio1, nearest1 = _nearest(distance.T)
            mutual = nearest1[nearest0] == torch.arange(len(nearest0), device=self.device)
            ratio = torch.maximum(ratio0, ratio1[nearest0])
            sure = 1 - ratio
            confidence.append(torch.where(mutual & (sure > threshold), sure, 0.0))
            points1.append(places1[k, nearest0])
        return Matches(places0, torch.stack(points1), torch.stack(confidence))


def _nearest(distance: Tensor) -> tuple[Tensor, Tensor]:
    """For each row its nearest column, and how its distance compares with the second's. [K]

    Without a second the ratio says nothing, and counts as 1.
    """
    least, place = distance.topk(min(2, distance.shape[1]), dim=1, largest=False)
    first, second = least[:, 0], least[:, -1]
    told = second.isfinite() & (second > 0) & (len(distance.T) > 1)
    return torch.where(told, first / second, 1.0), place[:, 0]
