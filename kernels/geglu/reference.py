"""Definition of geglu in torch, and what computes it on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def geglu_reference(x: Tensor) -> Tensor:
    """features * gelu(gates) in float32 or wider, rounded once.

    Args:
        x: As in `kernels.geglu.geglu`.
    """
    features, gates = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return (features * F.gelu(gates)).to(x.dtype).contiguous()
