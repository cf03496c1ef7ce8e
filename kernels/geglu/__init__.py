"""GEGLU: one half of the features times the GELU of the other, read once and written once."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.geglu.reference import geglu_reference
from kernels.launch import kernels_run_on

__all__ = ["geglu"]

KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def geglu(x: Tensor) -> Tensor:
    """First half of the last dimension times GELU of the second, in float32 and rounded once.

    Float64 stays float64. GELU is the exact one, by the error function. No gradient flows.

    Args:
        x: Features and gates side by side; any strides. [..., 2 H]

    Returns:
        Contiguous, of the type of x. [..., H]

    Raises:
        ValueError: x is not floating, or its last dimension is odd.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; pass floating [..., 2 H]")
    with torch.no_grad():
        if x.numel() and kernels_run_on(x.device) and x.dtype in KERNEL_TYPES:
            from kernels.geglu.kernel import geglu_kernel

            return geglu_kernel(x)
        return geglu_reference(x)
