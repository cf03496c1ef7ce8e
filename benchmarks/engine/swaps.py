"""Swapping adapters: ours against diffusers' load_lora_adapter, on one U-Net in one run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.engine.adapters import random_adapter
from benchmarks.engine.bench import running
from benchmarks.engine.timing import repeated, seconds_of
from realfill.adapter import Adapter
from realfill.base import PROMPT, Base
from service.engine import Swapper
from service.engine.weights import Part

# Of what an adapter changes, two ways may differ so much by rounding. In bfloat16 a fifth was seen
# on sd2-random, whose random layers pass little of an adapter on; another adapter gives 1 and more.
ALLOWED = {torch.float32: 0.01, torch.bfloat16: 0.5, torch.float16: 0.2}

PEER = "diffusers load_lora_adapter + set_adapters, state dict in memory, deletion not counted"


@dataclass(frozen=True)
class Swaps:
    """Seconds of every swap, ours and the peer's, and how far their predictions differ.

    Attributes:
        ours_s: From one scene to another that lies ready, as before every batch of the engine.
        bring_s: An adapter in host memory made ready.
        merge_s: Factors in host memory merged into the weights in place, validation included.
        peer_s: The peer's, from a state dict in memory.
    """

    ours_s: list[float]
    bring_s: list[float]
    merge_s: list[float]
    peer_s: list[float]
    difference: float


def measure_swaps(base: Base, *, rank: int, repeats: int, peer_repeats: int) -> Swaps:
    """Alternate between two adapters, first our ways, then diffusers'.

    Raises:
        RuntimeError: The ways do not give the same model, so that timing them means nothing.
    """
    adapters = {f"{k}" * 64: random_adapter(base, rank=rank, seed=k) for k in range(2)}
    first = next(iter(adapters))
    plain = _prediction(base)
    ours_s, bring_s, ours = _resident(base, adapters, repeats)
    merge_s = _merged(base, adapters, repeats)
    peer_s, theirs = _diffusers(base, list(adapters.values()), peer_repeats)
    change = float((ours - plain).abs().max())
    difference = float((ours - theirs).abs().max()) / max(change, 1e-12)
    allowed = ALLOWED[base.multiplies_in]
    if change == 0 or difference > allowed:
        raise RuntimeError(
            f"the U-Net with adapter {first[:4]} and diffusers' differ by {difference:.3g} of what "
            f"the adapter changes, allowed is {allowed}: mend the swap before it is timed"
        )
    return Swaps(ours_s, bring_s, merge_s, peer_s, difference)


def _resident(
    base: Base, adapters: dict[str, Adapter], repeats: int
) -> tuple[list[float], list[float], Tensor]:
    """Seconds of swaps and of making ready, and what the first adapter predicts."""
    bring_s = []
    with running(base) as runner:
        weights = runner.weights
        for digest, adapter in itertools.islice(itertools.cycle(adapters.items()), 12):
            weights.forget(digest)
            bring_s.append(seconds_of(partial(weights.bring, digest, adapter), base.device))
        for digest, adapter in adapters.items():
            weights.take(digest, adapter)
        turns = itertools.cycle([[Part(digest, 1)] for digest in adapters])
        ours_s = repeated(lambda: weights.apply(next(turns)), repeats, base.device)
        weights.apply([Part(next(iter(adapters)), 1)])
        ours = _prediction(base)
    return ours_s, bring_s[2:], ours


def _merged(base: Base, adapters: dict[str, Adapter], repeats: int) -> list[float]:
    swapper = Swapper(base.unet, base.adapter_modules)
    turns = itertools.cycle(adapters.items())
    try:
        return repeated(lambda: swapper.apply(*next(turns)), repeats, base.device)
    finally:
        swapper.apply(None, None)


def _diffusers(base: Base, adapters: list[Adapter], repeats: int) -> tuple[list[float], Tensor]:
    """Seconds of the peer's swaps, and what the first adapter predicts."""
    states = itertools.cycle([peft_state(adapter, base.unet) for adapter in adapters])
    names = (f"adapter_{k}" for k in itertools.count())
    loaded: list[str] = []

    def load() -> None:
        loaded.append(next(names))
        base.unet.load_lora_adapter(next(states), prefix=None, adapter_name=loaded[-1])
        base.unet.set_adapters(loaded[-1])

    try:
        load()
        theirs = _prediction(base)
        base.unet.delete_adapters(loaded.pop())
        next(states)
        seconds = repeated(
            load,
            repeats,
            base.device,
            warm_up=1,
            after=lambda: base.unet.delete_adapters(loaded.pop()),
        )
    finally:
        base.unet.unload_lora()
    return seconds, theirs


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
