"""add_residual in Triton: values in the order of memory, each read and written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.memory_format import format_of

# Values of one program: two times 16 bytes of half precision for each thread of its warps.
TILE = 4096
WARPS = 8


@triton.jit
def _add_residual(
    residual: tl.tensor,  # [N, n_values], in the order of y
    features: tl.tensor,  # [N, n_values], in the order of y
    bias: tl.tensor,  # [n_channels]
    y: tl.tensor,  # [N, n_values]
    n_values: tl.tensor,
    n_channels: tl.tensor,
    spread: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """One tile of a sample, whose channels lie spread apart: tiles along 0, samples along 1."""
    sample = tl.program_id(1).to(tl.int64) * n_values
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = place < n_values
    channel = place // spread % n_channels
    addend = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    addend += tl.load(features + sample + place, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(residual + sample + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + sample + place, (values + addend).to(y.dtype.element_ty), mask=inside)


def add_residual_kernel(residual: Tensor, features: Tensor, bias: Tensor) -> Tensor:
    """One launch; what does not lie in memory as the outcome does is copied first.

    Args:
        residual, features, bias: As in `kernels.add_residual.add_residual`, which has checked them.
    """
    memory_format = format_of(features)
    y = torch.empty_like(features, memory_format=memory_format)
    samples, channels, height, width = y.shape
    n_values = channels * height * width
    launch: Any = _add_residual[(triton.cdiv(n_values, TILE), samples)]
    with torch.cuda.device(y.device) if y.is_cuda else torch.no_grad():
        launch(
            residual.contiguous(memory_format=memory_format),
            features.contiguous(memory_format=memory_format),
            bias.contiguous(),
            y,
            n_values,
            channels,
            y.stride(1),
            TILE=TILE,
            num_warps=WARPS,
        )
    return y
