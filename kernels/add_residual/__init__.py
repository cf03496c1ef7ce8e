"""The end of a residual block: features, their bias and the residual added in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.add_residual.reference import add_residual_reference
from kernels.launch import kernels_run_on

__all__ = ["add_residual"]

KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def add_residual(residual: Tensor, features: Tensor, bias: Tensor) -> Tensor:
    """residual + (features + bias), in float32 (float64 where they are) and rounded once.

    A block's last convolution and its shortcut can leave their biases to this: torch would add each
    in a pass over memory of its own. No gradient flows.

    Args:
        residual: Any strides; copied first where its layout is not that of the outcome.
            [N, C, H, W]
        features: Of the same shape and type; likewise. [N, C, H, W]
        bias: Added to all pixels of a channel. [C]

    Returns:
        Of the type of features; channels-last where features are, else contiguous. [N, C, H, W]

    Raises:
        ValueError: Shapes, types or devices do not fit.

    Source: He et al., Deep Residual Learning for Image Recognition, arXiv:1512.03385.
    """
    _check(residual, features, bias)
    with torch.no_grad():
        known = features.dtype in KERNEL_TYPES and bias.dtype in KERNEL_TYPES
        if features.numel() and kernels_run_on(features.device) and known:
            from kernels.add_residual.kernel import add_residual_kernel

            return add_residual_kernel(residual, features, bias)
        return add_residual_reference(residual, features, bias)


def _check(residual: Tensor, features: Tensor, bias: Tensor) -> None:
    if features.dim() != 4 or not features.is_floating_point():
        raise ValueError(
            f"features are {features.dtype} of shape {tuple(features.shape)}; pass floating "
            "[N, C, H, W]"
        )
    if (residual.shape, residual.dtype) != (features.shape, features.dtype):
        raise ValueError(
            f"residual is {residual.dtype} of shape {tuple(residual.shape)}; pass "
            f"{features.dtype} of shape {tuple(features.shape)}, as the features"
        )
    channels = features.shape[1:2]
    if bias.shape != channels or not bias.is_floating_point():
        raise ValueError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)}; pass floating {tuple(channels)}"
        )
    for name, tensor in (("residual", residual), ("bias", bias)):
        if tensor.device != features.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but features on {features.device}; move it"
            )
