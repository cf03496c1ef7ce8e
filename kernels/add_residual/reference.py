"""Definition of add_residual in torch, and what computes it on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.memory_format import format_of


def add_residual_reference(residual: Tensor, features: Tensor, bias: Tensor) -> Tensor:
    """residual + (features + bias) in float32 or wider, rounded once.

    Args:
        residual, features, bias: As in `kernels.add_residual.add_residual`.
    """
    inner = torch.promote_types(features.dtype, torch.float32)
    biased = features.to(inner) + bias.to(inner)[:, None, None]
    summed = (residual.to(inner) + biased).to(features.dtype)
    return summed.contiguous(memory_format=format_of(features))
