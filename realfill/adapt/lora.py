"""Low-rank factors beside frozen layers: put in for training, read out, and taken out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from realfill.adapter import Adapter
from realfill.base import target_layers
from realfill.config import TrainingConfig

NAME = "scene"


@contextmanager
def factors_in(
    module: nn.Module, suffixes: tuple[str, ...], config: TrainingConfig
) -> Iterator[list[LoraLayer]]:
    """Train-ready factors beside every target layer, linear or convolution.

    On leaving, the module is what it was before, layer for layer: many scenes are trained on one
    base.
    """
    before = target_layers(module, suffixes)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(before),
        lora_dropout=config.lora_dropout if config.lora_drop_mode == "element" else 0.0,
    )
    trainable = {name: p.requires_grad for name, p in module.named_parameters()}
    inject_adapter_in_model(lora, module, adapter_name=NAME)
    layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        # Autocast chooses the products' precision; widening every input only costs time.
        layer.cast_input_dtype_enabled = False
    try:
        yield layers
    finally:
        for path, layer in before.items():
            parent, _, leaf = path.rpartition(".")
            setattr(module.get_submodule(parent), leaf, layer)
        if hasattr(module, "peft_config"):
            del module.peft_config
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trainable[name])


def parameters_of(layers: list[LoraLayer]) -> list[nn.Parameter]:
    """The factors of the layers, in their order."""
    return [layer.get_parameter(f"lora_{side}.{NAME}.weight") for layer in layers for side in "AB"]


def drop(layers: list[LoraLayer], config: TrainingConfig, generator: torch.Generator) -> None:
    """Switch branches off for one step, each layer by itself or all together.

    A branch that is off is not computed, and its factors get no gradient.

    Source: RealFill, arXiv:2309.16668, section 3.3: LoRA layers are dropped with probability 0.1.
    """
    if config.lora_drop_mode == "element" or not config.lora_dropout:
        return
    count = len(layers) if config.lora_drop_mode == "layer" else 1
    kept = torch.rand(count, generator=generator) >= config.lora_dropout
    for index, layer in enumerate(layers):
        layer.enable_adapters(bool(kept[index % count]))


def drop_elements(layers: list[LoraLayer]) -> None:
    """Let PEFT drop elements of the branches' inputs, where that is chosen, until ``restore``."""
    for layer in layers:
        layer.lora_dropout.train()


def restore(layers: list[LoraLayer], config: TrainingConfig, strength: float = 1.0) -> None:
    """Switch every branch on, at a share of its full strength, with no element dropped."""
    for layer in layers:
        layer.enable_adapters(True)
        layer.lora_dropout.eval()
        layer.scaling[NAME] = config.scale * strength


def read_out(
    module: nn.Module, config: TrainingConfig, dtype: torch.dtype = torch.float16
) -> Adapter:
    """The factors as an adapter, by module path."""
    factors = {}
    for path, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (layer.get_parameter(f"lora_{side}.{NAME}.weight") for side in "AB")
            # A convolution's factors, [R, in, kh, kw] and [out, R, 1, 1], become matrices.
            a, b = (factor.detach().cpu().to(dtype).flatten(1).contiguous() for factor in (a, b))
            factors[path] = (a, b)
    return Adapter(factors=factors, scale=config.scale)
