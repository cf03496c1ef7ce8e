"""Peers of the engine: hotswapped adapters, PEFT's mixed batches, and the public infer.py."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from benchmarks.engine.adapters import random_adapter
from benchmarks.engine.rates import fits_pipeline, job_of, loop, pipeline
from benchmarks.engine.swaps import ALLOWED, peft_state
from benchmarks.engine.timing import repeated, seconds_of
from realfill.adapter import Adapter
from realfill.base import Base
from service.engine import Swapper

HOTSWAP = "diffusers enable_lora_hotswap + load_lora_adapter(hotswap=True), state dict in memory"
MIXED = "PEFT mixed batch: adapter_names for each sample, on the injected layers"
INFER_STEPS = 200


@dataclass(frozen=True)
class Hotswaps:
    """Seconds of each hotswap, and how far its prediction lies from ours, of what it changes."""

    peer_s: list[float]
    difference: float


@dataclass(frozen=True)
class MixedSteps:
    """Seconds of one U-Net evaluation of a batch by PEFT.

    Attributes:
        mixed_s: A scene of its own for every sample.
        single_s: All samples of one scene, by the same layers, in turns with the former.
        fused_s: The same one scene, fused into the weights, before those: no LoRA layer runs.
        difference: Largest distance of a mixed sample from the same sample drawn alone with its
            adapter fused our way, as a share of what adapters change.
    """

    mixed_s: list[float]
    single_s: list[float]
    fused_s: list[float]
    difference: float


@dataclass(frozen=True)
class Extrapolation:
    """Seconds of a whole job, one image after the other, found from fewer steps.

    Attributes:
        peer: The settings, and from which steps the figure was found.
        seconds: Of the whole job, once for each repeat.
    """

    peer: str
    seconds: list[float]


def measure_hotswap(base: Base, *, rank: int, repeats: int) -> Hotswaps:
    """Alternate between two adapters in one slot, by diffusers' hotswap.

    Raises:
        RuntimeError: The hotswapped U-Net does not predict what ours does.
    """
    # On a copy: a U-Net that hotswapped once prepares every later load for it, and fails.
    base = dataclasses.replace(base, unet=copy.deepcopy(base.unet))
    adapters = [random_adapter(base, rank=rank, seed=seed) for seed in range(2)]
    plain, ours = _ours(base, adapters[:1], _inputs(base, 1))
    states = [peft_state(adapter, base.unet) for adapter in adapters]
    # The target rank has to be known before the first load.
    base.unet.enable_lora_hotswap(target_rank=rank)
    base.unet.load_lora_adapter(dict(states[1]), prefix=None, adapter_name="slot")
    turns = itertools.cycle(states)

    def swap() -> None:
        base.unet.load_lora_adapter(
            dict(next(turns)), prefix=None, adapter_name="slot", hotswap=True
        )

    try:
        swap()
        theirs = _predict(base, _inputs(base, 1))
        peer_s = repeated(swap, repeats, base.device)
    finally:
        base.unet.unload_lora()
    return Hotswaps(peer_s, checked_difference(base, plain, ours, theirs, HOTSWAP))


def measure_mixed(base: Base, *, batch: int, rank: int, repeats: int) -> MixedSteps:
    """One step of a batch of as many scenes, against a batch of one scene, by PEFT.

    Raises:
        RuntimeError: The mixed batch does not predict what ours does.
    """
    adapters = [random_adapter(base, rank=rank, seed=seed) for seed in range(batch)]
    inputs = _inputs(base, batch)
    plain, ours = _ours(base, adapters, inputs)
    # Of equal length, so that none contains another: hotswap and PEFT match parts of names.
    names = [f"scene_{k:04}" for k in range(batch)]
    swapper = Swapper(base.unet, base.adapter_modules)
    try:
        swapper.apply("0" * 64, adapters[0])
        fused_s = repeated(lambda: _predict(base, inputs), repeats, base.device)
    finally:
        swapper.apply(None, None)
    mixed_s: list[float] = []
    single_s: list[float] = []
    # Before the first is loaded, while the layers still are what their shapes are read from.
    states = [peft_state(adapter, base.unet) for adapter in adapters]
    try:
        for name, state in zip(names, states, strict=True):
            base.unet.load_lora_adapter(state, prefix=None, adapter_name=name)
        with _adapter_names(base, names):
            theirs = _predict(base, inputs)
        for turn in range(-1, repeats):
            with _adapter_names(base, names):
                mixed = seconds_of(lambda: _predict(base, inputs), base.device)
            base.unet.set_adapters(names[0])
            single = seconds_of(lambda: _predict(base, inputs), base.device)
            if turn >= 0:
                mixed_s.append(mixed)
                single_s.append(single)
    finally:
        base.unet.unload_lora()
    difference = checked_difference(base, plain, ours, theirs, MIXED)
    return MixedSteps(mixed_s, single_s, fused_s, difference)


def measure_infer(
    base: Base, *, images: int, repeats: int, measured: tuple[int, int] = (2, 8)
) -> Extrapolation:
    """The public infer.py's settings: float32, DDPM, 200 steps, one image after the other.

    Ranking, and the hours that a full fine-tune is loaded, are not part of it.

    Args:
        base: In any precision; a float32 copy is measured.
        images: Of the job.
        repeats: Extrapolations.
        measured: Two numbers of steps of one image that are really run: encoding and decoding are
            what both share, and the difference is that of the steps.

    Raises:
        RuntimeError: The copy does not predict what the base does.
    """
    few, more = measured
    if not 1 <= few < more:
        raise ValueError(f"measured is {measured}; give two rising numbers of steps")
    exact = _in_float32(base)
    inputs = _inputs(base, 1)
    # Against the prediction itself: there is no adapter that could be told from the base.
    zero = torch.zeros_like(_predict(base, inputs))
    checked_difference(base, zero, _predict(base, inputs), _predict(exact, inputs), "float32 copy")
    runs = {steps: _one_image(exact, steps) for steps in measured}
    taken: dict[int, list[float]] = {few: [], more: []}
    for turn in range(repeats):
        for steps, run in runs.items():
            taken[steps] += repeated(run, 1, base.device, warm_up=int(turn == 0))
    seconds = [
        images * extrapolated(INFER_STEPS, (few, short), (more, long))
        for short, long in zip(taken[few], taken[more], strict=True)
    ]
    by = "StableDiffusionInpaintPipeline" if fits_pipeline(base) else "a loop over its models"
    peer = (
        f"the public infer.py's settings with diffusers' {by}: float32, DDPM, {INFER_STEPS} steps,"
        f" {images} images one after the other; extrapolated from {few} and {more} steps of one"
    )
    return Extrapolation(peer, seconds)


def extrapolated(steps: int, short: tuple[int, float], long: tuple[int, float]) -> float:
    """Seconds of one image in many steps, from two runs in (steps, seconds), by a straight line.

    Noise alone may make the longer run the quicker one; a step then counts as nothing.
    """
    step = max(0.0, (long[1] - short[1]) / (long[0] - short[0]))
    return short[1] + (steps - short[0]) * step


def _one_image(base: Base, steps: int) -> Callable[[], Tensor]:
    job = job_of(base, samples=1, steps=steps)
    scheduler = DDPMScheduler.from_config(base.scheduler.config)
    if fits_pipeline(base):
        return pipeline(base, job, scheduler=scheduler)
    return lambda: loop(base, job, batch=1, scheduler=scheduler)


def _in_float32(base: Base) -> Base:
    return dataclasses.replace(
        base,
        unet=copy.deepcopy(base.unet).float(),
        autoencoder=copy.deepcopy(base.autoencoder).float(),
    )


@contextmanager
def _adapter_names(base: Base, names: Sequence[str]) -> Iterator[None]:
    """Let every LoRA layer know which adapter each sample of the batch has.

    As PEFT's own models do it, which diffusers' injection leaves out.
    """

    def with_names(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "adapter_names": list(names)}

    handles = [
        module.register_forward_pre_hook(with_names, with_kwargs=True)
        for module in base.unet.modules()
        if isinstance(module, BaseTunerLayer)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _ours(base: Base, adapters: Sequence[Adapter], inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions of the base alone, and of each sample alone with its adapter fused our way."""
    swapper = Swapper(base.unet, base.adapter_modules)
    plain = torch.cat([_predict(base, sample) for sample in inputs.split(1)])
    fused = []
    try:
        for k, (adapter, sample) in enumerate(zip(adapters, inputs.split(1), strict=True)):
            swapper.apply(f"{k:064x}", adapter)
            fused.append(_predict(base, sample))
    finally:
        swapper.apply(None, None)
    return plain, torch.cat(fused)


