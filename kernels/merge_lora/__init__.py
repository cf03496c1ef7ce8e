"""Fuse LoRA factors into weights: out = pristine + scale * lora_B @ lora_A."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kernels.launch import kernels_run_on
from kernels.merge_lora.reference import merge_lora_reference_

__all__ = ["merge_lora", "merge_lora_", "prepared_merge"]

# The kernel holds one block of this many rows of lora_A; registers end soon after.
MAX_RANK = 128
KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def merge_lora(
    out: Tensor, pristine: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float
) -> Tensor:
    """Write the fused weight of one module into `out`; see `merge_lora_`.

    Returns:
        `out`. [out, in]
    """
    merge_lora_([out], [pristine], [lora_A], [lora_B], scale)
    return out


def merge_lora_(
    outs: Sequence[Tensor],
    pristines: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scale: float,
) -> None:
    """Write the fused weights of many modules into `outs`, on CUDA in one launch.

    The sum is taken in float32 (float64 where the weights are) and rounded once to the type of
    the weight. Nothing is ever subtracted: fusing again starts from `pristines` again, so going
    from one adapter to another and back gives the same bits.

    Args:
        outs: Weights to overwrite, one type for all. [out, in] each
        pristines: Weights without adapter, of the type of `outs` and apart from them in memory.
            [out, in] each
        lora_As: Factors, one floating type for all. [R, in] each
        lora_Bs: Factors; R may differ from module to module. [out, R] each
        scale: alpha / rank.

    Raises:
        ValueError: Shapes, types or devices do not fit, a rank is out of range, or a weight would
            be merged onto its own pristine copy.
    """
    prepared_merge(outs, pristines, lora_As, lora_Bs)(scale)


def prepared_merge(
    outs: Sequence[Tensor],
    pristines: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
) -> Callable[[float], None]:
    """`merge_lora_` in two parts: what is checked and looked up once, and a call for each merge.

    With a hundred modules the former takes Python ten times as long as the latter. On CUDA a call
    is one launch and does not wait for the device. Factors that are contiguous are read anew by
    every call, others as they are now.

    Args:
        outs, pristines, lora_As, lora_Bs: As in `merge_lora_`; they must stay where they are.

    Returns:
        Merges, given a scale.

    Raises:
        ValueError: As `merge_lora_`; what is returned raises it for a scale that is not finite.
    """
    if not len(outs) == len(pristines) == len(lora_As) == len(lora_Bs):
        raise ValueError(
            f"merge_lora_ got {len(outs)} outs, {len(pristines)} pristines, {len(lora_As)} lora_As "
            f"and {len(lora_Bs)} lora_Bs; pass one of each per module"
        )
    for k, module in enumerate(zip(outs, pristines, lora_As, lora_Bs, strict=True)):
        _check(k, *module, first=outs[0], first_factor=lora_As[0])
    modules = (outs, pristines, lora_As, lora_Bs)
    types = [tensors[0].dtype for tensors in (outs, lora_As) if tensors]
    merge: Callable[[float], None] = partial(merge_lora_reference_, *modules)
    if outs and kernels_run_on(outs[0].device) and all(kind in KERNEL_TYPES for kind in types):
        from kernels.merge_lora.kernel import prepared_kernel

        merge = prepared_kernel(*modules)
    return partial(_merge, merge)


@torch.no_grad()
def _merge(merge: Callable[[float], None], scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; pass a finite number")
    merge(scale)


def _check(
    k: int,
    out: Tensor,
    pristine: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    first: Tensor,
    first_factor: Tensor,
) -> None:
    """Refuse module k where its tensors do not fit together, or not to the first module's."""
    tensors = {"out": out, "pristine": pristine, "lora_A": lora_A, "lora_B": lora_B}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(
                f"{name} of module {k} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                "pass a floating matrix"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name} of module {k} is on {tensor.device}, but the first out on "
                f"{first.device}; move them to one device"
            )
    rows, columns = out.shape
    rank = lora_A.shape[0]
    if pristine.shape != out.shape or lora_A.shape[1] != columns or lora_B.shape != (rows, rank):
        raise ValueError(
            f"module {k} has out {tuple(out.shape)}, pristine {tuple(pristine.shape)}, lora_A "
            f"{tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}; "
            "pass [out, in], [out, in], [R, in] and [out, R]"
        )
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank of module {k} is {rank}; use 1 to {MAX_RANK}")
    if out.dtype != first.dtype or pristine.dtype != first.dtype:
        raise ValueError(
            f"module {k} has out {out.dtype} and pristine {pristine.dtype}, but the first out is "
            f"{first.dtype}; use one type"
        )
    if lora_A.dtype != first_factor.dtype or lora_B.dtype != first_factor.dtype:
        raise ValueError(
            f"module {k} has lora_A {lora_A.dtype} and lora_B {lora_B.dtype}, but the first "
            f"lora_A is {first_factor.dtype}; use one type"
        )
    if out.numel() and out.data_ptr() == pristine.data_ptr():
        raise ValueError(
            f"out and pristine of module {k} are the same memory; pass a copy as pristine"
        )
