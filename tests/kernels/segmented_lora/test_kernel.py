"""The kernels of segmented_lora equal their reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.launch import interpreted
from kernels.segmented_lora import segmented_conv_lora_, segmented_lora_
from kernels.segmented_lora.reference import (
    segmented_conv_lora_reference_,
    segmented_lora_reference_,
)
from tests.kernels.interpreter import assert_passes_in_the_interpreter, in_interpreter

pytest.importorskip("triton", reason="Triton is there on Linux only")
pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

# Tokens, in, out.
SIZES = [(1, 63, 341), (63, 341, 1), (341, 1, 63), (70, 48, 130)]
RANKS = [1, 17, 16, 32]
SLOTS = [2, -1, 0, 2]
# Channels in and out, height, width, kernel, stride, padding.
CONVOLUTIONS = [
    (3, 5, 1, 1, (1, 1), (1, 1), (0, 0)),
    (20, 34, 3, 7, (3, 3), (1, 1), (1, 1)),
    (34, 20, 9, 6, (3, 3), (2, 2), (1, 1)),
    (17, 3, 6, 5, (1, 3), (2, 1), (0, 1)),
    (16, 63, 11, 31, (1, 1), (2, 2), (0, 0)),
]


def test_kernel_equals_reference_in_the_interpreter() -> None:
    """The tests of this file that are marked so pass in the interpreter."""
    assert_passes_in_the_interpreter(__file__)


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def factors(depth: int, columns: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Three slots of one packed buffer, and their scales: lora_A, lora_B, scales."""
    row = rank * (depth + columns)
    packed = draw(rank, 3, row + 5).to(dtype)
    lora_A = packed[:, : rank * depth].unflatten(1, (rank, depth))
    lora_B = packed[:, rank * depth : row].unflatten(1, (columns, rank))
    return lora_A, lora_B, torch.tensor([2.0, 0.5, -1.0])


def exact(out: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scales: Tensor) -> Tensor:
    """The definition sample by sample in float64. [N, T, out]"""
    wanted = out.double().clone()
    for n, slot in enumerate(SLOTS):
        if slot >= 0:
            down = x[n].double() @ lora_A[slot].double().T
            wanted[n] += float(scales[slot]) * down @ lora_B[slot].double().T
    return wanted


def assert_as_exact_as_reference(out: Tensor, reference: Tensor, wanted: Tensor) -> None:
    """Twice the reference's error plus one epsilon, both against float64."""
    error = (reference.double() - wanted).abs().max()
    epsilon = torch.finfo(out.dtype).eps * wanted.abs().max()
    assert float((out.double() - wanted).abs().max()) <= float(2 * error + epsilon)


@in_interpreter
@pytest.mark.parametrize(
    ("tokens", "depth", "columns", "rank"),
    [(*sizes, rank) for sizes, rank in zip(SIZES * 2, [*RANKS, 17, 16, 1, 17], strict=True)],
)
def test_terms_in_the_interpreter(tokens: int, depth: int, columns: int, rank: int) -> None:
    """Awkward sizes and ranks, factors that are views: as exact as the reference, -1 untouched."""
    lora_A, lora_B, scales = factors(depth, columns, rank, torch.float32)
    x, out = draw(1, 4, tokens, depth).float(), draw(2, 4, tokens, columns).float()
    before, reference = out.clone(), out.clone()
    slots = torch.tensor(SLOTS, dtype=torch.int32)
    segmented_lora_(out, x, lora_A, lora_B, slots, scales)
    segmented_lora_reference_(reference, x, lora_A, lora_B, slots, scales)
    wanted = exact(before, x, lora_A, lora_B, scales)
    assert_as_exact_as_reference(out, reference, wanted)
    assert torch.equal(out[1], before[1])


@in_interpreter
def test_views_in_the_interpreter() -> None:
    """Transposed and sliced tensors are read and written where they lie, and nowhere else."""
    lora_A, lora_B, scales = factors(24, 20, 16, torch.float32)
    field = torch.full((9, 50, 33), 7.0)
    out = field[1:9:2, 4:44:2, 3:].transpose(1, 2)
    x = draw(1, 24, 4, 60).float().permute(1, 2, 0)[:, ::2]
    wanted = exact(out, x, lora_A, lora_B, scales)
    reference = out.clone()
    slots = torch.tensor(SLOTS)
    segmented_lora_(out, x, lora_A, lora_B, slots, scales)
    segmented_lora_reference_(reference, x, lora_A, lora_B, slots, scales)
    assert_as_exact_as_reference(out, reference, wanted)
    out.fill_(7.0)
    assert torch.equal(field, torch.full((9, 50, 33), 7.0))


@in_interpreter
def test_a_sample_is_the_same_anywhere_in_the_interpreter() -> None:
    """Alone, among others, at another place, in a wider arena: the same bits."""
    lora_A, lora_B, scales = factors(48, 70, 16, torch.float32)
    x, out = draw(1, 4, 40, 48).float(), draw(2, 4, 40, 70).float()
    slots = torch.tensor([2, 0, 1, 2])
    together = out.clone()
    segmented_lora_(together, x, lora_A, lora_B, slots, scales)
    for n in range(4):
        alone = out[n : n + 1].clone()
        segmented_lora_(alone, x[n : n + 1], lora_A, lora_B, slots[n : n + 1], scales)
        assert torch.equal(alone[0], together[n])
    order = [3, 1, 0, 2]
    moved = out[order]
    segmented_lora_(moved, x[order], lora_A, lora_B, slots[order], scales)
    assert torch.equal(moved, together[order])


