"""groupnorm_silu in Triton: statistics of chunks of pixels, then normalisation chunk by chunk."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.groupnorm_silu.reference import format_of

# Values that a program holds at a time, and pixels that it goes through.
TILE = 4096
LANES = 128
CHUNK_PIXELS = 256


@triton.jit
def _place(
    start: tl.tensor,
    stop: tl.tensor,
    width: tl.tensor,
    group_channels: tl.tensor,
    n_groups: tl.tensor,
    sample_stride: tl.tensor,
    channel_stride: tl.tensor,
    row_stride: tl.tensor,
    pixel_stride: tl.tensor,
    PIXELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> Any:
    """Offsets of one tile and what of it exists, pixels by groups by channels of a group."""
    pixel = start + tl.arange(0, PIXELS)[:, None, None]
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    channel = tl.arange(0, CHANNELS)[None, None, :]
    inside = (pixel < stop) & (group < n_groups) & (channel < group_channels)
    offsets = (
        tl.program_id(2).to(tl.int64) * sample_stride
        + (pixel // width) * row_stride
        + (pixel % width) * pixel_stride
        + (group * group_channels + channel) * channel_stride
    )
    return offsets, inside


@triton.jit
def _chunk_statistics(
    x: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    width: tl.tensor,
    group_channels: tl.tensor,
    n_groups: tl.tensor,
    x_sample: tl.tensor,
    x_channel: tl.tensor,
    x_row: tl.tensor,
    x_pixel: tl.tensor,
    PIXELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> Any:
    """Mean and sum of squared distances from it, of each group over one chunk of pixels.

    Tiles are joined as Chan, Golub and LeVeque join samples: no large sums are subtracted.
    """
    mean = tl.zeros((GROUPS,), dtype=tl.float32)
    squares = tl.zeros((GROUPS,), dtype=tl.float32)
    for first in range(start, stop, PIXELS):
        offsets, inside = _place(
            first, stop, width, group_channels, n_groups,
            x_sample, x_channel, x_row, x_pixel, PIXELS, GROUPS, CHANNELS,
        )  # fmt: skip
        values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        before = ((first - start) * group_channels).to(tl.float32)
        number = (tl.minimum(stop - first, PIXELS) * group_channels).to(tl.float32)
        of_tile = tl.sum(tl.sum(values, axis=2), axis=0) / number
        # Once more around the first mean, which far from zero is only as exact as its size allows.
        apart = tl.where(inside, values - of_tile[None, :, None], 0.0)
        of_tile += tl.sum(tl.sum(apart, axis=2), axis=0) / number
        apart = tl.where(inside, values - of_tile[None, :, None], 0.0)
        step = of_tile - mean
        share = number / (before + number)
        mean += step * share
        squares += tl.sum(tl.sum(apart * apart, axis=2), axis=0) + step * step * before * share
    return mean, squares


@triton.jit
def _statistics(
    x: tl.tensor,  # [N, C, H, W], any strides
    means: tl.tensor,  # [N, groups, chunks]
    squares: tl.tensor,  # [N, groups, chunks]
    n_pixels: tl.tensor,
    width: tl.tensor,
    group_channels: tl.tensor,
    n_groups: tl.tensor,
    x_sample: tl.tensor,
    x_channel: tl.tensor,
    x_row: tl.tensor,
    x_pixel: tl.tensor,
    CHUNK: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """One chunk of some groups of one sample: chunks along 0, groups along 1, samples along 2."""
    start = tl.program_id(0) * CHUNK
    mean, of_chunk = _chunk_statistics(
        x, start, tl.minimum(start + CHUNK, n_pixels), width, group_channels, n_groups,
        x_sample, x_channel, x_row, x_pixel, PIXELS, GROUPS, CHANNELS,
    )  # fmt: skip
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    place = (tl.program_id(2) * n_groups + group) * tl.num_programs(0) + tl.program_id(0)
    tl.store(means + place, mean, mask=group < n_groups)
    tl.store(squares + place, of_chunk, mask=group < n_groups)


@triton.jit
def _normalise(
    x: tl.tensor,  # [N, C, H, W], any strides
    y: tl.tensor,  # [N, C, H, W], any strides
    weight: tl.tensor,  # [C]
    bias: tl.tensor,  # [C]
    means: tl.tensor,  # [N, groups, chunks]
    squares: tl.tensor,  # [N, groups, chunks]
    eps: tl.tensor,
    n_pixels: tl.tensor,
    width: tl.tensor,
    group_channels: tl.tensor,
    n_groups: tl.tensor,
    x_sample: tl.tensor,
    x_channel: tl.tensor,
    x_row: tl.tensor,
    x_pixel: tl.tensor,
    y_sample: tl.tensor,
    y_channel: tl.tensor,
    y_row: tl.tensor,
    y_pixel: tl.tensor,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALONE: tl.constexpr,
    SILU: tl.constexpr,
) -> None:
    """The same grid; a chunk that is ALONE in its image needs no statistics from elsewhere."""
    start = tl.program_id(0) * CHUNK
    stop = tl.minimum(start + CHUNK, n_pixels)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    if ALONE:
        mean, total = _chunk_statistics(
            x, start, stop, width, group_channels, n_groups,
            x_sample, x_channel, x_row, x_pixel, PIXELS, GROUPS, CHANNELS,
        )  # fmt: skip
    else:
        chunk = tl.arange(0, CHUNKS)[None, :]
        there = (group[:, None] < n_groups) & (chunk < tl.num_programs(0))
        place = (tl.program_id(2) * n_groups + group[:, None]) * tl.num_programs(0) + chunk
        of_chunk = tl.load(means + place, mask=there, other=0.0)
        pixels = tl.minimum(n_pixels - chunk * CHUNK, CHUNK)
        number = tl.where(there, pixels * group_channels, 0).to(tl.float32)
        share = number / (n_pixels * group_channels)
        first_mean = tl.sum(tl.where(chunk == 0, of_chunk, 0.0), axis=1)
        mean = first_mean + tl.sum((of_chunk - first_mean[:, None]) * share, axis=1)
        apart = of_chunk - mean[:, None]
        within = tl.load(squares + place, mask=there, other=0.0)
        total = tl.sum(within + apart * apart * number, axis=1)
    scale = 1.0 / tl.sqrt(total / (n_pixels * group_channels) + eps)
    channel = tl.arange(0, CHANNELS)[None, :]
    parameter = group[:, None] * group_channels + channel
    known = (group[:, None] < n_groups) & (channel < group_channels)
    factor = tl.load(weight + parameter, mask=known, other=0.0).to(tl.float32) * scale[:, None]
    added = tl.load(bias + parameter, mask=known, other=0.0).to(tl.float32)
    for first in range(start, stop, PIXELS):
        offsets, inside = _place(
            first, stop, width, group_channels, n_groups,
            x_sample, x_channel, x_row, x_pixel, PIXELS, GROUPS, CHANNELS,
        )  # fmt: skip
        values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        normed = (values - mean[None, :, None]) * factor[None, :, :] + added[None, :, :]
        if SILU:
            # Bounded where exp would overflow; what is divided by it is nothing long before.
            normed = normed / (1.0 + tl.exp(tl.minimum(-normed, 88.0)))
        offsets, inside = _place(
            first, stop, width, group_channels, n_groups,
            y_sample, y_channel, y_row, y_pixel, PIXELS, GROUPS, CHANNELS,
        )  # fmt: skip
        tl.store(y + offsets, normed.to(y.dtype.element_ty), mask=inside)


def groupnorm_silu_kernel(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    """One launch where an image is one chunk of pixels, else two.

    Args:
        x, groups, weight, bias, eps, silu: As in `kernels.groupnorm_silu.groupnorm_silu`, which
            has checked them.
    """
    samples, channels, height, width = x.shape
    y = torch.empty_like(x, memory_format=format_of(x))
    weight, bias = weight.contiguous(), bias.contiguous()
    group_channels = channels // groups
    block_channels = triton.next_power_of_2(group_channels)
    block_groups = min(triton.next_power_of_2(groups), max(1, LANES // block_channels))
    pixels = min(
        max(1, TILE // (block_groups * block_channels)), triton.next_power_of_2(height * width)
    )
    chunks = triton.cdiv(height * width, CHUNK_PIXELS)
    statistics = torch.empty(2, samples, groups, chunks, dtype=torch.float32, device=x.device)
    grid = (chunks, triton.cdiv(groups, block_groups), samples)
    sizes = (height * width, width, group_channels, groups)
    tile = {
        "CHUNK": CHUNK_PIXELS,
        "PIXELS": pixels,
        "GROUPS": block_groups,
        "CHANNELS": block_channels,
    }
    gather: Any = _statistics[grid]
    normalise: Any = _normalise[grid]
    with torch.cuda.device(x.device) if x.is_cuda else torch.no_grad():
        if chunks > 1:
            gather(x, *statistics, *sizes, *x.stride(), **tile)
        normalise(
            x,
            y,
            weight,
            bias,
            *statistics,
            float(eps),
            *sizes,
            *x.stride(),
            *y.stride(),
            CHUNKS=triton.next_power_of_2(chunks),
            ALONE=chunks == 1,
            SILU=silu,
            **tile,
        )
    return y
