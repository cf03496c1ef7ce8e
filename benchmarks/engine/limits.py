"""How near the engine comes to what the machine can do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engine.timing import quantile, repeated
from realfill.base import Base
from service.engine.layers import Exact, is_exact

# Large enough that a product is bound by arithmetic alone.
SIDE = {"cpu": 1536, "cuda": 8192}


@torch.no_grad()
def flops_per_sample_step(base: Base) -> int:
    """Floating-point operations of the U-Net for one sample, a multiply-add counted as two."""
    side, config = base.size_px // base.cell_px, base.unet.config
    latents = torch.zeros(1, int(config.in_channels), side, side).to(base.device, base.dtype)
    prompt = torch.zeros(1, 77, int(config.cross_attention_dim)).to(base.device, base.dtype)
    counter = FlopCounterMode(display=False)
    with counter:
        base.unet(latents, torch.zeros(1, device=base.device), encoder_hidden_states=prompt)
    return int(counter.get_total_flops())


@torch.no_grad()
def peak_flops_per_s(base: Base, *, repeats: int = 9) -> float:
    """What a large matrix product of what the base multiplies in reaches on its device.

    On a CPU that of oneDNN or of what PyTorch takes by itself, whichever is faster.
    """
    side = SIDE.get(base.device.type, SIDE["cpu"])
    dtype = base.multiplies_in
    one, other = (torch.randn(side, side, device=base.device, dtype=dtype) for _ in "ab")
    ways: list[Callable[[], object]] = [lambda: one @ other]
    if is_exact(base.device, base.dtype):
        layer = Exact(nn.Linear(side, side, bias=False), products=dtype)
        ways.append(lambda: layer(one))
    fastest = min(quantile(repeated(way, repeats, base.device), 20) for way in ways)
    return float(2 * side**3 / fastest)
