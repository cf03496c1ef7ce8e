"""Pictures that are few and small, to make pairs of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def little_pool(count: int = 8) -> tuple[Tensor, Tensor]:
    """Smooth pictures, as cells are 8 px apart. [count, 1, 160, 160] and [12, 1, 320, 320]"""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((count + 12, 1, 10, 10), generator=generator) * 255
    soft = F.interpolate(coarse[:count], size=(160, 160), mode="bicubic").clamp(0, 255)
    sharp = F.interpolate(coarse[count:], size=(320, 320), mode="bicubic").clamp(0, 255)
    return soft.to(torch.uint8), sharp.to(torch.uint8)
