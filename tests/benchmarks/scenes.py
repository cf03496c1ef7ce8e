"""A scene of noise, for benchmarks that need some scene."""

from __future__ import annotations

import torch

from realfill.scene import Scene


def noise(name: str = "noise", seed: int = 0) -> Scene:
    """Random pixels as 8-bit files hold them, with a hole in the middle."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(40, 60)
    mask[10:30, 20:40] = 1
    truth = (torch.rand(3, 40, 60, generator=generator) * 255).round() / 255
    references = ((torch.rand(3, 40, 40, generator=generator) * 255).round() / 255,)
    return Scene(name, references, truth * (1 - mask) + mask, mask, truth, {})
