"""The kernel of geglu equals its reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.geglu import geglu
from kernels.geglu.reference import geglu_reference
from kernels.launch import interpreted
from tests.kernels.interpreter import assert_passes_in_the_interpreter, in_interpreter

pytest.importorskip("triton", reason="Triton is there on Linux only")
pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

# One value, rests of rows and of columns, more than one tile of either, more dimensions.
SHAPES = [(1, 2), (3, 2 * 63), (9, 2 * 257), (2, 5, 2 * 31), (2, 3, 4, 2 * 8)]


def test_kernel_equals_reference_in_the_interpreter() -> None:
    """The tests of this file that are marked so pass in the interpreter."""
    assert_passes_in_the_interpreter(__file__)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, large enough that gates close."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)


def assert_as_exact_as_reference(y: Tensor, x: Tensor) -> None:
    """Twice the reference's error plus one epsilon, both against float64."""
    features, gates = x.double().chunk(2, dim=-1)
    exact = features * F.gelu(gates)
    error = (geglu_reference(x).double() - exact).abs().max()
    epsilon = torch.finfo(x.dtype).eps * exact.abs().max()
    assert y.is_contiguous()
    assert float((y.double() - exact).abs().max()) <= float(2 * error + epsilon)


@in_interpreter
@pytest.mark.parametrize("shape", SHAPES)
def test_gates_in_the_interpreter(shape: tuple[int, ...]) -> None:
    """Awkward sizes come out as exact as the reference's."""
    x = draw(*shape)
    assert_as_exact_as_reference(geglu(x), x)


@in_interpreter
@pytest.mark.parametrize("step", [(2, 1), (1, 3), (2, 3)])
def test_slices_in_the_interpreter(step: tuple[int, int]) -> None:
    """Rows that lie apart are read where they lie; values that do are copied."""
    x = draw(8, 66)[:: step[0], :: step[1]]
    assert_as_exact_as_reference(geglu(x), x)


@in_interpreter
def test_a_row_does_not_depend_on_the_others_in_the_interpreter() -> None:
    """Alone and among others, the same bits."""
    x = draw(11, 70)
    together = geglu(x)
    for n in range(11):
        assert torch.equal(geglu(x[n : n + 1])[0], together[n])


@pytest.mark.skipif(interpreted(), reason="a process that interprets cannot compile")
def test_the_kernel_compiles_for_hopper_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler accepts it, and reads and writes sixteen bytes at a time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.geglu import kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fixed = {"ROWS": kernel.ROWS, "COLUMNS": kernel.COLUMNS, "HALF_ROOT": kernel.HALF_ROOT}
    types = {"x": "*bf16", "y": "*bf16", "n_rows": "i32", "width": "i32", "x_row": "i32"}
    types |= dict.fromkeys(fixed, "constexpr")
    # What a launch says of SD2's sizes: all are multiples of sixteen.
    sixteenths = {(place,): [["tt.divisibility", 16]] for place in range(5)}
    compiled = triton.compile(
        ASTSource(kernel._geglu, types, constexprs=fixed, attrs=sixteenths),
        target=GPUTarget("cuda", 90, 32),
    )
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
    assert "st.global.v4.b32" in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (2, 4096, 2560), (3, 100, 2 * 5120)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gates_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Compiled, in every type, as exact as the reference."""
    x = draw(*shape, dtype=dtype)
    assert_as_exact_as_reference(geglu(x.cuda()).cpu(), x)
