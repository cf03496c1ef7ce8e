"""A whole linear layer with low-rank terms in Triton: one launch, each value of out written once.

A tile belongs to one sample, and so to one adapter. Its program goes through the depth once and
sums two products of the same x: with the weight, and with lora_A, which is RANK columns more. What
the second gives is multiplied by lora_B when the depth is done. Every tile of a row shrinks anew;
that costs RANK columns beside those of the tile, while nothing but the layer's own operands and the
factors is read, and nothing passes through memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.segmented_lora.kernel import SMALLEST_BLOCK


@dataclass(frozen=True)
class Tile:
    """What one program writes, and how it goes about it.

    Attributes:
        tokens: Rows; a power of two.
        columns: A power of two.
        tail: Columns beside them, a power of two or 0: SD2's layers have a multiple of 320, of
            which powers of two alone waste up to a third.
        depth: Values of a row that are multiplied at once.
        warps: Of a program.
        stages: Blocks of the depth that are in shared memory or on their way.
    """

    tokens: int
    columns: int
    tail: int
    depth: int
    warps: int
    stages: int

    def shared_bytes(self, rank: int, multiprocessor: Multiprocessor) -> int:
        """What a program takes of shared memory, in half precision.

        Args:
            rank: As the kernel pads it.
        """
        stages = self.stages if multiprocessor.asynchronous else self.stages - 1
        return 2 * stages * self.depth * (self.tokens + self.columns + self.tail + rank)


@dataclass(frozen=True)
class Multiprocessor:
    """What a tile has to fit.

    Attributes:
        shared_bytes: Of shared memory that one program may have.
        asynchronous: Whether products read it by themselves, so that Triton keeps each block there
            until they are through with it: Hopper, and the Blackwell of data centres.
    """

    shared_bytes: int
    asynchronous: bool

    @staticmethod
    @functools.cache
    def of(device: int) -> Multiprocessor:
        """Of a CUDA device, by its number."""
        properties = triton.runtime.driver.active.utils.get_device_properties(device)
        major, _ = torch.cuda.get_device_capability(device)
        return Multiprocessor(properties["max_shared_mem"], asynchronous=major not in (8, 12))


# From so many tokens a sample on. 128 by 320 fills one multiprocessor of a Hopper: 168 sums among
# the 255 registers of a thread, 174 of 227 KiB of shared memory. Sixteen samples are 512, 256 and
# 128 such tiles in SD2's three larger sizes, for 132 multiprocessors. Fewer tokens are too few for
# them: several smaller tiles share a multiprocessor. So they do where the large one does not fit:
# GPUs that are not made for data centres have 99 KiB.
TILES = {
    128: Tile(128, 256, 64, 64, warps=8, stages=3),
    1: Tile(64, 64, 0, 64, warps=4, stages=4),
}
# For the interpreter, which alone sends float32 here.
FLOAT32_TILE = Tile(32, 32, 16, 32, warps=4, stages=2)


@triton.jit
def _finish(
    total: tl.tensor,  # [TOKENS, COLUMNS]
    down: tl.tensor,  # [TOKENS, RANK]
    out: tl.tensor,  # [T, out], contiguous
    bias: tl.tensor,  # [out], or None
    lora_B: tl.tensor,  # [out, R], any strides
    known: tl.tensor,
    token: tl.tensor,
    first: tl.tensor,
    n_tokens: tl.tensor,
    n_columns: tl.tensor,
    rank: tl.tensor,
    b_column: tl.tensor,
    b_rank: tl.tensor,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Add the term and the bias to some columns of a tile, and write them."""
    column = first + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    seen = column < n_columns
    right = tl.load(
        lora_B + column[None, :] * b_column + r[:, None] * b_rank,
        mask=seen[None, :] & (r[:, None] < rank) & known,
        other=0.0,
    )
    total = tl.dot(down, right.to(tl.float32), total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + column, mask=seen, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + token[:, None] * n_columns + column[None, :],
        total.to(out.dtype.element_ty),
        mask=(token[:, None] < n_tokens) & seen[None, :],
    )


