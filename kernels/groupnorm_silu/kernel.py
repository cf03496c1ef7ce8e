"""groupnorm_silu in Triton: statistics of chunks of pixels, then normalisation chunk by chunk."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.memory_format import format_of

# Values that a program holds at a time, 32 for each thread of its warps.
TILE = 8192
WARPS = 8
# The statistics join what their threads have seen: fewer threads, less to join.
STATISTICS_WARPS = 4
# Most channels side by side in a tile, unless a group alone has more, and how many a thread reads.
LANES = 256
VECTOR = 8
# Fewest channels side by side, where there are so many: 128 bytes of half precision, which memory
# brings together anyway.
FEWEST_LANES = 64
# Pixels that a program goes through at least, and in how many chunks an image is divided at most:
# a U-Net's features, and a decoder's large ones, of which few samples come at once.
CHUNK_PIXELS = 64
CHUNKS = 32
LARGE_PIXELS = 2**16
LARGE_CHUNKS = 128


@triton.jit
def _place(
    first: tl.tensor,
    stop: tl.tensor,
    n_channels: tl.tensor,
    channel_stride: tl.tensor,
    pixel_stride: tl.tensor,
    PIXELS: tl.constexpr,
    SPAN: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> Any:
    """Offsets of one tile within its sample, and what of it exists. [PIXELS, CHANNELS]"""
    pixel = first + tl.arange(0, PIXELS)[:, None]
    lane = tl.arange(0, CHANNELS)[None, :]
    channel = tl.program_id(1) * SPAN + lane
    inside = (pixel < stop) & (lane < SPAN) & (channel < n_channels)
    return pixel * pixel_stride + channel * channel_stride, inside


@triton.jit
def _members(
    n_channels: tl.tensor,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> Any:
    """Which channels of the span belong to which of its groups. [GROUPS, CHANNELS]"""
    lane = tl.arange(0, CHANNELS)[None, :]
    there = (lane < SPAN) & (tl.program_id(1) * SPAN + lane < n_channels)
    return (lane // GROUP == tl.arange(0, GROUPS)[:, None]) & there


@triton.jit
def _chunk_statistics(
    x: tl.tensor,
    added: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    n_channels: tl.tensor,
    x_channel: tl.tensor,
    x_pixel: tl.tensor,
    CHUNK: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> Any:
    """Mean and sum of squared distances from it, of each group over one chunk of a sample.

    Each lane of a tile of ROWS pixels keeps those of what passes through it, as Welford does: no
    thread waits for another before the last tile. Then lanes, and after them the channels of a
    group, are joined as Chan, Golub and LeVeque join samples. No large sums are subtracted.
    """
    # A thread of four warps keeps 16 lanes, and goes through at most eight tiles without a branch.
    ROWS: tl.constexpr = (PIXELS + 3) // 4
    STEP: tl.constexpr = 8 * ROWS if 8 * ROWS < CHUNK else CHUNK
    row = tl.arange(0, ROWS)[:, None]
    means = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    around = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    pixels = stop - start
    x += start * x_pixel
    for first in range(0, CHUNK, STEP):
        # Unrolled, so that several loads are on their way before the first is used.
        for part in tl.static_range(0, STEP, ROWS):
            offsets, inside = _place(
                first + part, pixels, n_channels, x_channel, x_pixel, ROWS, SPAN, CHANNELS
            )
            values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
            seen = (first + part) // ROWS + 1
            # The first value is its mean, exactly, however fast the division.
            share = tl.where(seen > 1, 1.0 / seen, 1.0)
            # A lane without a pixel keeps what it has.
            there = first + part + row < pixels
            apart = values - means
            means += apart * tl.where(there, share, 0.0)
            around += apart * apart * tl.where(there, 1.0 - share, 0.0)
    # What a lane has seen: at most one pixel less than another.
    number = ((pixels + ROWS - 1 - row) // ROWS).to(tl.float32)
    share = number / pixels
    mean = tl.sum(means * share, axis=0)
    # A mean far from zero is only as exact as its size allows: what it missed is made good.
    mean += tl.sum((means - mean[None, :]) * share, axis=0)
    apart = means - mean[None, :]
    squares = tl.sum(around + apart * apart * number, axis=0)
    if added is not None:
        lane = tl.arange(0, CHANNELS)
        channel = tl.program_id(1) * SPAN + lane
        known = (lane < SPAN) & (channel < n_channels)
        mean += tl.load(added + channel, mask=known, other=0.0).to(tl.float32)
    member = _members(n_channels, GROUP, SPAN, GROUPS, CHANNELS)
    of_group = tl.sum(tl.where(member, mean[None, :], 0.0), axis=1) / GROUP
    apart = mean[None, :] - of_group[:, None]
    of_group += tl.sum(tl.where(member, apart, 0.0), axis=1) / GROUP
    apart = mean[None, :] - of_group[:, None]
    within = squares[None, :] + apart * apart * pixels
    return of_group, tl.sum(tl.where(member, within, 0.0), axis=1)


@triton.jit
def _statistics(
    x: tl.tensor,  # [N, C, H * W], any strides
    added: tl.tensor,  # [N, C] or None
    means: tl.tensor,  # [N, chunks, groups]
    squares: tl.tensor,  # [N, chunks, groups]
    n_pixels: tl.tensor,
    n_channels: tl.tensor,
    x_sample: tl.tensor,
    x_channel: tl.tensor,
    x_pixel: tl.tensor,
    CHUNK: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """One chunk of some groups of one sample: chunks along 0, spans along 1, samples along 2."""
    sample = tl.program_id(2).to(tl.int64)
    if added is not None:
        added += sample * n_channels
    start = tl.program_id(0) * CHUNK
    mean, of_chunk = _chunk_statistics(
        x + sample * x_sample, added, start, tl.minimum(start + CHUNK, n_pixels), n_channels,
        x_channel, x_pixel, CHUNK, PIXELS, GROUP, SPAN, GROUPS, CHANNELS,
    )  # fmt: skip
    of_span = tl.arange(0, GROUPS)
    group = tl.program_id(1) * (SPAN // GROUP) + of_span
    n_groups = n_channels // GROUP
    known = (of_span < SPAN // GROUP) & (group < n_groups)
    place = (sample * tl.num_programs(0) + tl.program_id(0)) * n_groups + group
    tl.store(means + place, mean, mask=known)
    tl.store(squares + place, of_chunk, mask=known)


@triton.jit
def _normalise(
    x: tl.tensor,  # [N, C, H * W], any strides
    y: tl.tensor,  # [N, C, H * W], any strides
    weight: tl.tensor,  # [C]
    bias: tl.tensor,  # [C]
    added: tl.tensor,  # [N, C] or None
    means: tl.tensor,  # [N, chunks, groups]
    squares: tl.tensor,  # [N, chunks, groups]
    eps: tl.tensor,
    n_pixels: tl.tensor,
    n_channels: tl.tensor,
    x_sample: tl.tensor,
    x_channel: tl.tensor,
    x_pixel: tl.tensor,
    y_sample: tl.tensor,
    y_channel: tl.tensor,
    y_pixel: tl.tensor,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALONE: tl.constexpr,
    SILU: tl.constexpr,
) -> None:
    """The same grid; a chunk that is ALONE in its image needs no statistics from elsewhere."""
    # The last sample first: what the statistics read last is the likeliest to be in the cache.
    sample = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    x += sample * x_sample
    y += sample * y_sample
    if added is not None:
        added += sample * n_channels
    start = tl.program_id(0) * CHUNK
    stop = tl.minimum(start + CHUNK, n_pixels)
    if ALONE:
        mean, total = _chunk_statistics(
            x, added, start, stop, n_channels,
            x_channel, x_pixel, CHUNK, PIXELS, GROUP, SPAN, GROUPS, CHANNELS,
        )  # fmt: skip
    else:
        chunk = tl.arange(0, CHUNKS)[:, None]
        of_span = tl.arange(0, GROUPS)[None, :]
        group = tl.program_id(1) * (SPAN // GROUP) + of_span
        n_groups = n_channels // GROUP
        known = (of_span < SPAN // GROUP) & (group < n_groups)
        there = (chunk < tl.num_programs(0)) & known
        place = (sample * tl.num_programs(0) + chunk) * n_groups + group
        of_chunk = tl.load(means + place, mask=there, other=0.0)
        within = tl.load(squares + place, mask=there, other=0.0)
        pixels = tl.where(there, tl.minimum(n_pixels - chunk * CHUNK, CHUNK), 0).to(tl.float32)
        first_mean = tl.sum(tl.where(chunk == 0, of_chunk, 0.0), axis=0)
        steps = (of_chunk - first_mean[None, :]) * (pixels / n_pixels)
        mean = first_mean + tl.sum(steps, axis=0)
        apart = of_chunk - mean[None, :]
        total = tl.sum(within + apart * apart * (pixels * GROUP), axis=0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(total / (n_pixels * GROUP) + eps))
    member = _members(n_channels, GROUP, SPAN, GROUPS, CHANNELS)
    lane = tl.arange(0, CHANNELS)
    channel = tl.program_id(1) * SPAN + lane
    known = (lane < SPAN) & (channel < n_channels)
    factor = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    factor *= tl.sum(tl.where(member, scale[:, None], 0.0), axis=0)
    shift = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    middle = tl.sum(tl.where(member, mean[:, None], 0.0), axis=0)
    if added is not None:
        middle -= tl.load(added + channel, mask=known, other=0.0).to(tl.float32)
    for first in range(start, stop, PIXELS):
        offsets, inside = _place(
            first, stop, n_channels, x_channel, x_pixel, PIXELS, SPAN, CHANNELS
        )
        values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        normed = (values - middle[None, :]) * factor[None, :] + shift[None, :]
        if SILU:
            # Bounded where exp would overflow; what is divided by it is nothing long before.
            normed = normed / (1.0 + tl.exp(tl.minimum(-normed, 88.0)))
        offsets, inside = _place(
            first, stop, n_channels, y_channel, y_pixel, PIXELS, SPAN, CHANNELS
        )
        tl.store(y + offsets, normed.to(y.dtype.element_ty), mask=inside)


@functools.cache
def tiling(channels: int, groups: int, n_pixels: int) -> dict[str, int]:
    """Sizes of chunks and tiles, which depend on one sample's shape alone.

    A span is the channels side by side of a tile: whole groups, and beginning where a thread can
    read its channels at once. Of those that are wide enough the one that leaves the fewest lanes
    idle is taken.
    """
    group = channels // groups
    unit = math.lcm(group, VECTOR)
    unit = unit if unit <= LANES else group
    widest = max(unit, LANES)
    fewest = min(channels, FEWEST_LANES, widest)
    spans = [span for span in range(unit, widest + 1, unit) if span >= fewest]

    def lanes(span: int) -> int:
        return triton.cdiv(channels, span) * triton.next_power_of_2(span)

    span = min(spans, key=lanes)
    block = triton.next_power_of_2(span)
    most = CHUNKS if n_pixels < LARGE_PIXELS else LARGE_CHUNKS
    chunk = max(CHUNK_PIXELS, triton.next_power_of_2(triton.cdiv(n_pixels, most)))
    return {
        "CHUNK": chunk,
        "PIXELS": min(max(1, TILE // block), chunk),
        "GROUP": group,
        "SPAN": span,
        "GROUPS": triton.next_power_of_2(span // group),
        "CHANNELS": block,
    }


def groupnorm_silu_kernel(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    added: Tensor | None,
) -> Tensor:
    """One launch where an image is one chunk of pixels, else two.

    Features whose pixels are not evenly spaced are copied first.

    Args:
        x, groups, weight, bias, eps, silu, added: As in `kernels.groupnorm_silu.groupnorm_silu`,
            which has checked them.
    """
    samples, channels, height, width = x.shape
    n_pixels = height * width
    y = torch.empty_like(x, memory_format=format_of(x))
    pixels, outcome = x.flatten(2), y.flatten(2)
    weight, bias = weight.contiguous(), bias.contiguous()
    added = None if added is None else added.contiguous()
    tile = tiling(channels, groups, n_pixels)
    chunks = triton.cdiv(n_pixels, tile["CHUNK"])
    statistics = torch.empty(2, samples, chunks, groups, dtype=torch.float32, device=x.device)
    grid = (chunks, triton.cdiv(channels, tile["SPAN"]), samples)
    gather: Any = _statistics[grid]
    normalise: Any = _normalise[grid]
    with torch.cuda.device(x.device) if x.is_cuda else torch.no_grad():
        if chunks > 1:
            gather(
                pixels,
                added,
                *statistics,
                n_pixels,
                channels,
                *pixels.stride(),
                num_warps=STATISTICS_WARPS,
                **tile,
            )
        normalise(
            pixels,
            outcome,
            weight,
            bias,
            added,
            *statistics,
            float(eps),
            n_pixels,
            channels,
            *pixels.stride(),
            *outcome.stride(),
            CHUNKS=triton.next_power_of_2(chunks),
            ALONE=chunks == 1,
            SILU=silu,
            num_warps=WARPS,
            **tile,
        )
    return y
