"""Definition of add_layernorm in torch, and what computes it on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def add_layernorm_reference(
    residual: Tensor,
    addend: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The sum in its type, and its layer norm in float32 or wider, rounded once.

    Args:
        residual, addend, weight, bias, eps: As in `kernels.add_layernorm.add_layernorm`.
    """
    summed = residual if addend is None else (residual + addend).contiguous()
    inner = torch.promote_types(residual.dtype, torch.float32)
    weight, bias = (None if tensor is None else tensor.to(inner) for tensor in (weight, bias))
    normed = F.layer_norm(summed.to(inner), residual.shape[-1:], weight, bias, eps)
    return summed, normed.to(residual.dtype).contiguous()