@triton.jit
def _linear(
    out: tl.tensor,  # [N, T, out], contiguous
    x: tl.tensor,  # [N, T, in], any strides
    weight: tl.tensor,  # [out, in], any strides
    bias: tl.tensor,  # [out], or None
    lora_A: tl.tensor,  # [L, R, in], any strides
    lora_B: tl.tensor,  # [L, out, R], any strides
    slots: tl.tensor,  # [N]
    scales: tl.tensor,  # [L]
    n_slots: tl.tensor,
    n_tokens: tl.tensor,
    n_columns: tl.tensor,
    depth: tl.tensor,
    rank: tl.tensor,
    x_sample: tl.tensor,
    x_token: tl.tensor,
    x_depth: tl.tensor,
    w_column: tl.tensor,
    w_depth: tl.tensor,
    a_slot: tl.tensor,
    a_rank: tl.tensor,
    a_depth: tl.tensor,
    b_slot: tl.tensor,
    b_column: tl.tensor,
    b_rank: tl.tensor,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAIL: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of one sample: tiles along 0, those of the same tokens together; samples along 1."""
    sample = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + sample).to(tl.int64)
    known = (slot >= 0) & (slot < n_slots)
    place = tl.where(known, slot, 0)
    # The term of a slot that does not exist is not a number, never another scene's.
    scale = tl.where(known, tl.load(scales + place), float("nan"))
    tiles_across = tl.cdiv(n_columns, COLUMNS + TAIL)
    token = (tl.program_id(0) // tiles_across) * TOKENS + tl.arange(0, TOKENS)
    first = (tl.program_id(0) % tiles_across) * (COLUMNS + TAIL)

    # Rows and columns beyond the last are read as the last, and never written.
    k = tl.arange(0, DEPTH)
    x_place = tl.minimum(token, n_tokens - 1)[:, None] * x_token + k[None, :] * x_depth
    column = tl.minimum(first + tl.arange(0, COLUMNS), n_columns - 1)
    w_place = column[None, :] * w_column + k[:, None] * w_depth
    r = tl.minimum(tl.arange(0, RANK), rank - 1)
    a_place = r[None, :] * a_rank + k[:, None] * a_depth
    x += sample * x_sample
    lora_A += place * a_slot
    lora_B += place * b_slot
    out += sample * n_tokens * n_columns

    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    down = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    if TAIL > 0:
        beside = tl.minimum(first + COLUMNS + tl.arange(0, TAIL), n_columns - 1)
        tail_place = beside[None, :] * w_column + k[:, None] * w_depth
        tail = tl.zeros((TOKENS, TAIL), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        if EVEN:
            left = tl.load(x + x_place)
            right = tl.load(weight + w_place)
            filters = tl.load(lora_A + a_place)
        else:
            inside = start + k < depth
            left = tl.load(x + x_place, mask=inside[None, :], other=0.0)
            right = tl.load(weight + w_place, mask=inside[:, None], other=0.0)
            filters = tl.load(lora_A + a_place, mask=inside[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        if TAIL > 0:
            if EVEN:
                more = tl.load(weight + tail_place)
            else:
                more = tl.load(weight + tail_place, mask=inside[:, None], other=0.0)
            tail = tl.dot(left, more, tail, input_precision=PRECISION)
        down = tl.dot(left, filters, down, input_precision=PRECISION)
        x += DEPTH * x_depth
        weight += DEPTH * w_depth
        lora_A += DEPTH * a_depth

    # Where there is no adapter, whatever the slot read in its place has given is left out.
    down = tl.where(slot == -1, 0.0, down * scale)
    _finish(
        total, down, out, bias, lora_B, known, token, first, n_tokens, n_columns, rank,
        b_column, b_rank, COLUMNS, RANK, PRECISION,
    )  # fmt: skip
    if TAIL > 0:
        _finish(
            tail, down, out, bias, lora_B, known, token, first + COLUMNS, n_tokens, n_columns, rank,
            b_column, b_rank, TAIL, RANK, PRECISION,
        )  # fmt: skip


def segmented_linear_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    slots: Tensor,
    scales: Tensor,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """One launch; an x whose values do not lie beside each other is copied first.

    No tile depends on N, which keeps a sample's bits apart from its batch.

    Args:
        x, weight, bias, lora_A, lora_B, slots, scales: As in
            `kernels.segmented_lora.segmented_linear`, which has checked them.
        tile: Another one than the layer's own, for measurements.
    """
    if x.stride(2) != 1:
        x = x.contiguous()
    samples, tokens, depth = x.shape
    columns, (n_slots, rank) = len(weight), lora_A.shape[:2]
    block = max(SMALLEST_BLOCK, triton.next_power_of_2(rank))
    if tile is None and x.dtype == torch.float32:
        tile = FLOAT32_TILE
    elif tile is None:
        tile = tile_for(tokens, block, Multiprocessor.of(x.get_device()))
    out = torch.empty(samples, tokens, columns, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(tokens, tile.tokens) * triton.cdiv(columns, tile.columns + tile.tail)
    launch: Any = _linear[(tiles, samples)]
    with torch.cuda.device(x.device) if x.is_cuda else torch.no_grad():
        launch(
            out,
            x,
            weight,
            None if bias is None else bias.contiguous(),
            lora_A,
            lora_B,
            slots.contiguous(),
            scales.contiguous(),
            n_slots,
            tokens,
            columns,
            depth,
            rank,
            *x.stride(),
            *weight.stride(),
            *lora_A.stride(),
            *lora_B.stride(),
            TOKENS=tile.tokens,
            COLUMNS=tile.columns,
            TAIL=tile.tail,
            DEPTH=tile.depth,
            RANK=block,
            EVEN=depth % tile.depth == 0,
            # Half precision is exact in tf32; float32 is not, so its products are taken in full.
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


def tile_for(tokens: int, rank: int, multiprocessor: Multiprocessor) -> Tile:
    """The largest tile that fits, of layers of so many tokens a sample.

    Args:
        tokens: Of a sample.
        rank: As the kernel pads it.
    """
    for fewest in sorted(TILES, reverse=True):
        tile = TILES[fewest]
        fits = tile.shared_bytes(rank, multiprocessor) <= multiprocessor.shared_bytes
        if fewest <= tokens and fits:
            return tile
    return TILES[min(TILES)]
