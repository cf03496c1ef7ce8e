"""One adapter at a time is in the weights: all of it, nothing of another, and never drifting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from kernels.merge_lora import prepared_merge
from realfill.adapt.lora import factors_in, parameters_of, read_out
from realfill.adapter import Adapter
from realfill.config import preset
from realfill.errors import AdapterMismatch, InvalidCapsule
from service.engine.swap import Swapper
from tests.tiny import tiny_adapter, tiny_base

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class Attention(nn.Module):
    """Two blocks with the names that adapters target, and one name that contains another."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q = nn.Linear(24, 24, dtype=dtype)
        self.add_to_q = nn.Linear(24, 24, dtype=dtype)
        self.to_out = nn.ModuleList([nn.Linear(24, 40, dtype=dtype)])


def factors_for(*, seed: int, rank: int = 3, dtype: torch.dtype = torch.float16) -> Adapter:
    """An adapter for both targets of `Attention`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.3).to(dtype)

    return Adapter(
        factors={
            "to_q": (draw(rank, 24), draw(24, rank)),
            "to_out.0": (draw(rank, 24), draw(40, rank)),
        },
        scale=2.0,
    )


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of everything in a module."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two copies are equal to the bit."""
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_thousand_swaps_leave_the_same_bits(dtype: torch.dtype) -> None:
    """A, B, A gives A's bits again however often, and taking it off gives the base's."""
    module = Attention(dtype)
    base = weights_of(module)
    a, b = factors_for(seed=1), factors_for(seed=2)
    swapper = Swapper(module, TARGETS)
    swapper.apply("a", a)
    first = weights_of(module)
    assert not torch.equal(first["to_q.weight"], base["to_q.weight"])
    for _ in range(500):
        swapper.apply("b", b)
        swapper.apply("a", a)
    assert same(weights_of(module), first)
    swapper.apply(None, None)
    assert same(weights_of(module), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_weight_is_the_exact_sum_rounded_once(dtype: torch.dtype) -> None:
    """The weight is within one rounding of the sum in float64, factors of fp16 included."""
    module = Attention(dtype)
    base = weights_of(module)["to_q.weight"].double()
    adapter = factors_for(seed=1)
    Swapper(module, TARGETS).apply("a", adapter)
    lora_A, lora_B = (factor.double() for factor in adapter.factors["to_q"])
    exact = base + 2.0 * lora_B @ lora_A
    # Half a unit in the last place for the rounding, as much for the float32 sum before it.
    bound = exact.abs() * torch.finfo(dtype).eps + 1e-6
    assert ((module.to_q.weight.double() - exact).abs() <= bound).all()


def test_fused_weight_equals_peft_merge() -> None:
    """PEFT's merge of the same factors gives the same weights, to float32 rounding."""
    adapter = factors_for(seed=1, dtype=torch.float32)
    ours, theirs = Attention(), Attention()
    Swapper(ours, TARGETS).apply("a", adapter)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=r"(to_q|to_out\.0)")
    inject_adapter_in_model(config, theirs)
    for path, (lora_A, lora_B) in adapter.factors.items():
        layer: Any = theirs.get_submodule(path)
        layer.lora_A["default"].weight.data.copy_(lora_A)
        layer.lora_B["default"].weight.data.copy_(lora_B)
        layer.merge()
        torch.testing.assert_close(
            ours.get_submodule(path).weight, layer.base_layer.weight, rtol=1e-6, atol=1e-6
        )


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_fused_unet_draws_what_the_trained_one_drew(layout: torch.memory_format) -> None:
    """From factors in training to fused weights, convolutions and both memory layouts included."""
    base = tiny_base()
    base.unet.to(memory_format=layout)
    config = preset("demo", rank=3, alpha=6.0)
    inputs = torch.randn(2, 9, 4, 4), torch.tensor([500, 20]), torch.zeros(2, 77, 16)
    plain = base.unet(*inputs).sample
    with factors_in(base.unet, base.adapter_modules, config) as layers:
        for parameter in parameters_of(layers):
            nn.init.normal_(parameter, std=0.1)
        trained = base.unet(*inputs).sample
        adapter = read_out(base.unet, config, torch.float32)
    swapper = Swapper(base.unet, base.adapter_modules)
    swapper.apply("a", adapter)
    torch.testing.assert_close(base.unet(*inputs).sample, trained, rtol=1e-4, atol=1e-4)
    assert float((trained - plain).abs().max()) > 1e-2
    swapper.apply(None, None)
    assert torch.equal(base.unet(*inputs).sample, plain)


