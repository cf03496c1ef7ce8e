"""Definition of groupnorm_silu in torch, and what computes it on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.memory_format import format_of

# From so many on torch sums the pixels of channels-last features by threads, over sample bounds.
SHARED_PIXELS = 1024


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

    A sample's bits do not depend on its neighbours, nor on whether one thread computes or two.

    Args:
        x, groups, weight, bias, eps, silu, added: As in `kernels.groupnorm_silu.groupnorm_silu`.
    """
    inner = torch.promote_types(x.dtype, torch.float32)
    summed = x.to(inner)
    if added is not None:
        summed = summed + added.to(inner)[:, :, None, None]
    if summed.shape[2] * summed.shape[3] >= SHARED_PIXELS:
        summed = summed.contiguous()
    y = F.group_norm(summed, groups, weight.to(inner), bias.to(inner), eps)
    if silu:
        F.silu(y, inplace=True)
    return y.to(x.dtype, memory_format=format_of(x))
