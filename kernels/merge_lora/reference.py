"""Definition of merge_lora in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_lora_reference_(
    outs: Sequence[Tensor],
    pristines: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scale: float,
) -> None:
    """out = pristine + scale * lora_B @ lora_A, in float32 or wider, rounded once.

    Args:
        outs, pristines, lora_As, lora_Bs, scale: As in `kernels.merge_lora.merge_lora_`.
    """
    for out, pristine, lora_A, lora_B in zip(outs, pristines, lora_As, lora_Bs, strict=True):
        inner = torch.promote_types(out.dtype, torch.float32)
        lora_A, lora_B = lora_A.to(inner), lora_B.to(inner)
        if out.dtype == inner:
            # The product is added while it is computed, without a temporary of the weight's size.
            torch.addmm(pristine, lora_B, lora_A, alpha=scale, out=out)
        else:
            out.copy_(torch.addmm(pristine.to(inner), lora_B, lora_A, alpha=scale))
