"""The kernel of add_layernorm equals its reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.add_layernorm import add_layernorm
from kernels.add_layernorm.reference import add_layernorm_reference
from kernels.launch import interpreted
from tests.kernels.interpreter import assert_passes_in_the_interpreter, in_interpreter

pytest.importorskip("triton", reason="Triton is there on Linux only")
pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

# One value, a rest of rows and of columns, rows longer than a tile, more dimensions.
SHAPES = [(1, 1), (3, 63), (70, 130), (2, 5000), (2, 3, 4, 8)]


def test_kernel_equals_reference_in_the_interpreter() -> None:
    """The tests of this file that are marked so pass in the interpreter."""
    assert_passes_in_the_interpreter(__file__)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.5) -> Tensor:
    """Normal numbers around a mean."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


def assert_as_exact_as_reference(
    outcomes: tuple[Tensor, Tensor],
    residual: Tensor,
    addend: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """The same sum, and of its norm twice the reference's error plus one epsilon."""
    summed, plain = add_layernorm_reference(residual, addend, weight, bias, 1e-5)
    assert torch.equal(outcomes[0], summed)
    affine = (None if tensor is None else tensor.double() for tensor in (weight, bias))
    exact = F.layer_norm(summed.double(), residual.shape[-1:], *affine, 1e-5)
    error = (plain.double() - exact).abs().max()
    epsilon = torch.finfo(residual.dtype).eps * exact.abs().max()
    assert outcomes[1].is_contiguous()
    assert float((outcomes[1].double() - exact).abs().max()) <= float(2 * error + epsilon)


@in_interpreter
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_in_the_interpreter(shape: tuple[int, ...], affine: bool, adds: bool) -> None:
    """Awkward sizes come out as exact as the reference's, with and without parameters."""
    given = (
        draw(1, *shape),
        draw(2, *shape) if adds else None,
        draw(3, shape[-1]) if affine else None,
        draw(4, shape[-1]) if affine else None,
    )
    assert_as_exact_as_reference(add_layernorm(*given, 1e-5), *given)


@in_interpreter
@pytest.mark.parametrize("step", [(2, 1), (1, 3), (2, 3)])
def test_slices_in_the_interpreter(step: tuple[int, int]) -> None:
    """Rows that lie apart are read where they lie; values that do are copied."""
    residual = draw(1, 8, 66)[:: step[0], :: step[1]]
    addend = draw(2, *residual.shape)
    outcomes = add_layernorm(residual, addend, None, None, 1e-5)
    assert_as_exact_as_reference(outcomes, residual, addend, None, None)


@in_interpreter
def test_a_row_far_from_zero_in_the_interpreter() -> None:
    """With a mean of 4096 and a deviation of 1, E[x^2] - E[x]^2 would be noise in float32."""
    given = (draw(1, 5, 300, mean=4096), draw(2, 5, 300), None, None)
    assert_as_exact_as_reference(add_layernorm(*given, 1e-5), *given)


@in_interpreter
def test_a_row_does_not_depend_on_the_others_in_the_interpreter() -> None:
    """Alone and among others, the same bits."""
    residual, addend, weight, bias = draw(1, 70, 70), draw(2, 70, 70), draw(3, 70), draw(4, 70)
    together = add_layernorm(residual, addend, weight, bias, 1e-5)
    for n in range(70):
        alone = add_layernorm(residual[n : n + 1], addend[n : n + 1], weight, bias, 1e-5)
        for outcome, among in zip(alone, together, strict=True):
            assert torch.equal(outcome[0], among[n])


@pytest.mark.skipif(interpreted(), reason="a process that interprets cannot compile")
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("width", [320, 640, 1280, 8192])
def test_the_kernel_compiles_for_hopper_without_a_gpu(
    width: int, adds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler accepts it, and reads and writes sixteen bytes at a time, and no fewer."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.add_layernorm import kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fixed: dict[str, int | None] = dict(kernel.tiling(width))
    warps = fixed.pop("num_warps")
    if not adds:
        fixed |= {"addend": None, "summed": None}
    pointers = dict.fromkeys(("residual", "addend", "weight", "bias", "summed", "normed"), "*bf16")
    types = {
        name: "constexpr" if name in fixed else ({"eps": "fp32"} | pointers).get(name, "i32")
        for name in kernel._add_layernorm.arg_names
    }
    # What a launch says of SD2's sizes: all are multiples of sixteen.
    sixteenths = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(types.values())
        if kind not in ("constexpr", "fp32")
    }
    compiled = triton.compile(
        ASTSource(kernel._add_layernorm, types, constexprs=fixed, attrs=sixteenths),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps},
    )
    for access in ("ld.global", "st.global"):
        assert f"{access}.v4.b32" in compiled.asm["ptx"]
        assert f"{access}.b16" not in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 4096, 320), (3, 100, 1280), (5, 8192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype, adds: bool) -> None:
    """Compiled, in every type, as exact as the reference."""
    residual = draw(1, *shape, dtype=dtype)
    addend = draw(2, *shape, dtype=dtype) if adds else None
    weight, bias = draw(3, shape[-1], dtype=dtype), draw(4, shape[-1], dtype=dtype)
    given = (residual, addend, weight, bias)
    moved = [None if tensor is None else tensor.cuda() for tensor in given]
    assert moved[0] is not None
    summed, normed = add_layernorm(moved[0], *moved[1:], 1e-5)
    assert_as_exact_as_reference((summed.cpu(), normed.cpu()), *given)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [320, 640, 1280])
def test_a_row_does_not_depend_on_the_others_on_a_gpu(width: int) -> None:
    """Compiled: alone and among others, the same bits."""
    residual, addend = (draw(k, 9, width, dtype=torch.bfloat16).cuda() for k in range(2))
    together = add_layernorm(residual, addend, None, None, 1e-5)
    for n in range(9):
        alone = add_layernorm(residual[n : n + 1], addend[n : n + 1], None, None, 1e-5)
        for outcome, among in zip(alone, together, strict=True):
            assert torch.equal(outcome[0], among[n])
