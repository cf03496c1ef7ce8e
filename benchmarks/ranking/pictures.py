"""What the ranking is measured on: photographs of the scikit-image wheel, sixteen candidates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor

REFERENCES = ("motorcycle_left.png", "coffee.png", "chelsea.png")
TARGET = "motorcycle_right.png"


@dataclass(frozen=True)
class Pictures:
    """Grey images at working size.

    Attributes:
        candidates: In [0, 1], from true to shapeless. [N, 1, H, W]
        references: In [0, 1]. [1, H, W] each
        mask: 1 where the candidates differ. [H, W]
    """

    candidates: Tensor
    references: tuple[Tensor, ...]
    mask: Tensor


def pictures(side_px: int, count: int) -> Pictures:
    """Candidates that differ in the middle: the truth, blended more and more into other photos."""
    truth = _photo(TARGET, side_px)
    references = tuple(_photo(name, side_px) for name in REFERENCES)
    mask = torch.zeros(side_px, side_px)
    mask[side_px // 4 : -(side_px // 4), side_px // 4 : -(side_px // 4)] = 1
    candidates = []
    for k in range(count):
        other = references[k % len(references)].roll(side_px * k // count, 2)
        filling = truth.lerp(other, k / max(1, count - 1))
        candidates.append(torch.where(mask > 0, filling, truth))
    return Pictures(torch.stack(candidates), references, mask)


def _photo(name: str, side_px: int) -> Tensor:
    with Image.open(Path(skimage.data.__file__).parent / name) as photo:
        small = photo.convert("L").resize((side_px, side_px), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small, np.float32) / 255)[None]
