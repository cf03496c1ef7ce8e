"""A residual addition and the layer norm behind it, in one pass: two reads and two writes."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.add_layernorm.reference import add_layernorm_reference
from kernels.launch import kernels_run_on

__all__ = ["add_layernorm"]

KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)
# A row is held at once: beyond so many values the reference computes it.
MOST_CHANNELS = 16384


def add_layernorm(
    residual: Tensor,
    addend: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """residual + addend, and the layer norm of that sum over its last dimension.

    The sum is rounded to its type. What is normalised is the rounded sum, in float32 (float64 where
    it is float64), rounded once. The variance is that of squared distances to the mean, never a
    difference of large sums. No gradient flows.

    Args:
        residual: Any strides. [..., C]
        addend: Of the same shape and type; None for a layer norm of the residual itself. [..., C]
        weight: Factor of each channel, after the normalisation; None for 1. [C]
        bias: Added to each channel, after its factor; None for 0. [C]
        eps: Added to the variance, at least 0.

    Returns:
        The sum, which is the residual itself where nothing is added, and its norm, contiguous.
        [..., C] each

    Raises:
        ValueError: Shapes, types or devices do not fit.

    Source: Ba et al., Layer Normalization, arXiv:1607.06450.
    """
    _check(residual, addend, weight, bias, eps)
    with torch.no_grad():
        given = (residual, *(t for t in (addend, weight, bias) if t is not None))
        known = all(tensor.dtype in KERNEL_TYPES for tensor in given)
        fits = residual.numel() > 0 and residual.shape[-1] <= MOST_CHANNELS
        if fits and known and kernels_run_on(residual.device):
            from kernels.add_layernorm.kernel import add_layernorm_kernel

            return add_layernorm_kernel(residual, addend, weight, bias, eps)
        return add_layernorm_reference(residual, addend, weight, bias, eps)


def _check(
    residual: Tensor,
    addend: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> None:
    if residual.dim() == 0 or not residual.is_floating_point():
        raise ValueError(
            f"residual is {residual.dtype} of shape {tuple(residual.shape)}; pass floating [..., C]"
        )
    if addend is not None and (addend.shape, addend.dtype) != (residual.shape, residual.dtype):
        raise ValueError(
            f"addend is {addend.dtype} of shape {tuple(addend.shape)}; pass {residual.dtype} of "
            f"shape {tuple(residual.shape)}, as the residual"
        )
    channels = residual.shape[-1:]
    for name, tensor in (("addend", addend), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if name != "addend" and (tensor.shape != channels or not tensor.is_floating_point()):
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; pass floating "
                f"{tuple(channels)}"
            )
        if tensor.device != residual.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but residual on {residual.device}; move it"
            )
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; use at least 0")
