"""Read one scene's adapter for a U-Net: validated, on its device, in the order of its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.merge_lora import MAX_RANK
from realfill.adapter import Adapter
from realfill.errors import AdapterMismatch, InvalidCapsule


@dataclass(frozen=True, eq=False)
class StagedAdapter:
    """An adapter that fits the U-Net, validated and on its device.

    Attributes:
        digest: Of the capsule.
        scale: alpha / rank.
        factors: lora_A [R, in] and lora_B [out, R] by module path.
    """

    digest: str
    scale: float
    factors: dict[str, tuple[Tensor, Tensor]]

    @property
    def rank(self) -> int:
        """The largest of its modules' ranks."""
        return max(len(lora_A) for lora_A, _ in self.factors.values())


def stage(
    modules: Mapping[str, nn.Linear | nn.Conv2d], digest: str, adapter: Adapter
) -> StagedAdapter:
    """Validate an adapter and bring it to the modules' device, in one copy; no weight is touched.

    Args:
        modules: What adapters may change, by path.
        digest: Of the capsule.
        adapter: Factors by path.

    Raises:
        AdapterMismatch: A path or a shape is not the U-Net's.
        InvalidCapsule: A value is not finite, or too large for the weights' type.
    """
    ranks = _check_shapes(modules, digest, adapter)
    flat = adapter.in_one_piece()
    weight = next(iter(modules.values())).weight
    # Looked at here: a GPU would answer only after the steps that it was given before.
    lowest, highest = torch.aminmax(flat)
    # A single NaN makes both of them NaN.
    largest = max(-float(lowest), float(highest))
    if not math.isfinite(largest) or not math.isfinite(adapter.scale):
        raise InvalidCapsule(
            f"adapter {digest} holds NaN or infinity; train and publish the scene again"
        )
    bound = abs(adapter.scale) * max(ranks) * largest**2
    if bound > torch.finfo(weight.dtype).max / 2:
        raise InvalidCapsule(
            f"adapter {digest} may reach {bound:.3g}, too much for {weight.dtype}; "
            "train with a lower learning rate, or serve the base in bfloat16"
        )
    # CPUs calculate slowly in half precision, so there the factors are widened once, here.
    here = weight.device
    flat = flat.to(here, non_blocking=flat.is_pinned()) if weight.is_cuda else flat.float()
    return StagedAdapter(digest, float(adapter.scale), adapter.over(flat).factors)


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """A tensor from where a copy to the device makes nobody wait, if it is told not to block.

    The host's memory is not given to anybody else before the device has read it.
    """
    return values.pin_memory() if device.type == "cuda" and not values.is_cuda else values


def as_matrix(weight: Tensor) -> Tensor:
    """A weight's memory as a matrix, columns in the order they lie in. [out, in]"""
    if weight.dim() == 2 or weight.is_contiguous():
        return weight.flatten(1)
    # Channels last: rows, columns, then channels of the kernel.
    return weight.permute(0, 2, 3, 1).view(len(weight), -1)


def as_laid_out(weight: Tensor, lora_A: Tensor) -> Tensor:
    """lora_A with its columns in the order that a weight has in memory. [R, in]"""
    if weight.dim() == 2 or weight.is_contiguous():
        return lora_A
    return lora_A.view(-1, *weight.shape[1:]).permute(0, 2, 3, 1).flatten(1)


def _check_shapes(
    modules: Mapping[str, nn.Linear | nn.Conv2d], digest: str, adapter: Adapter
) -> set[int]:
    """Ranks of the adapter's modules, all of which the U-Net has in the same shape."""
    ranks = set()
    for path, (lora_A, lora_B) in adapter.factors.items():
        if path not in modules:
            raise AdapterMismatch(
                f"adapter {digest} changes {path!r}, which is no target module of this base; "
                "train it for this base"
            )
        rows, columns = as_matrix(modules[path].weight).shape
        rank = lora_A.shape[0]
        fits = lora_A.shape == (rank, columns) and lora_B.shape == (rows, rank)
        if not fits or not 1 <= rank <= MAX_RANK:
            raise AdapterMismatch(
                f"adapter {digest} has lora_A {tuple(lora_A.shape)} and lora_B "
                f"{tuple(lora_B.shape)} for {path!r} of shape {(rows, columns)}; "
                f"train it for this base with a rank of at most {MAX_RANK}"
            )
        ranks.add(rank)
    if not ranks:
        raise AdapterMismatch(f"adapter {digest} changes nothing; train the scene again")
    return ranks
