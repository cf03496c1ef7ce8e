"""Dual-softmax mutual nearest neighbours, without the matrix of all pairs of cells."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.launch import kernels_run_on
from kernels.match_count.tiles import match_count_tiled

__all__ = ["match_count"]

KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def match_count(
    tokens0: Tensor, tokens1: Tensor, *, scale: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Match cells of image 0 with cells of image 1, many image pairs at once.

    With ``logits = scale * tokens0 @ tokens1.T``, the confidence of a pair of cells is its softmax
    over columns times its softmax over rows. A row's partner is the first column in which its
    confidence is largest. The row is matched when that confidence exceeds the threshold and is the
    largest of its column too; rows that tie exactly in one column are therefore all matched.

    Memory grows with L + S for each pair of images, and a tile.

    Args:
        tokens0: Cells of images 0, floating. [N, L, C]
        tokens1: Cells of images 1, of the same type. [N, S, C]
        scale: What the products are multiplied with.
        threshold: Confidence that a match must exceed; below 0 it counts as 0.

    Returns:
        Confidence, 0 where a row has no match, at least float32 [N, L], and partner, int64, which
        says nothing where a row has none [N, L].

    Raises:
        ValueError: Shapes, types or devices do not fit, or a number is not finite.

    Source: LoFTR, arXiv:2104.00680, section 3.3.
    """
    _check(tokens0, tokens1, scale, threshold)
    threshold = max(threshold, 0.0)
    with torch.no_grad():
        if kernels_run_on(tokens0.device) and tokens0.dtype in KERNEL_TYPES:
            from kernels.match_count.kernel import match_count_kernel

            return match_count_kernel(tokens0, tokens1, scale, threshold)
        return match_count_tiled(tokens0, tokens1, scale, threshold)


def _check(tokens0: Tensor, tokens1: Tensor, scale: float, threshold: float) -> None:
    for name, tokens in (("tokens0", tokens0), ("tokens1", tokens1)):
        if tokens.dim() != 3 or not tokens.is_floating_point() or 0 in tokens.shape[1:]:
            raise ValueError(
                f"{name} is {tokens.dtype} of shape {tuple(tokens.shape)}; pass floating "
                "[N, cells, C] with at least one cell and one channel"
            )
    if tokens0.shape[::2] != tokens1.shape[::2]:
        raise ValueError(
            f"tokens0 {tuple(tokens0.shape)} and tokens1 {tuple(tokens1.shape)} do not fit; pass "
            "as many images of as many channels"
        )
    if tokens0.dtype != tokens1.dtype or tokens0.device != tokens1.device:
        raise ValueError(
            f"tokens0 is {tokens0.dtype} on {tokens0.device}, tokens1 {tokens1.dtype} on "
            f"{tokens1.device}; use one type and one device"
        )
    if not (math.isfinite(scale) and math.isfinite(threshold)):
        raise ValueError(f"scale is {scale} and threshold {threshold}; pass finite numbers")
