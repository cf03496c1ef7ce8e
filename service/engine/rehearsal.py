"""A swap before anybody waits for one: a GPU compiles what merges adapters at its first use."""

from __future__ import annotations

import torch
from torch import nn

from realfill.adapter import Adapter
from service.engine.weights import Part, Weights

NAME = "rehearsal"


def rehearse_swap(weights: Weights, unet: nn.Module, rank: int) -> None:
    """Bring an adapter of a rank, draw nothing with it, and leave nothing of it.

    Args:
        weights: Of the network, the base's own.
        unet: The network.
        rank: Of what will be swapped.
    """
    factors = {}
    for path in weights.module_paths:
        weight = unet.get_submodule(path).get_parameter("weight")
        rows, columns = weight.flatten(1).shape
        lora_A = torch.zeros(rank, columns, dtype=weight.dtype)
        factors[path] = (lora_A, torch.zeros(rows, rank, dtype=weight.dtype))
    if not weights.take(NAME, Adapter(factors, scale=1.0)):
        return
    weights.apply([Part(NAME, 1)])
    weights.give_back(NAME)
    weights.forget(NAME)
    weights.settle()
