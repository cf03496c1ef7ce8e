"""How near the engine comes to what the machine can do."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engine.timing import quantile, repeated
from realfill.base import Base

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


def peak_flops_per_s(base: Base, *, repeats: int = 9) -> float:
    """What a large matrix product of the base's precision reaches on its device."""
    side = SIDE.get(base.device.type, SIDE["cpu"])
    one, other = (torch.randn(side, side, device=base.device, dtype=base.dtype) for _ in "ab")
    seconds = repeated(lambda: one @ other, repeats, base.device)
    return float(2 * side**3 / quantile(seconds, 20))
