"""Definition of groupnorm_silu in torch, and what computes it on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.memory_format import format_of


def groupnorm_silu_reference(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    added: Tensor | None = None,
) -> Tensor:
    """silu(group_norm(x + added)) in float32 or wider, rounded once.

    Args:
        x, groups, weight, bias, eps, silu, added: As in `kernels.groupnorm_silu.groupnorm_silu`.
    """
    inner = torch.promote_types(x.dtype, torch.float32)
    summed = x.to(inner)
    if added is not None:
        summed = summed + added.to(inner)[:, :, None, None]
    y = F.group_norm(summed, groups, weight.to(inner), bias.to(inner), eps)
    if silu:
        F.silu(y, inplace=True)
    return y.to(x.dtype, memory_format=format_of(x))