def test_modules_of_the_last_adapter_only_go_back_to_the_base() -> None:
    """An adapter with fewer modules leaves nothing of the one before it."""
    module, fresh = Attention(), Attention()
    whole = factors_for(seed=1)
    part = Adapter(factors={"to_q": factors_for(seed=2).factors["to_q"]}, scale=2.0)
    swapper = Swapper(module, TARGETS)
    swapper.apply("whole", whole)
    swapper.apply("part", part)
    Swapper(fresh, TARGETS).apply("part", part)
    assert same(weights_of(module), weights_of(fresh))


def test_names_that_contain_each_other_stay_apart() -> None:
    """A target's name inside a longer one is no match, nor is one scene's digest in another's."""
    module = Attention()
    swapper = Swapper(module, TARGETS)
    assert swapper.module_paths == ("to_q", "to_out.0")
    swapper.apply("scene1", factors_for(seed=1))
    one = weights_of(module)
    assert swapper.apply("scene10", factors_for(seed=10))
    assert not same(weights_of(module), one)
    assert swapper.apply("scene1", factors_for(seed=1))
    assert same(weights_of(module), one)


def broken(kind: str) -> Adapter:
    """An adapter with one fault."""
    sound = factors_for(seed=3)
    factors = dict(sound.factors)
    lora_A, lora_B = factors["to_out.0"]
    if kind == "unknown path":
        factors["to_k"] = factors["to_q"]
    elif kind == "wrong shape":
        factors["to_out.0"] = (lora_A, lora_B[:39])
    elif kind == "ranks differ":
        factors["to_out.0"] = (lora_A[:2], lora_B)
    elif kind == "rank too high":
        factors["to_out.0"] = (torch.zeros(129, 24), torch.zeros(40, 129))
    elif kind == "nothing":
        factors = {}
    elif kind in ("nan", "inf", "huge"):
        value = {"nan": float("nan"), "inf": float("-inf"), "huge": 6e4}[kind]
        poisoned = lora_A.clone()
        poisoned[1, 5] = value
        factors["to_out.0"] = (poisoned, lora_B)
    return Adapter(factors=factors, scale=float("nan") if kind == "nan scale" else 2.0)


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        ("unknown path", AdapterMismatch, "'to_k', which is no target"),
        ("wrong shape", AdapterMismatch, r"lora_B \(39, 3\)"),
        ("ranks differ", AdapterMismatch, r"lora_A \(2, 24\)"),
        ("rank too high", AdapterMismatch, "rank of at most 128"),
        ("nothing", AdapterMismatch, "changes nothing"),
        ("nan", InvalidCapsule, "NaN or infinity"),
        ("inf", InvalidCapsule, "NaN or infinity"),
        ("nan scale", InvalidCapsule, "NaN or infinity"),
        ("huge", InvalidCapsule, "too much for torch.float16"),
    ],
)
def test_faulty_adapter_leaves_the_previous_one(
    kind: str, error: type[Exception], says: str
) -> None:
    """A refused adapter changes no weight, neither under an adapter nor on the bare base."""
    module = Attention(torch.float16)
    base = weights_of(module)
    swapper = Swapper(module, TARGETS)
    with pytest.raises(error, match=says):
        swapper.apply("broken", broken(kind))
    assert swapper.digest is None
    assert same(weights_of(module), base)
    swapper.apply("a", factors_for(seed=1))
    before = weights_of(module)
    with pytest.raises(error, match=says):
        swapper.apply("broken", broken(kind))
    swapper.verify("a", 2.0)
    assert same(weights_of(module), before)
    swapper.apply(None, None)
    assert same(weights_of(module), base)


class FailingMerge:
    """Merges the first module of a marked adapter, then fails as a device might."""

    def __init__(self) -> None:
        self.failures_left = 0

    def __call__(self, *modules: Any) -> Callable[[float], None]:
        first = prepared_merge(*(tensors[:1] for tensors in modules))
        whole = prepared_merge(*modules)

        def merge(scale: float) -> None:
            if self.failures_left:
                self.failures_left -= 1
                first(scale)
                raise RuntimeError("device lost")
            whole(scale)

        return merge


