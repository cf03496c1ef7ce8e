"""The kernel of add_residual equals its reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.add_residual import add_residual
from kernels.add_residual.reference import add_residual_reference
from kernels.launch import interpreted
from tests.kernels.interpreter import assert_passes_in_the_interpreter, in_interpreter

pytest.importorskip("triton", reason="Triton is there on Linux only")
pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

# One value, one pixel, one channel, a tile and a rest, channels of more values than a tile.
SHAPES = [(1, 1, 1, 1), (2, 341, 1, 1), (3, 1, 9, 7), (3, 341, 3, 5), (2, 3, 67, 63)]
FORMATS = [torch.contiguous_format, torch.channels_last]


def test_kernel_equals_reference_in_the_interpreter() -> None:
    """The tests of this file that are marked so pass in the interpreter."""
    assert_passes_in_the_interpreter(__file__)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_as_exact_as_reference(
    y: Tensor, residual: Tensor, features: Tensor, bias: Tensor
) -> None:
    """Twice the reference's error plus one epsilon, both against float64."""
    exact = residual.double() + features.double() + bias.double()[:, None, None]
    reference = add_residual_reference(residual, features, bias)
    error = (reference.double() - exact).abs().max()
    epsilon = torch.finfo(features.dtype).eps * exact.abs().max()
    assert (y.dtype, y.stride()) == (reference.dtype, reference.stride())
    assert float((y.double() - exact).abs().max()) <= float(2 * error + epsilon)


@in_interpreter
@pytest.mark.parametrize("other", FORMATS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_in_the_interpreter(
    shape: tuple[int, ...], memory_format: torch.memory_format, other: torch.memory_format
) -> None:
    """Awkward sizes in both memory formats, and in one of each, are as exact as the reference's."""
    residual = draw(1, *shape).contiguous(memory_format=other)
    features = draw(2, *shape).contiguous(memory_format=memory_format)
    bias = draw(3, shape[1])
    y = add_residual(residual, features, bias)
    assert y.is_contiguous(memory_format=memory_format)
    assert_as_exact_as_reference(y, residual, features, bias)


@in_interpreter
def test_slices_in_the_interpreter() -> None:
    """Strides of no memory format are copied, and the outcome is contiguous."""
    residual, features = draw(1, 3, 6, 7, 18)[:, ::2, 1:], draw(2, 6, 3, 18, 6)[::2].transpose(2, 3)
    bias = draw(3, 6)[::2]
    y = add_residual(residual, features, bias)
    assert y.is_contiguous()
    assert_as_exact_as_reference(y, residual, features, bias)


@in_interpreter
@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_sample_does_not_depend_on_its_batch_in_the_interpreter(
    memory_format: torch.memory_format,
) -> None:
    """Alone and at another place, the same bits."""
    residual, features = (
        draw(seed, 3, 63, 9, 13).contiguous(memory_format=memory_format) for seed in range(2)
    )
    bias = draw(3, 63)
    together = add_residual(residual, features, bias)
    for n in range(3):
        alone = add_residual(residual[n : n + 1], features[n : n + 1], bias)
        assert torch.equal(alone[0], together[n])


@pytest.mark.skipif(interpreted(), reason="a process that interprets cannot compile")
@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_kernel_compiles_for_hopper_without_a_gpu(
    memory_format: torch.memory_format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler accepts it, and moves features sixteen bytes at a time, and no fewer."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.add_residual import kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fixed = {"TILE": kernel.TILE}
    if memory_format == torch.channels_last:
        # What a launch says of channels-last features: one channel lies beside the next.
        fixed["spread"] = 1
    pointers = dict.fromkeys(("residual", "features", "bias", "y"), "*bf16")
    types = {
        name: "constexpr" if name in fixed else pointers.get(name, "i32")
        for name in kernel._add_residual.arg_names
    }
    # And of SD2's sizes: all are multiples of sixteen.
    sixteenths = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(types.values())
        if kind != "constexpr"
    }
    compiled = triton.compile(
        ASTSource(kernel._add_residual, types, constexprs=fixed, attrs=sixteenths),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": kernel.WARPS},
    )
    ptx = compiled.asm["ptx"]
    # Two of each tensor for a thread; a bias that contiguous features share is read by itself.
    wide = 6 if memory_format == torch.channels_last else 4
    assert (ptx.count("ld.global.v4.b32"), ptx.count("st.global.v4.b32")) == (wide, 2)
    assert ("ld.global.b16" in ptx) == (memory_format == torch.contiguous_format)
    assert "st.global.b16" not in ptx


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 320, 64, 64), (5, 1280, 8, 8), (2, 960, 33, 31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_on_a_gpu(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Compiled, in every type and both memory formats, as exact as the reference."""
    residual, features = (
        draw(seed, *shape, dtype=dtype).contiguous(memory_format=memory_format) for seed in range(2)
    )
    bias = draw(3, shape[1], dtype=dtype)
    y = add_residual(residual.cuda(), features.cuda(), bias.cuda())
    assert_as_exact_as_reference(y.cpu(), residual, features, bias)
