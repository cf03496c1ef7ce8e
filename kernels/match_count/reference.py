"""Definition of match_count in torch, which materialises the matrix of all pairs of cells."""

from __future__ import annotations

import torch
from torch import Tensor


def match_count_reference(
    tokens0: Tensor, tokens1: Tensor, scale: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Matches as `kernels.match_count.match_count` defines them, in float32 or wider.

    Args:
        tokens0, tokens1, scale, threshold: As there; the threshold is at least 0.
    """
    inner = torch.promote_types(tokens0.dtype, torch.float32)
    logits = scale * (tokens0.to(inner) @ tokens1.to(inner).transpose(1, 2))  # [N, L, S]
    log_confidence = 2 * logits - logits.logsumexp(1, keepdim=True)
    log_confidence -= logits.logsumexp(2, keepdim=True)
    best, partner = log_confidence.max(2)
    mutual = log_confidence.amax(1).gather(1, partner) == best
    confidence = best.exp()
    return torch.where(mutual & (confidence > threshold), confidence, 0.0), partner