def test_swap_that_fails_half_way_is_undone() -> None:
    """If fusing fails between two modules, the previous adapter is put back whole."""
    module, merge = Attention(), FailingMerge()
    swapper = Swapper(module, TARGETS, merge)
    swapper.apply("a", factors_for(seed=1))
    before = weights_of(module)
    merge.failures_left = 1
    with pytest.raises(RuntimeError, match="device lost"):
        swapper.apply("b", factors_for(seed=2))
    assert same(weights_of(module), before)
    swapper.verify("a", 2.0)


def test_swap_that_cannot_be_undone_is_never_served() -> None:
    """If putting back fails too, every identity is denied until a swap succeeds."""
    module, merge = Attention(), FailingMerge()
    base = weights_of(module)
    swapper = Swapper(module, TARGETS, merge)
    swapper.apply("a", factors_for(seed=1))
    merge.failures_left = 2
    with pytest.raises(RuntimeError, match="device lost"):
        swapper.apply("b", factors_for(seed=2))
    for digest, scale in (("a", 2.0), ("b", 2.0), (None, None)):
        with pytest.raises(RuntimeError, match="parts of two adapters"):
            swapper.verify(digest, scale)
    with pytest.raises(RuntimeError, match="parts of two adapters"):
        _ = swapper.digest
    assert swapper.apply(None, None)
    assert same(weights_of(module), base)


def test_write_from_elsewhere_is_noticed_and_repaired() -> None:
    """Somebody else's write makes verify fail, and the next apply fuses from the pristine copy."""
    module = Attention()
    swapper = Swapper(module, TARGETS)
    adapter = factors_for(seed=1)
    swapper.apply("a", adapter)
    sound = weights_of(module)
    with torch.no_grad():
        module.to_q.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="written from elsewhere"):
        swapper.verify("a", 2.0)
    assert swapper.apply("a", adapter)
    assert same(weights_of(module), sound)
    module.to_q.weight.data = torch.zeros(24, 24)
    with pytest.raises(RuntimeError, match="written from elsewhere"):
        swapper.verify("a", 2.0)


def test_identity_is_digest_and_scale() -> None:
    """The same adapter is not written twice, but is if its scale differs."""
    module = Attention()
    swapper = Swapper(module, TARGETS)
    adapter = factors_for(seed=1)
    assert swapper.apply("a", adapter)
    assert not swapper.apply("a", adapter)
    before = weights_of(module)
    assert swapper.apply("a", dataclasses.replace(adapter, scale=1.0))
    assert not same(weights_of(module), before)
    assert swapper.writes == 2
    with pytest.raises(RuntimeError, match="was to hold adapter b"):
        swapper.verify("b", 1.0)


def test_adapter_without_digest_is_refused() -> None:
    """Weights whose adapter has no name could not be told apart."""
    swapper = Swapper(Attention(), TARGETS)
    with pytest.raises(ValueError, match="pass both or neither"):
        swapper.apply(None, factors_for(seed=1))
    with pytest.raises(ValueError, match="named like any of"):
        Swapper(Attention(), ("proj",))


def test_unet_of_a_base_draws_differently_with_each_adapter() -> None:
    """On a whole U-Net every target module is found, and outputs follow the adapter exactly."""
    base = tiny_base()
    swapper = Swapper(base.unet, base.adapter_modules)
    latents = torch.randn(2, 9, 4, 4, generator=torch.Generator().manual_seed(0))
    prompt = torch.zeros(2, 77, 16)

    def draw() -> Tensor:
        return base.unet(latents, torch.tensor([500, 20]), prompt).sample

    plain = draw()
    a, b = tiny_adapter(base, 1), tiny_adapter(base, 2)
    assert set(a.factors) == set(swapper.module_paths)
    swapper.apply("a", a)
    with_a = draw()
    swapper.apply("b", b)
    with_b = draw()
    swapper.apply("a", a)
    assert torch.equal(draw(), with_a)
    swapper.apply(None, None)
    assert torch.equal(draw(), plain)
    assert float((with_a - plain).abs().max()) > 1e-3
    assert float((with_a - with_b).abs().max()) > 1e-3
