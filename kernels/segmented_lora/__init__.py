"""To each sample of a batch the low-rank term of its own adapter, in place or with its layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.launch import interpreted, kernels_run_on
from kernels.segmented_lora.reference import (
    segmented_conv_lora_reference_,
    segmented_linear_reference,
    segmented_lora_reference_,
)

__all__ = ["segmented_conv_lora_", "segmented_linear", "segmented_lora_"]

# The kernels hold one block of this many rows of lora_A; registers end soon after.
MAX_RANK = 128
# A whole layer in one launch shrinks anew for every tile: wider ranks are better shrunk once.
MAX_FUSED_RANK = 32
KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def segmented_lora_(
    out: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, slots: Tensor, scales: Tensor
) -> None:
    """out[n] += scales[s] * (x[n] @ lora_A[s].T) @ lora_B[s].T, with s = slots[n].

    Every sample has one adapter for all its tokens, so nothing is sorted and no token has an index
    of its own. Sums are taken in float32 (float64 where `out` is), in an order that knows nothing
    of the batch: a sample gets the same bits at any place and beside any neighbours. No gradient
    flows through it.

    Args:
        out: What a layer gave without adapters; any strides. [N, T, out]
        x: What the layer was given, of the type of `out`; any strides. [N, T, in]
        lora_A: Factors of each slot, padded with zero rows to the widest rank of the class; any
            strides, so a view into a packed buffer will do. [L, R, in]
        lora_B: Factors likewise, padded with zero columns, of the type of `lora_A`. [L, out, R]
        slots: Slot of each sample, or -1 for none, which leaves the sample's bits alone.
            [N], int32 or int64
        scales: alpha / rank of each slot. [L], float32

    Raises:
        ValueError: Shapes, types or devices do not fit, or on the CPU, a slot is out of range. On
            CUDA nothing waits for the slots to be read: a sample of such a slot becomes NaN.
    """
    if out.dim() != 3 or x.dim() != 3 or out.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"out is {tuple(out.shape)} and x {tuple(x.shape)}; pass [N, T, out] and [N, T, in]"
        )
    _check(out, x, lora_A, lora_B, slots, scales, depth=x.shape[2], columns=out.shape[2])
    if not out.numel():
        return
    with torch.no_grad():
        if _kernels_take(out, lora_A):
            from kernels.segmented_lora.kernel import segmented_lora_kernel_

            segmented_lora_kernel_(out, x, lora_A, lora_B, slots, scales)
        else:
            segmented_lora_reference_(out, x, lora_A, lora_B, slots, scales)


def segmented_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    slots: Tensor,
    scales: Tensor,
) -> Tensor:
    """A linear layer and the term of each sample: x[n] @ weight.T + bias, then `segmented_lora_`.

    On CUDA, half precision with factors of the same type and a rank of at most 32 is one launch,
    whose sums in float32 are rounded once; a sample gets the same bits at any place and beside any
    neighbours. Everything else there is torch's layer and `segmented_lora_`, one after the other.

    Args:
        x: What the layer is given; any strides. [N, T, in]
        weight: Of the layer, of the type of `x`; any strides. [out, in]
        bias: Likewise, or None. [out]
        lora_A, lora_B, slots, scales: As in `segmented_lora_`; at least one slot.

    Returns:
        Contiguous, of the type of `x`. [N, T, out]

    Raises:
        ValueError: As `segmented_lora_`; or weight or bias do not fit, or there is no slot.
    """
    _check_layer(x, weight, bias)
    columns, depth = weight.shape
    _check(x, x, lora_A, lora_B, slots, scales, depth=depth, columns=columns)
    if not len(lora_A):
        raise ValueError("lora_A has no slot; pass at least one, which nobody needs to use")
    with torch.no_grad():
        if not x.shape[0] * x.shape[1] * columns:
            return x.new_empty(*x.shape[:2], columns)
        if _fuses(x, lora_A):
            from kernels.segmented_lora.linear import segmented_linear_kernel

            return segmented_linear_kernel(x, weight, bias, lora_A, lora_B, slots, scales)
        if _kernels_take(x, lora_A):
            from kernels.segmented_lora.kernel import segmented_lora_kernel_

            out = F.linear(x, weight, bias)
            segmented_lora_kernel_(out, x, lora_A, lora_B, slots, scales)
            return out
        return segmented_linear_reference(x, weight, bias, lora_A, lora_B, slots, scales)


def segmented_conv_lora_(
    out: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    slots: Tensor,
    scales: Tensor,
    *,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> None:
    """`segmented_lora_` for a convolution: out[n] += scales[s] * lora_B[s] @ conv(x[n], lora_A[s]).

    Args:
        out: What the convolution gave without adapters; contiguous or channels-last.
            [N, out, H', W']
        x: What it was given, of the type of `out`; any strides. [N, in, H, W]
        lora_A: Factors of each slot; a row is a filter [in, kh, kw], flattened.
            [L, R, in * kh * kw]
        lora_B, slots, scales: As in `segmented_lora_`.
        kernel_size, stride, padding: Of the convolution, in pixels, downwards and across; groups
            and dilation are 1.

    Raises:
        ValueError: As `segmented_lora_`; or `out` has not the size that the convolution gives, or
            is neither contiguous nor channels-last.
    """
    if out.dim() != 4 or x.dim() != 4 or out.shape[0] != x.shape[0]:
        raise ValueError(
            f"out is {tuple(out.shape)} and x {tuple(x.shape)}; pass [N, out, H', W'] and "
            "[N, in, H, W]"
        )
    _check_sizes(out, x, kernel_size, stride, padding)
    depth = x.shape[1] * kernel_size[0] * kernel_size[1]
    _check(out, x, lora_A, lora_B, slots, scales, depth=depth, columns=out.shape[1])
    if not out.numel():
        return
    geometry = (kernel_size, stride, padding)
    with torch.no_grad():
        if _kernels_take(out, lora_A):
            from kernels.segmented_lora.kernel import segmented_conv_lora_kernel_

            segmented_conv_lora_kernel_(out, x, lora_A, lora_B, slots, scales, *geometry)
        else:
            segmented_conv_lora_reference_(out, x, lora_A, lora_B, slots, scales, *geometry)


def _kernels_take(out: Tensor, lora_A: Tensor) -> bool:
    """Whether the kernels run on the device of these tensors and know their types."""
    types = (out.dtype, lora_A.dtype)
    return kernels_run_on(out.device) and all(kind in KERNEL_TYPES for kind in types)


def _fuses(x: Tensor, lora_A: Tensor) -> bool:
    """Whether one kernel is right for the whole layer; float32 is for the interpreter alone."""
    alike = x.dtype == lora_A.dtype and lora_A.shape[1] <= MAX_FUSED_RANK
    return alike and _kernels_take(x, lora_A) and (x.dtype != torch.float32 or interpreted())


def _check_layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 3 or weight.dim() != 2 or x.shape[2] != weight.shape[1]:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; pass [N, T, in] and [out, in]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias is {tuple(bias.shape)}; pass [out], here {tuple(weight.shape[:1])}, or None"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and x {x.dtype}; use one floating type")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x on {x.device}; move it")


def _check(
    out: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    slots: Tensor,
    scales: Tensor,
    *,
    depth: int,
    columns: int,
) -> None:
    """Refuse tensors that do not fit together; `depth` is the length of a row of lora_A."""
    if lora_A.dim() != 3 or lora_A.shape[2] != depth:
        raise ValueError(f"lora_A is {tuple(lora_A.shape)}; pass [L, R, {depth}]")
    n_slots, rank = lora_A.shape[:2]
    if lora_B.shape != (n_slots, columns, rank):
        raise ValueError(
            f"lora_B is {tuple(lora_B.shape)}; pass [L, out, R], here {(n_slots, columns, rank)}"
        )
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank is {rank}; use 1 to {MAX_RANK}")
    if slots.shape != out.shape[:1] or slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"slots is {slots.dtype} of shape {tuple(slots.shape)}; pass int32 or int64 of shape "
            f"{tuple(out.shape[:1])}"
        )
    if scales.shape != (n_slots,) or scales.dtype != torch.float32:
        raise ValueError(
            f"scales is {scales.dtype} of shape {tuple(scales.shape)}; pass float32 of shape "
            f"{(n_slots,)}"
        )
    _check_types(out, x, lora_A, lora_B)
    for name, tensor in (("out", out), ("lora_A", lora_A), ("lora_B", lora_B), ("scales", scales)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x on {x.device}; move it")
    _check_slots(slots, n_slots, x.device)


def _check_types(out: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    if out.dtype != x.dtype or not out.is_floating_point():
        raise ValueError(f"out is {out.dtype} and x {x.dtype}; use one floating type")
    if lora_A.dtype != lora_B.dtype or not lora_A.is_floating_point():
        raise ValueError(
            f"lora_A is {lora_A.dtype} and lora_B {lora_B.dtype}; use one floating type"
        )


def _check_slots(slots: Tensor, n_slots: int, device: torch.device) -> None:
    if slots.device != device:
        raise ValueError(f"slots is on {slots.device}, but x on {device}; move it")
    if device.type == "cpu":
        wrong = [slot for slot in slots.tolist() if not -1 <= slot < n_slots]
        if wrong:
            raise ValueError(f"slot {wrong[0]} is out of range; use -1 to {n_slots - 1}")


def _check_sizes(
    out: Tensor,
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> None:
    """Refuse an `out` that a convolution does not give, or whose pixels are not evenly spaced."""
    if min(*kernel_size, *stride) < 1 or min(padding) < 0:
        raise ValueError(
            f"kernel_size is {kernel_size}, stride {stride} and padding {padding}; "
            "use at least 1, 1 and 0"
        )
    size = tuple(
        (x.shape[2 + k] + 2 * padding[k] - kernel_size[k]) // stride[k] + 1 for k in range(2)
    )
    if tuple(out.shape[2:]) != size:
        raise ValueError(f"out is {tuple(out.shape)}, but the convolution gives {size} pixels")
    height, width = size
    if height > 1 and width > 1 and out.stride(2) != width * out.stride(3):
        raise ValueError(
            f"out has strides {out.stride()}; pass a contiguous or channels-last tensor"
        )
