"""Where a window of the target lies in a reference, found by SIFT where the two have enough alike.

A small model has few steps to learn a scene in: they are best spent on the part of the references
that belongs into the hole, at the size that it has in the target. The paper's long training of a
large base does without.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.color import rgb2gray
from skimage.feature import SIFT, match_descriptors
from skimage.measure import ransac
from skimage.transform import SimilarityTransform, resize
from torch import Tensor

from realfill.complete.windows import Window, crop_mask
from realfill.scene import Scene

LONG_SIDE_PX = 480
MAX_RATIO = 0.8
# Of the reference's long side: photographs of a place are no flat pictures of each other.
TOLERANCE = 0.03
TRIALS = 2000
MIN_INLIERS = 10
MIN_INLIER_SHARE = 0.2
MAX_TURN = 0.35
MIN_INSIDE = 0.5
MIN_SCALE, MAX_SCALE = 0.2, 5.0

Features = tuple[NDArray[np.float64], NDArray[np.float64]]


def windows_in_references(scene: Scene, window: Window) -> list[Window | None]:
    """The window's place in each reference, or None where that cannot be told.

    Only what is known of the target is compared. A reference that is turned by more than 20
    degrees, or that shares fewer than ten points with the target, counts as not told.

    Args:
        scene: The photographs.
        window: A square of the target.
    """
    target = _features(scene.target, scene.mask)
    return [_placed(window, target, reference) for reference in scene.references]


def _placed(window: Window, target: Features, reference: Tensor) -> Window | None:
    found = _similarity(target, _features(reference), TOLERANCE * max(reference.shape[-2:]))
    if found is None:
        return None
    half = window.side / 2
    column, row = found((window.left + half, window.top + half))[0]
    side = round(window.side * found.scale)
    height, width = reference.shape[-2:]
    window = Window(round(row - side / 2), round(column - side / 2), side)
    inside = 1 - crop_mask(torch.zeros(height, width), window, 64).mean()
    # A place that lies largely beyond the photograph has little to teach, and is likely wrong.
    return window if inside >= MIN_INSIDE else None


def _similarity(
    target: Features, reference: Features, tolerance_px: float
) -> SimilarityTransform | None:
    """Maps columns and rows of the target to those of the reference."""
    if min(len(target[0]), len(reference[0])) < MIN_INLIERS:
        return None
    pairs = match_descriptors(target[1], reference[1], max_ratio=MAX_RATIO, cross_check=True)
    if len(pairs) < MIN_INLIERS:
        return None
    found, inliers = ransac(
        (target[0][pairs[:, 0]], reference[0][pairs[:, 1]]),
        SimilarityTransform,
        min_samples=2,
        residual_threshold=tolerance_px,
        max_trials=TRIALS,
        rng=0,
    )
    if inliers is None or inliers.sum() < max(MIN_INLIERS, MIN_INLIER_SHARE * len(pairs)):
        return None
    turned = abs(math.remainder(found.rotation, 2 * math.pi)) > MAX_TURN
    return None if turned or not MIN_SCALE <= found.scale <= MAX_SCALE else found


def _features(image: Tensor, mask: Tensor | None = None) -> Features:
    """Columns and rows of points outside the mask, in pixels of the image, and descriptors."""
    height, width = image.shape[-2:]
    shrink = min(1.0, LONG_SIDE_PX / max(height, width))
    grey = rgb2gray(image.permute(1, 2, 0).cpu().numpy())
    small = resize(grey, (round(height * shrink), round(width * shrink)), anti_aliasing=True)
    sift = SIFT()
    try:
        sift.detect_and_extract(small)
    except RuntimeError:
        # What scikit-image says of a picture without a single point.
        return np.empty((0, 2)), np.empty((0, 128))
    points, descriptors = sift.keypoints / shrink, sift.descriptors
    if mask is not None:
        rows = points[:, 0].astype(int).clip(0, height - 1)
        columns = points[:, 1].astype(int).clip(0, width - 1)
        known = mask.cpu().numpy()[rows, columns] == 0
        points, descriptors = points[known], descriptors[known]
    return points[:, ::-1], descriptors
