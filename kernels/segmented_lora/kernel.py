"""segmented_lora in Triton: one launch shrinks, one expands, each over all samples.

Two launches, since the two want different grids. A program that shrinks goes through the whole
depth, so that no sum is split, and there is one for each block of tokens; a program that expands
writes one tile, and there are many more of them. In one launch, either few programs would do all
the writing, or each would shrink anew. What passes between them is rank values a token in float32,
a few percent of what is read and written anyway.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# tl.dot takes no fewer than 16 along any dimension; smaller ranks are padded with zeros.
SMALLEST_BLOCK = 16
BLOCK_TOKENS = 64
BLOCK_COLUMNS = 128

_DOTS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _shrink(
    x: tl.tensor,  # [N, in, H, W], any strides
    lora_A: tl.tensor,  # [L, R, in * KH * KW], any strides
    slots: tl.tensor,  # [N]
    down: tl.tensor,  # [N, T, RANK]
    n_slots: tl.tensor,
    n_tokens: tl.tensor,
    n_channels: tl.tensor,
    rank: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    out_width: tl.tensor,
    stride_y: tl.tensor,
    stride_x: tl.tensor,
    padding_y: tl.tensor,
    padding_x: tl.tensor,
    x_sample: tl.tensor,
    x_channel: tl.tensor,
    x_row: tl.tensor,
    x_pixel: tl.tensor,
    a_slot: tl.tensor,
    a_rank: tl.tensor,
    a_depth: tl.tensor,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    RANK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One block of tokens of one sample, over the whole depth: blocks along 0, samples along 1."""
    sample = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + sample).to(tl.int64)
    if (slot >= 0) & (slot < n_slots):
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        y = (token // out_width) * stride_y - padding_y
        across = (token % out_width) * stride_x - padding_x
        r = tl.arange(0, RANK)
        blocks = tl.cdiv(n_channels, CHANNELS)
        total = tl.zeros((TOKENS, RANK), dtype=tl.float32)
        # One loop over taps and channels, so that loads of the next tap overlap with this one.
        for k in range(KH * KW * blocks):
            tap = k // blocks
            tap_y = y + tap // KW
            tap_x = across + tap % KW
            channel = (k % blocks) * CHANNELS + tl.arange(0, CHANNELS)
            seen = (token < n_tokens) & (tap_y >= 0) & (tap_y < height)
            seen = seen & (tap_x >= 0) & (tap_x < width)
            pixels = tl.load(
                x
                + sample * x_sample
                + (tap_y * x_row + tap_x * x_pixel)[:, None]
                + channel[None, :] * x_channel,
                mask=seen[:, None] & (channel[None, :] < n_channels),
                other=0.0,
            )
            filters = tl.load(
                lora_A
                + slot * a_slot
                + (channel * (KH * KW) + tap)[:, None] * a_depth
                + r[None, :] * a_rank,
                mask=(channel[:, None] < n_channels) & (r[None, :] < rank),
                other=0.0,
            )
            total = tl.dot(pixels.to(DOT), filters.to(DOT), total, input_precision=PRECISION)
        tl.store(
            down + (sample * n_tokens + token[:, None]) * RANK + r[None, :],
            total,
            mask=token[:, None] < n_tokens,
        )


@triton.jit
def _expand(
    out: tl.tensor,  # [N, T, out], any strides
    down: tl.tensor,  # [N, T, RANK]
    lora_B: tl.tensor,  # [L, out, R], any strides
    slots: tl.tensor,  # [N]
    scales: tl.tensor,  # [L]
    n_slots: tl.tensor,
    n_tokens: tl.tensor,
    n_columns: tl.tensor,
    rank: tl.tensor,
    out_sample: tl.tensor,
    out_token: tl.tensor,
    out_column: tl.tensor,
    b_slot: tl.tensor,
    b_column: tl.tensor,
    b_rank: tl.tensor,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of one sample of out: tiles along axis 0, samples along axis 1."""
    sample = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + sample).to(tl.int64)
    if slot != -1:
        known = (slot >= 0) & (slot < n_slots)
        slot = tl.where(known, slot, 0)
        # The term of a slot that does not exist is not a number, never another scene's.
        scale = tl.where(known, tl.load(scales + slot), float("nan"))
        tiles_across = tl.cdiv(n_columns, COLUMNS)
        token = (tl.program_id(0) // tiles_across) * TOKENS + tl.arange(0, TOKENS)
        column = (tl.program_id(0) % tiles_across) * COLUMNS + tl.arange(0, COLUMNS)
        r = tl.arange(0, RANK)
        left = tl.load(
            down + (sample * n_tokens + token[:, None]) * RANK + r[None, :],
            mask=token[:, None] < n_tokens,
            other=0.0,
        )
        right = tl.load(
            lora_B + slot * b_slot + column[None, :] * b_column + r[:, None] * b_rank,
            mask=(column[None, :] < n_columns) & (r[:, None] < rank),
            other=0.0,
        )
        term = scale * tl.dot(left, right.to(tl.float32), input_precision=PRECISION)
        here = (
            out
            + sample * out_sample
            + token[:, None].to(tl.int64) * out_token
            + column[None, :] * out_column
        )
        inside = (token[:, None] < n_tokens) & (column[None, :] < n_columns)
        before = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        tl.store(here, (before + term).to(out.dtype.element_ty), mask=inside)


def segmented_lora_kernel_(
    out: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, slots: Tensor, scales: Tensor
) -> None:
    """Two launches, by a convolution of one tap over tokens that stand in one column.

    Args:
        out, x, lora_A, lora_B, slots, scales: As in `kernels.segmented_lora.segmented_lora_`,
            which has checked them.
    """
    column = x.transpose(1, 2)[..., None]
    geometry = ((1, 1), (1, 1), (0, 0))
    _launch(out, column, lora_A, lora_B, slots, scales, *geometry, out_width=1)


def segmented_conv_lora_kernel_(
    out: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    slots: Tensor,
    scales: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> None:
    """Two launches; neither x nor out is copied, whatever their memory format.

    Args:
        out, x, lora_A, lora_B, slots, scales, kernel_size, stride, padding: As in
            `kernels.segmented_lora.segmented_conv_lora_`, which has checked them.
    """
    tokens = out.view(*out.shape[:2], -1).transpose(1, 2)
    geometry = (kernel_size, stride, padding)
    _launch(tokens, x, lora_A, lora_B, slots, scales, *geometry, out_width=out.shape[3])


def _launch(
    out: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    slots: Tensor,
    scales: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    *,
    out_width: int,
) -> None:
    """Shrink x [N, in, H, W] into float32 memory of its own, then expand into out [N, T, out].

    Tile sizes depend on the layer only and never on N, nor does the order of a sum: that is what
    keeps a sample's bits apart from its batch.
    """
    samples, tokens, columns = out.shape
    n_slots, rank = lora_A.shape[:2]
    block_rank = max(SMALLEST_BLOCK, triton.next_power_of_2(rank))
    half = torch.float32 not in (x.dtype, lora_A.dtype)
    alike = half and x.dtype == lora_A.dtype
    # Both half types are exact in tf32; float32 is not, so its products are taken in full.
    precision = "tf32" if half else "ieee"
    block_tokens = min(BLOCK_TOKENS, max(SMALLEST_BLOCK, triton.next_power_of_2(tokens) // 4))
    block_columns = min(BLOCK_COLUMNS, max(SMALLEST_BLOCK, triton.next_power_of_2(columns)))
    block_channels = max(SMALLEST_BLOCK, min(64 if half else 32, 4096 // block_rank))
    slots, scales = slots.contiguous(), scales.contiguous()
    down = torch.empty(samples, tokens, block_rank, dtype=torch.float32, device=out.device)
    shrink: Any = _shrink[(triton.cdiv(tokens, block_tokens), samples)]
    tiles = triton.cdiv(tokens, block_tokens) * triton.cdiv(columns, block_columns)
    expand: Any = _expand[(tiles, samples)]
    with torch.cuda.device(out.device) if out.is_cuda else torch.no_grad():
        shrink(
            x,
            lora_A,
            slots,
            down,
            n_slots,
            tokens,
            x.shape[1],
            rank,
            x.shape[2],
            x.shape[3],
            out_width,
            *stride,
            *padding,
            *x.stride(),
            *lora_A.stride(),
            KH=kernel_size[0],
            KW=kernel_size[1],
            TOKENS=block_tokens,
            CHANNELS=block_channels,
            RANK=block_rank,
            DOT=_DOTS[x.dtype] if alike else tl.float32,
            PRECISION=precision,
            num_stages=3,
        )
        expand(
            out,
            down,
            lora_B,
            slots,
            scales,
            n_slots,
            tokens,
            columns,
            rank,
            *out.stride(),
            *lora_B.stride(),
            TOKENS=block_tokens,
            COLUMNS=block_columns,
            RANK=block_rank,
            PRECISION=precision,
        )
