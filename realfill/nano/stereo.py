"""The held-out motorcycle, a stereo pair with known disparity, as the test of a matcher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image

from realfill.rank.matching import CELL_PX, Matcher


@dataclass(frozen=True)
class StereoCheck:
    """Matches on the held-out motorcycle, and the share of them within one cell of the truth."""

    matches: int
    precision: float


def check_stereo(matcher: Matcher, *, through_px: int | None = None) -> StereoCheck:
    """Match the motorcycle's two views, of which the disparity is known.

    Args:
        matcher: To be tried at its working size.
        through_px: Reduce the photos to this height first, as candidates of nano are.
    """
    folder = Path(skimage.data.__file__).parent
    disparity = torch.from_numpy(np.load(folder / "motorcycle_disp.npz")["arr_0"]).float()
    views = [
        Image.open(folder / f"motorcycle_{side}.png").convert("L") for side in ("left", "right")
    ]
    scale = matcher.working_px / views[0].width
    height = round(views[0].height * scale / CELL_PX) * CELL_PX
    if through_px:
        small = (round(views[0].width * through_px / views[0].height), through_px)
        views = [view.resize(small, Image.Resampling.LANCZOS) for view in views]
    pixels = [
        np.asarray(view.resize((matcher.working_px, height), Image.Resampling.BICUBIC), np.float32)
        for view in views
    ]
    left, right = (matcher.features(torch.from_numpy(p)[None, None] / 255) for p in pixels)
    found = matcher.match(left, right)
    begins, ends = found.points0.cpu(), found.points1.cpu()
    column = (begins[:, 0] / scale).round().long().clamp(max=disparity.shape[1] - 1)
    row = (begins[:, 1] * disparity.shape[0] / height).round().long()
    true = disparity[row.clamp(max=disparity.shape[0] - 1), column] * scale
    across = begins[:, 0] - true - ends[:, 0]
    error = torch.hypot(across, begins[:, 1] - ends[:, 1])
    known = true.isfinite()
    share = (error[known] <= CELL_PX).float().mean() if known.any() else torch.zeros(())
    return StereoCheck(len(found), float(share))
