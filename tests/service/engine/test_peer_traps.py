"""The traps of swapping adapters, each sprung on the peer's way and survived by ours.

Where a library mends its trap, the test says so: then the naive way needs no proof any more, and
what is written about it in the docs has to go.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from benchmarks.engine.swaps import peft_state
from realfill.adapter import Adapter
from realfill.base import Base
from realfill.errors import AdapterMismatch, InvalidCapsule
from service.engine import Swapper
from tests.tiny import tiny_adapter, tiny_base

# PEFT warns of what is meant here: several adapters in one model.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
ONE, TEN = "1" * 64, "10" * 32


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """diffusers logs the failures that are provoked here as errors."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    yield
    diffusers_logging.set_verbosity(before)


@torch.no_grad()
def predict(base: Base) -> Tensor:
    """What the U-Net predicts of fixed noise. [1, 4, 4, 4]"""
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 9, 4, 4, generator=generator).to(base.dtype)
    prompt = torch.randn(1, 77, 16, generator=generator).to(base.dtype)
    return base.unet(noisy, torch.tensor([500]), encoder_hidden_states=prompt).sample.float()


def attention_only(base: Base, seed: int) -> Adapter:
    """An adapter of the attention layers, where `tiny_adapter` also changes convolutions."""
    adapter = tiny_adapter(base, seed=seed, scale=1.0)
    factors = {k: v for k, v in adapter.factors.items() if "attn" in k}
    return Adapter(factors, scale=1.0)


def states_of(base: Base, *adapters: Adapter) -> list[dict[str, Tensor]]:
    """Adapters under PEFT's names, read before PEFT changes the layers."""
    return [peft_state(adapter, base.unet) for adapter in adapters]


def mended(trap: str) -> str:
    """What to say where the naive way does not fail any more."""
    return f"the library mended this trap ({trap}): delete this test's naive part and its docs"


def test_hotswap_wipes_the_scene_whose_name_contains_the_other() -> None:
    """Trap 1. Hotswapping scene1 leaves scene10 without weights; ours keeps them apart."""
    base = tiny_base()
    one, ten, next_one = (attention_only(base, seed) for seed in range(3))
    plain = predict(base)
    states = states_of(base, one, ten, next_one)
    base.unet.load_lora_adapter(states[1], prefix=None, adapter_name="scene10")
    base.unet.load_lora_adapter(states[0], prefix=None, adapter_name="scene1")
    base.unet.set_adapters("scene10")
    before = predict(base)
    assert not torch.equal(before, plain)
    base.unet.load_lora_adapter(states[2], prefix=None, adapter_name="scene1", hotswap=True)
    base.unet.set_adapters("scene10")
    assert torch.equal(predict(base), plain), mended("names that contain each other")
    base.unet.unload_lora()

    swapper = Swapper(base.unet, base.adapter_modules)
    swapper.apply(TEN, ten)
    expected = predict(base)
    for digest, adapter in ((ONE, one), (ONE[:-1] + "0", next_one), (TEN, ten)):
        swapper.apply(digest, adapter)
    assert torch.equal(predict(base), expected)
    assert not torch.equal(expected, plain)


def test_a_failed_hotswap_leaves_the_base_in_the_scenes_place() -> None:
    """Trap 2. The exception leaves the base, which would be served as the scene; ours leaves it."""
    base = tiny_base()
    scene, wider = attention_only(base, 0), tiny_adapter(base, seed=1, scale=1.0)
    plain = predict(base)
    states = states_of(base, scene, wider)
    base.unet.load_lora_adapter(states[0], prefix=None, adapter_name="scene")
    assert not torch.equal(predict(base), plain)
    with pytest.raises(RuntimeError, match="unexpected keys found"):
        base.unet.load_lora_adapter(states[1], prefix=None, adapter_name="scene", hotswap=True)
    assert torch.equal(predict(base), plain), mended("a failed hotswap")
    assert "scene" not in base.unet.peft_config, mended("a failed hotswap")
    base.unet.unload_lora()

    swapper = Swapper(base.unet, base.adapter_modules)
    swapper.apply(ONE, scene)
    expected = predict(base)
    foreign = Adapter({**wider.factors, "conv_in": next(iter(wider.factors.values()))}, scale=1.0)
    with pytest.raises(AdapterMismatch):
        swapper.apply(TEN, foreign)
    assert swapper.digest == ONE
    assert torch.equal(predict(base), expected)


def test_fusing_and_unfusing_drifts_in_bfloat16() -> None:
    """Trap 4. Each of 100 cycles over four scenes moves the base further; ours not by a bit."""
    base = tiny_base()
    base.unet.to(torch.bfloat16)
    scenes = {f"scene_{k}": attention_only(base, k) for k in range(4)}
    paths = list(scenes["scene_0"].factors)
    pristine = weights(base.unet, paths)
    naive = copy.deepcopy(base.unet)
    states = states_of(base, *scenes.values())
    for name, state in zip(scenes, states, strict=True):
        naive.load_lora_adapter(state, prefix=None, adapter_name=name)
    drift = []
    for name, _ in zip(itertools.cycle(scenes), range(100), strict=False):
        naive.fuse_lora(adapter_names=[name])
        naive.unfuse_lora()
        drift.append(distance(naive, paths, pristine))
    assert drift[0] > 0, mended("drift of fuse and unfuse")
    assert drift[-1] > 2 * drift[0], mended("drift of fuse and unfuse")

    swapper = Swapper(base.unet, base.adapter_modules)
    for adapter, k in zip(itertools.cycle(scenes.values()), range(100), strict=False):
        swapper.apply(f"{k:064x}", adapter)
        swapper.apply(None, None)
    assert distance(base.unet, paths, pristine) == 0


def test_one_infinity_poisons_the_base_for_every_later_scene() -> None:
    """Trap 5. It stays after unfusing and deleting; ours refuses it, and the base is as it was."""
    base = tiny_base()
    sound, poisoned = attention_only(base, 0), attention_only(base, 1)
    lora_a, _ = poisoned.factors[next(iter(poisoned.factors))]
    lora_a[0, 0] = float("inf")
    paths = list(sound.factors)
    pristine = weights(base.unet, paths)
    naive = copy.deepcopy(base.unet)
    naive.load_lora_adapter(peft_state(poisoned, naive), prefix=None, adapter_name="poisoned")
    naive.fuse_lora(adapter_names=["poisoned"])
    naive.unfuse_lora()
    naive.delete_adapters("poisoned")
    left = sum(int((~w.isfinite()).sum()) for w in weights(naive, paths))
    assert left > 0, mended("an infinity in the base")

    swapper = Swapper(base.unet, base.adapter_modules)
    swapper.apply(ONE, sound)
    expected = predict(base)
    with pytest.raises(InvalidCapsule, match="NaN or infinity"):
        swapper.apply(TEN, poisoned)
    assert torch.equal(predict(base), expected)
    swapper.apply(None, None)
    assert distance(base.unet, paths, pristine) == 0


def weights(unet: nn.Module, paths: list[str]) -> list[Tensor]:
    """Copies of the layers' own weights, through PEFT's wrapping where there is any."""
    found = []
    for path in paths:
        layer = unet.get_submodule(path)
        found.append(getattr(layer, "base_layer", layer).weight.detach().clone())
    return found


def distance(unet: nn.Module, paths: list[str], pristine: list[Tensor]) -> float:
    """Largest difference of any weight from what it was."""
    now = weights(unet, paths)
    return max(float((a - b).abs().max()) for a, b in zip(now, pristine, strict=True))
