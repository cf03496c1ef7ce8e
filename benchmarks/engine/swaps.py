"""Swapping adapters: ours against diffusers' load_lora_adapter, on one U-Net in one run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.engine.adapters import random_adapter
from benchmarks.engine.timing import repeated
from realfill.base import PROMPT, Base
from realfill.capsule import Adapter
from service.engine import Swapper

PEER = "diffusers load_lora_adapter + set_adapters, state dict in memory, deletion not counted"


@dataclass(frozen=True)
class Swaps:
    """Seconds of every swap, ours and the peer's, and how far their predictions differ."""

    ours_s: list[float]
    peer_s: list[float]
    difference: float


def measure_swaps(base: Base, *, rank: int, repeats: int, peer_repeats: int) -> Swaps:
    """Alternate between two adapters that lie in memory, first our way, then diffusers'.

    Raises:
        RuntimeError: The two ways do not give the same model, so that timing them means nothing.
    """
    adapters = {f"{k}" * 64: random_adapter(base, rank=rank, seed=k) for k in range(2)}
    swapper = Swapper(base.unet, base.adapter_modules)
    turns = itertools.cycle(adapters.items())
    ours_s = repeated(lambda: swapper.apply(*next(turns)), repeats, base.device)
    first = next(iter(adapters))
    swapper.apply(first, adapters[first])
    ours = _prediction(base)
    swapper.apply(None, None)
    plain = _prediction(base)
    states = itertools.cycle([peft_state(adapter, base.unet) for adapter in adapters.values()])
    names = (f"adapter_{k}" for k in itertools.count())
    loaded: list[str] = []

    def load() -> None:
        loaded.append(next(names))
        base.unet.load_lora_adapter(next(states), prefix=None, adapter_name=loaded[-1])
        base.unet.set_adapters(loaded[-1])

    load()
    theirs = _prediction(base)
    base.unet.delete_adapters(loaded.pop())
    next(states)
    peer_s = repeated(
        load,
        peer_repeats,
        base.device,
        warm_up=1,
        after=lambda: base.unet.delete_adapters(loaded.pop()),
    )
    base.unet.unload_lora()
    change = float((ours - plain).abs().max())
    difference = float((ours - theirs).abs().max()) / max(change, 1e-12)
    allowed = 0.01 if base.dtype == torch.float32 else 0.2
    if change == 0 or difference > allowed:
        raise RuntimeError(
            f"the swapped U-Net and diffusers' differ by {difference:.3g} of what the adapter"
            f" changes, allowed is {allowed}: mend the swapper before it is timed"
        )
    return Swaps(ours_s, peer_s, difference)


def peft_state(adapter: Adapter, unet: nn.Module) -> dict[str, Tensor]:
    """An adapter under the names that PEFT and diffusers give it."""
    state = {}
    for path, (lora_a, lora_b) in adapter.factors.items():
        layer = unet.get_submodule(path)
        if isinstance(layer, nn.Conv2d):
            lora_a = lora_a.view(-1, *layer.weight.shape[1:])
            lora_b = lora_b[:, :, None, None]
        state[f"{path}.lora_A.weight"] = lora_a
        state[f"{path}.lora_B.weight"] = lora_b
    return state


@torch.no_grad()
def _prediction(base: Base) -> Tensor:
    """What the U-Net predicts of fixed noise. [1, C, h, w]"""
    side = base.size_px // base.cell_px
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, int(base.unet.config.in_channels), side, side, generator=generator)
    prompt = base.embed(PROMPT).detach()[None].to(base.device, base.dtype)
    timesteps = torch.full((1,), 500, device=base.device)
    noisy = latents.to(base.device, base.dtype)
    return base.unet(noisy, timesteps, encoder_hidden_states=prompt).sample.float().cpu()
