"""Group normalisation and the SiLU after it, in one pass over memory less than one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.groupnorm_silu.reference import groupnorm_silu_reference
from kernels.launch import kernels_run_on

__all__ = ["groupnorm_silu"]

KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def groupnorm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = True,
    added: Tensor | None = None,
) -> Tensor:
    """silu(group_norm(x + added)), calculated in float32 (float64 where x is) and rounded once.

    Mean and variance are those of the values themselves, never a difference of large sums: a group
    far from zero loses nothing. No gradient flows through it.

    Args:
        x: Features; any strides. [N, C, H, W]
        groups: Number of groups, a divisor of C.
        weight: Factor of each channel, after the normalisation. [C]
        bias: Added to each channel, after its factor. [C]
        eps: Added to the variance, at least 0.
        silu: Whether y * sigmoid(y) follows.
        added: To all pixels of a channel, before the normalisation. [N, C]

    Returns:
        Of the type of x; channels-last where x is, else contiguous. [N, C, H, W]

    Raises:
        ValueError: Shapes, types or devices do not fit, or groups does not divide C.

    Source: Wu and He, arXiv:1803.08494; Elfwing et al., arXiv:1702.03118.
    """
    _check(x, groups, weight, bias, eps, added)
    with torch.no_grad():
        given = (x, weight, bias) if added is None else (x, weight, bias, added)
        known = all(tensor.dtype in KERNEL_TYPES for tensor in given)
        if x.numel() and kernels_run_on(x.device) and known:
            from kernels.groupnorm_silu.kernel import groupnorm_silu_kernel

            return groupnorm_silu_kernel(x, groups, weight, bias, eps, silu, added)
        return groupnorm_silu_reference(x, groups, weight, bias, eps, silu, added)


def _check(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, added: Tensor | None
) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; pass floating [N, C, H, W]")
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups is {groups}; use a divisor of the {channels} channels")
    expected: dict[str, tuple[Tensor, tuple[int, ...]]]
    expected = {"weight": (weight, (channels,)), "bias": (bias, (channels,))}
    if added is not None:
        expected["added"] = (added, (x.shape[0], channels))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape or not tensor.is_floating_point():
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; pass floating {shape}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x on {x.device}; move it")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; use at least 0")