@in_interpreter
def test_a_slot_that_does_not_exist_gives_nan_in_the_interpreter() -> None:
    """Where nothing can wait for the slots to be read, a wrong one is not another scene's."""
    from kernels.segmented_lora.kernel import segmented_lora_kernel_

    lora_A, lora_B, scales = factors(8, 8, 16, torch.float32)
    x, out = draw(1, 3, 5, 8).float(), torch.ones(3, 5, 8)
    segmented_lora_kernel_(out, x, lora_A, lora_B, torch.tensor([-2, -1, 3]), scales)
    assert out[[0, 2]].isnan().all()
    assert torch.equal(out[1], torch.ones(5, 8))


def convolved(
    device: str,
    dtype: torch.dtype,
    convolution: tuple[Any, ...],
    memory_format: torch.memory_format,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel's, the reference's and the float64 sum for one convolution, and what was there."""
    channels, columns, height, width, kernel_size, stride, padding = convolution
    geometry = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    depth = channels * kernel_size[0] * kernel_size[1]
    lora_A, lora_B, scales = factors(depth, columns, 16, dtype)
    x = draw(1, 4, channels, height, width).to(dtype)
    filters = lora_A.double().unflatten(2, (channels, *kernel_size))
    downs = [F.conv2d(x.double(), rows, stride=stride, padding=padding) for rows in filters]
    out = draw(2, 4, columns, *downs[0].shape[2:]).to(dtype)
    wanted = out.double().clone()
    for n, slot in enumerate(SLOTS):
        if slot >= 0:
            term = lora_B[slot].double() @ downs[slot][n].flatten(1)
            wanted[n] += float(scales[slot]) * term.view_as(wanted[n])
    slots = torch.tensor(SLOTS)
    reference = out.clone()
    segmented_conv_lora_reference_(
        reference, x, lora_A, lora_B, slots, scales, kernel_size, stride, padding
    )
    ours = out.to(device, memory_format=memory_format, copy=True)
    on_device = [tensor.to(device) for tensor in (lora_A, lora_B, slots, scales)]
    x = x.to(device, memory_format=memory_format)
    segmented_conv_lora_(ours, x, *on_device, **geometry)
    return ours.cpu(), reference, wanted, out


@in_interpreter
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_convolutions_in_the_interpreter(
    convolution: tuple[Any, ...], memory_format: torch.memory_format
) -> None:
    """Kernels, strides and paddings of any kind, in both memory formats."""
    ours, reference, wanted, before = convolved("cpu", torch.float32, convolution, memory_format)
    assert_as_exact_as_reference(ours, reference, wanted)
    assert torch.equal(ours[1], before[1])


@pytest.mark.skipif(interpreted(), reason="a process that interprets cannot compile")
@pytest.mark.parametrize("half", ["bf16", "fp32"])
def test_kernels_compile_for_hopper_without_a_gpu(
    half: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler accepts both kernels; products of float32 are not shortened to tf32."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.segmented_lora import kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    precision = {"PRECISION": "tf32" if half == "bf16" else "ieee", "TOKENS": 64, "RANK": 16}
    dot = {"bf16": tl.bfloat16, "fp32": tl.float32}[half]
    constants = {
        kernel._shrink: {**precision, "KH": 3, "KW": 3, "CHANNELS": 32, "DOT": dot},
        kernel._expand: {**precision, "COLUMNS": 64},
    }
    pointers = dict.fromkeys(("x", "lora_A", "out", "lora_B"), f"*{half}")
    pointers |= {"slots": "*i64", "down": "*fp32", "scales": "*fp32"}
    for function, fixed in constants.items():
        types = {
            name: "constexpr" if name in fixed else pointers.get(name, "i32")
            for name in function.arg_names
        }
        compiled = triton.compile(
            ASTSource(function, types, constexprs=fixed), target=GPUTarget("cuda", 90, 32)
        )
        assert ("mma" in compiled.asm["ptx"]) == (half == "bf16")
        assert ("tf32" in compiled.asm["ptx"]) == (half == "bf16" and function is kernel._expand)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [16, 17, 64, 128])
@pytest.mark.parametrize(("tokens", "depth", "columns"), [*SIZES, (4096, 320, 320), (64, 1280, 99)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_terms_on_a_gpu(
    tokens: int, depth: int, columns: int, rank: int, dtype: torch.dtype
) -> None:
    """Compiled, in every type, as exact as the reference, and the same bits at every place."""
    lora_A, lora_B, scales = factors(depth, columns, rank, dtype)
    # As small as trained ones: their terms do not outweigh what they are added to.
    x, out = draw(1, 4, tokens, depth).to(dtype) / depth, draw(2, 4, tokens, columns).to(dtype)
    slots = torch.tensor(SLOTS)
    reference = out.clone()
    segmented_lora_reference_(reference, x, lora_A, lora_B, slots, scales)
    wanted = exact(out, x, lora_A, lora_B, scales)
    on_device = [tensor.cuda() for tensor in (lora_A, lora_B, slots, scales)]
    ours = out.cuda()
    segmented_lora_(ours, x.cuda(), *on_device)
    assert_as_exact_as_reference(ours.cpu(), reference, wanted)
    assert torch.equal(ours[1].cpu(), out[1])
    lora_A, lora_B, slots, scales = on_device
    alone = out[3:].cuda()
    segmented_lora_(alone, x[3:].cuda(), lora_A, lora_B, slots[3:], scales)
    assert torch.equal(alone[0], ours[3])


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_convolutions_on_a_gpu(
    convolution: tuple[Any, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Compiled, in every type and both memory formats, as exact as the reference."""
    ours, reference, wanted, before = convolved("cuda", dtype, convolution, memory_format)
    assert_as_exact_as_reference(ours, reference, wanted)
    assert torch.equal(ours[1], before[1])
