"""Photographs of the scikit-image wheel, as matchers see them, and LoFTR as kornia runs it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from kornia.feature import LoFTR
from PIL import Image
from torch import Tensor

from realfill.rank.matching import CoarseLoFTR, LoFTRMatcher, loftr

PHOTOS = ("motorcycle_left.png", "motorcycle_right.png", "coffee.png", "chelsea.png")


def grey_photo(name: str, height: int = 192, width: int = 256) -> Tensor:
    """One photograph, grey, in [0, 1]. [1, 1, height, width]"""
    with Image.open(Path(skimage.data.__file__).parent / name) as photo:
        small = photo.convert("L").resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small, np.float32) / 255)[None, None]


def with_threshold(base: dict[str, Any], threshold: float) -> dict[str, Any]:
    """A configuration with another threshold, and matches at the border."""
    config = copy.deepcopy(base)
    config["resolution"] = tuple(config["resolution"])
    config["match_coarse"] |= {"thr": threshold, "border_rm": 0}
    return config


def plain_loftr(config: dict[str, Any]) -> LoFTR:
    """Kornia's whole LoFTR with random weights."""
    torch.manual_seed(0)
    return LoFTR(None, config).eval()


def plain_nano() -> LoFTR:
    """Kornia's whole LoFTR with nano's weights; its fine stage, which decides nothing, random."""
    net = loftr("nano").net
    plain = plain_loftr(net.config)
    plain.load_state_dict(net.state_dict(), strict=False)
    return plain


def coarse(plain: LoFTR, dtype: torch.dtype = torch.float32) -> LoFTRMatcher:
    """The matcher of the same weights."""
    net = CoarseLoFTR(plain.config)
    weights = plain.state_dict()
    net.load_state_dict({name: weights[name] for name in net.state_dict()})
    cpu = torch.device("cpu")
    return LoFTRMatcher(net, name="test", working_px=64, device=cpu, dtype=dtype)


def shifted_pairs(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Three pairs: shifted by a cell, shifted and dimmed, and unrelated."""
    generator = torch.Generator().manual_seed(1)
    images0 = torch.rand((3, 1, height, width), generator=generator)
    images1 = images0.roll(8, -1)
    images1[1] *= 0.7
    images1[2] = torch.rand((1, height, width), generator=generator)
    return images0, images1
