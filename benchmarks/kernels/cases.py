"""The ops at the sizes that they meet: SD2 at 64x64 latents on CUDA, nano on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.contest import Case
from kernels.add_layernorm import add_layernorm
from kernels.add_residual import add_residual
from kernels.geglu import geglu
from kernels.groupnorm_silu import groupnorm_silu
from kernels.merge_lora import merge_lora_
from kernels.sampler_step import sampler_step
from kernels.segmented_lora import segmented_conv_lora_, segmented_linear, segmented_lora_
from realfill.complete.samplers import advance

EPS = 1e-5
THREE_TAPS: dict[str, Any] = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1)}


@dataclass(frozen=True)
class Sizes:
    """A U-Net as the ops see it.

    Attributes:
        levels: Channels and side of the features, from the finest down.
        norms: More sizes that only the normalisations meet, likewise.
        groups: Of a normalisation.
        rank: Of adapters in the arena.
        modules: Shapes of the target modules' weights, and how many there are of each.
        latents: Channels and side of the latents.
        known: Channels behind them in the input.
        memory_format: Of features.
    """

    levels: tuple[tuple[int, int], ...]
    norms: tuple[tuple[int, int], ...]
    groups: int
    rank: int
    modules: dict[tuple[int, int], int]
    latents: tuple[int, int]
    known: int
    memory_format: torch.memory_format


SIZES = {
    "cuda": Sizes(
        levels=((320, 64), (640, 32), (1280, 16), (1280, 8)),
        norms=((960, 64), (1920, 32), (2560, 16), (2560, 8)),
        groups=32,
        rank=16,
        # Queries, keys, values and outputs of 16 blocks, of self and of cross attention.
        modules={
            (320, 320): 30,
            (320, 1024): 10,
            (640, 640): 30,
            (640, 1024): 10,
            (1280, 1280): 36,
            (1280, 1024): 12,
        },
        latents=(4, 64),
        known=5,
        memory_format=torch.channels_last,
    ),
    "cpu": Sizes(
        levels=((128, 16), (192, 8)),
        norms=((320, 16), (384, 8)),
        groups=16,
        rank=32,
        modules={(128, 128): 10, (192, 192): 14, (128, 1152): 6, (192, 1728): 8},
        latents=(20, 16),
        known=21,
        memory_format=torch.contiguous_format,
    ),
}


@dataclass(frozen=True)
class Maker:
    """Draws tensors of one device and type for a batch of samples."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    sizes: Sizes

    def draw(self, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
        """Normal numbers, the same whenever shape and seed are."""
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(shape, generator=generator) * scale).to(self.device, self.dtype)

    def features(self, channels: int, side: int) -> Tensor:
        """What a layer is given. [N, C, H, W]"""
        drawn = self.draw(self.batch, channels, side, side)
        return drawn.contiguous(memory_format=self.sizes.memory_format)

    def arena(self, depth: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A slot for each sample, as views of one packed buffer, with factors as if trained."""
        rank, first = self.sizes.rank, self.sizes.rank * depth
        packed = self.draw(self.batch, rank * (depth + columns), scale=0.05)
        lora_A = packed[:, :first].unflatten(1, (rank, depth))
        lora_B = packed[:, first:].unflatten(1, (columns, rank))
        slots = torch.arange(self.batch, device=self.device)
        return lora_A, lora_B, slots, torch.ones(self.batch, device=self.device)

    def case(
        self,
        op: str,
        name: str,
        ours: Callable[..., Tensor],
        peer: Callable[..., Tensor],
        inputs: Callable[[], tuple[Any, ...]],
        *,
        moved: int,
        flops: int,
    ) -> Case:
        """A case that moves so many values of this type."""
        return Case(op, name, ours, peer, inputs, moved * self.dtype.itemsize, flops, self.dtype)


def merge_lora_cases(maker: Maker) -> Iterator[Case]:
    """All target modules of one adapter."""
    shapes = [shape for shape, number in maker.sizes.modules.items() for _ in range(number)]
    rank = maker.sizes.rank

    def inputs() -> tuple[list[Tensor], ...]:
        pristines = [maker.draw(*shape) for shape in shapes]
        lora_As = [maker.draw(rank, columns, scale=0.05) for _, columns in shapes]
        lora_Bs = [maker.draw(rows, rank, scale=0.05) for rows, _ in shapes]
        return [torch.empty_like(weight) for weight in pristines], pristines, lora_As, lora_Bs

    def ours(
        outs: list[Tensor], pristines: list[Tensor], lora_As: list[Tensor], lora_Bs: list[Tensor]
    ) -> Tensor:
        merge_lora_(outs, pristines, lora_As, lora_Bs, 2.0)
        return outs[-1]

    def peer(outs: list[Tensor], *factors: list[Tensor]) -> Tensor:
        for out, pristine, lora_A, lora_B in zip(outs, *factors, strict=True):
            out.copy_(pristine + 2.0 * (lora_B @ lora_A))
        return outs[-1]

    weights = sum(rows * columns for rows, columns in shapes)
    moved = 2 * weights + sum(rank * (rows + columns) for rows, columns in shapes)
    flops = 2 * (rank + 1) * weights
    yield maker.case("merge_lora", "adapter", ours, peer, inputs, moved=moved, flops=flops)


def segmented_lora_cases(maker: Maker) -> Iterator[Case]:
    """Square layers over all pixels, their terms alone and whole, and convolutions of 3x3."""
    batch, rank = maker.batch, maker.sizes.rank
    for channels, side in maker.sizes.levels:
        pixels = side * side

        def tokens(channels: int = channels, pixels: int = pixels) -> tuple[Tensor, ...]:
            shape = (batch, pixels, channels)
            drawn = [maker.draw(*shape, seed=seed) for seed in range(2)]
            return *drawn, *maker.arena(channels, channels)

        def layers(channels: int = channels, pixels: int = pixels) -> tuple[Tensor, ...]:
            weight = maker.draw(channels, channels, scale=channels**-0.5)
            x = maker.draw(batch, pixels, channels)
            return x, weight, maker.draw(channels), *maker.arena(channels, channels)

        def images(channels: int = channels, side: int = side) -> tuple[Tensor, ...]:
            x = maker.features(channels, side)
            return torch.zeros_like(x), x, *maker.arena(9 * channels, channels)

        for name, inputs, ours, peer, taps in (
            ("linear", tokens, _ours_linear, _peer_linear, 1),
            ("conv", images, _ours_conv, _peer_conv, 9),
        ):
            yield maker.case(
                "segmented_lora",
                f"{name}{channels}x{side}",
                ours,
                peer,
                inputs,
                moved=batch * channels * (3 * pixels + rank * (taps + 1)),
                flops=2 * batch * pixels * channels * rank * (taps + 1),
            )
        yield maker.case(
            "segmented_lora",
            f"layer{channels}x{side}",
            segmented_linear,
            _peer_layer,
            layers,
            moved=channels * (channels + 1 + 2 * batch * (pixels + rank)),
            flops=2 * batch * pixels * channels * (channels + 2 * rank),
        )


def _ours_linear(out: Tensor, *rest: Tensor) -> Tensor:
    segmented_lora_(out, *rest)
    return out


def _peer_linear(
    out: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, slots: Tensor, scales: Tensor
) -> Tensor:
    down = x @ lora_A[slots].transpose(1, 2)
    term = down @ lora_B[slots].transpose(1, 2)
    return out.add_(term * scales[slots].to(x.dtype)[:, None, None])


def _peer_layer(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
    return _peer_linear(F.linear(x, weight, bias), x, *rest)


def _ours_conv(out: Tensor, *rest: Tensor) -> Tensor:
    segmented_conv_lora_(out, *rest, **THREE_TAPS)
    return out


def _peer_conv(
    out: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, slots: Tensor, scales: Tensor
) -> Tensor:
    samples, channels, height, width = x.shape
    filters = lora_A[slots].reshape(-1, channels, 3, 3)
    stacked = x.reshape(1, -1, height, width)
    down = F.conv2d(stacked, filters, padding=1, groups=samples).view(samples, -1, height * width)
    term = (lora_B[slots] @ down) * scales[slots].to(x.dtype)[:, None, None]
    return out.add_(term.view_as(out))


def groupnorm_silu_cases(maker: Maker) -> Iterator[Case]:
    """Every size of features that the U-Net normalises."""
    groups = maker.sizes.groups
    for channels, side in (*maker.sizes.levels, *maker.sizes.norms):

        def inputs(channels: int = channels, side: int = side) -> tuple[Tensor, ...]:
            return maker.features(channels, side), maker.draw(channels), maker.draw(channels)

        def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return groupnorm_silu(x, groups, weight, bias, EPS)

        def peer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.silu(F.group_norm(x, groups, weight, bias, EPS))

        values = maker.batch * channels * side * side
        yield maker.case(
            "groupnorm_silu",
            f"c{channels}x{side}",
            ours,
            peer,
            inputs,
            moved=2 * values + 2 * channels,
            flops=0,
        )


def geglu_cases(maker: Maker) -> Iterator[Case]:
    """What the feed-forwards' first halves project: eight times the channels of each level."""
    for channels, side in maker.sizes.levels:
        shape = (maker.batch, side * side, 8 * channels)

        def inputs(shape: tuple[int, ...] = shape) -> tuple[Tensor, ...]:
            return (maker.draw(*shape),)

        def peer(x: Tensor) -> Tensor:
            features, gates = x.chunk(2, dim=-1)
            return features * F.gelu(gates)

        values = maker.batch * side * side * 8 * channels
        name = f"c{channels}x{side}"
        yield maker.case("geglu", name, geglu, peer, inputs, moved=3 * values // 2, flops=0)


def add_layernorm_cases(maker: Maker) -> Iterator[Case]:
    """Tokens of each level, before cross attention and before the feed-forward."""
    for channels, side in maker.sizes.levels:
        shape = (maker.batch, side * side, channels)

        def inputs(shape: tuple[int, ...] = shape) -> tuple[Tensor, ...]:
            tokens = [maker.draw(*shape, seed=seed) for seed in range(2)]
            return *tokens, *(maker.draw(shape[-1], seed=seed) for seed in range(2, 4))

        def ours(residual: Tensor, addend: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return add_layernorm(residual, addend, weight, bias, EPS)[1]

        def peer(residual: Tensor, addend: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(residual + addend, residual.shape[-1:], weight, bias, EPS)

        values = maker.batch * side * side * channels
        yield maker.case(
            "add_layernorm",
            f"c{channels}x{side}",
            ours,
            peer,
            inputs,
            moved=4 * values + 2 * channels,
            flops=0,
        )


def add_residual_cases(maker: Maker) -> Iterator[Case]:
    """What a residual block of each level ends with."""
    for channels, side in maker.sizes.levels:

        def inputs(channels: int = channels, side: int = side) -> tuple[Tensor, ...]:
            bias = maker.draw(channels)
            return maker.features(channels, side), maker.features(channels, side), bias

        def peer(residual: Tensor, features: Tensor, bias: Tensor) -> Tensor:
            return residual + (features + bias[:, None, None])

        moved = 3 * maker.batch * channels * side * side + channels
        name = f"c{channels}x{side}"
        yield maker.case("add_residual", name, add_residual, peer, inputs, moved=moved, flops=0)


def sampler_step_cases(maker: Maker) -> Iterator[Case]:
    """A step with history and noise, and the U-Net's next input."""
    sizes, (channels, side) = maker.sizes, maker.sizes.latents

    def inputs() -> tuple[Tensor, ...]:
        shape = (maker.batch, channels, side, side)
        state = [maker.draw(*shape, seed=seed).float() for seed in range(3)]
        rows = torch.full((maker.batch, 6), 0.5, device=maker.device)
        return rows, *state, maker.features(channels, side), maker.features(sizes.known, side)

    def ours(
        rows: Tensor, z: Tensor, x0: Tensor, noise: Tensor, eps: Tensor, known: Tensor
    ) -> Tensor:
        step = partial(sampler_step, memory_format=sizes.memory_format)
        return step(rows, z, eps, known, history=x0, noise=noise)[2]

    def peer(
        rows: Tensor, z: Tensor, x0: Tensor, noise: Tensor, eps: Tensor, known: Tensor
    ) -> Tensor:
        following, _ = advance(rows, z, eps, x0, noise)
        packed = torch.cat([following.to(known.dtype), known], 1)
        return packed.contiguous(memory_format=sizes.memory_format)

    values = maker.batch * side * side
    # Three states are read and two written, in float32; the rest is of the U-Net's type.
    moved_bytes = values * (5 * channels * 4 + 2 * (channels + sizes.known) * maker.dtype.itemsize)
    yield Case("sampler_step", "step", ours, peer, inputs, moved_bytes, 0, maker.dtype)


CASES: dict[str, Callable[[Maker], Iterator[Case]]] = {
    "merge_lora": merge_lora_cases,
    "segmented_lora": segmented_lora_cases,
    "groupnorm_silu": groupnorm_silu_cases,
    "geglu": geglu_cases,
    "add_layernorm": add_layernorm_cases,
    "add_residual": add_residual_cases,
    "sampler_step": sampler_step_cases,
}