def _inputs(base: Base, batch: int) -> Tensor:
    """Fixed noise in the shape of the U-Net's input. [N, C, h, w]"""
    side = base.size_px // base.cell_px
    generator = torch.Generator().manual_seed(0)
    shape = (batch, int(base.unet.config.in_channels), side, side)
    return torch.randn(shape, generator=generator).to(base.device)


@torch.no_grad()
def _predict(base: Base, inputs: Tensor) -> Tensor:
    """What the U-Net predicts of a batch at timestep 500. [N, C, h, w]

    The prompt's embedding is random too: the text encoder is no part of a step.
    """
    width = int(base.unet.config.cross_attention_dim)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randn(1, 77, width, generator=generator).to(base.device, base.dtype)
    prompts = prompt.expand(len(inputs), -1, -1)
    timesteps = torch.full((len(inputs),), 500, device=base.device)
    noisy = inputs.to(base.dtype)
    return base.unet(noisy, timesteps, encoder_hidden_states=prompts).sample.float()


def checked_difference(base: Base, plain: Tensor, ours: Tensor, theirs: Tensor, peer: str) -> float:
    """Largest distance between both ways, as a share of how far they are from the base.

    Raises:
        RuntimeError: It is too large, so that timing them means nothing.
    """
    change = float((ours - plain).abs().max())
    difference = float((ours - theirs).abs().max()) / max(change, 1e-12)
    allowed = ALLOWED[base.dtype]
    if change == 0 or difference > allowed:
        raise RuntimeError(
            f"{peer}: its prediction and ours differ by {difference:.3g} of what the adapter"
            f" changes, allowed is {allowed}: mend one of them before they are timed"
        )
    return difference
