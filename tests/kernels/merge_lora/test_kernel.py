"""The kernel of merge_lora equals its reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.launch import interpreted
from kernels.merge_lora import merge_lora, merge_lora_
from kernels.merge_lora.reference import merge_lora_reference_
from tests.kernels.interpreter import assert_passes_in_the_interpreter, in_interpreter

pytest.importorskip("triton", reason="Triton is there on Linux only")

SIZES = [(1, 1), (1, 63), (63, 341), (130, 70)]
RANKS = [1, 3, 16, 17]
pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


def test_kernel_equals_reference_in_the_interpreter() -> None:
    """All tests of this file for the interpreter pass in a process that was started with it on."""
    assert_passes_in_the_interpreter(__file__)


@pytest.mark.skipif(interpreted(), reason="a process that interprets cannot compile")
@pytest.mark.parametrize("aligned", [True, False])
def test_kernel_compiles_for_hopper_without_a_gpu(
    aligned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler accepts the kernel, and moves several aligned values at once."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.merge_lora import kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {
        "WEIGHT": tl.bfloat16,
        "FACTOR": tl.float16,
        "N_FIELDS": kernel.FIELDS,
        "ROWS": kernel.BLOCK_ROWS,
        "COLUMNS": kernel.BLOCK_COLUMNS,
        "RANK": kernel.SMALLEST_BLOCK_RANK,
        "ALIGNED": aligned,
    }
    types = {"table": "*i64", "scale": "fp32", **dict.fromkeys(constants, "constexpr")}
    compiled = triton.compile(
        ASTSource(kernel._merge_lora, types, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options={"enable_fp_fusion": False},
    )
    # Products in float32, not in the shorter tf32.
    assert "fma.rn.f32" in compiled.asm["ptx"]
    assert "tf32" not in compiled.asm["ptx"]
    for moved in ("ld.global.v4", "st.global.v4"):
        assert (moved in compiled.asm["ptx"]) == aligned


def matrices(
    rows: int, columns: int, rank: int, *, device: str, dtype: torch.dtype, factor: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A pristine weight and factors of usual magnitude, and of every sign."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns + rank)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return (
        draw(rows, columns).to(device, dtype),
        draw(rank, columns).to(device, factor),
        draw(rows, rank).to(device, factor),
    )


def assert_as_exact_as_reference(
    out: Tensor, pristine: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float
) -> None:
    """Twice the reference's error plus one epsilon, both against float64.

    In a small weight the reference may err by luck less than float32 does in a sum of so many
    terms, half an epsilon times the root of their number: that much is allowed to every order.
    """
    exact = pristine.double() + scale * lora_B.double() @ lora_A.double()
    reference = torch.empty_like(pristine)
    merge_lora_reference_([reference], [pristine], [lora_A], [lora_B], scale)
    error = (reference.double() - exact).abs().max()
    order = torch.finfo(torch.float32).eps / 2 * len(lora_A) ** 0.5
    epsilon = (torch.finfo(out.dtype).eps + order) * exact.abs().max()
    assert float((out.double() - exact).abs().max()) <= float(2 * error + epsilon)


@in_interpreter
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("rows", "columns"), [*SIZES, (70, 48)])
@pytest.mark.parametrize("factor", [torch.float32, torch.float16])
def test_merge_in_the_interpreter(rows: int, columns: int, rank: int, factor: torch.dtype) -> None:
    """Sizes and ranks that are a multiple of 16 and others come out as exact as the reference's."""
    pristine, lora_A, lora_B = matrices(
        rows, columns, rank, device="cpu", dtype=torch.float32, factor=factor
    )
    out = merge_lora(torch.empty_like(pristine), pristine, lora_A, lora_B, 2.0)
    assert_as_exact_as_reference(out, pristine, lora_A, lora_B, 2.0)


@in_interpreter
def test_merge_of_views_in_the_interpreter() -> None:
    """Transposed and sliced tensors are read and written where they lie, and nowhere else."""
    pristine, lora_A, lora_B = matrices(
        40, 30, 5, device="cpu", dtype=torch.float32, factor=torch.float32
    )
    field = torch.full((70, 90), 7.0)
    out = field[5:65:2, 3:83:2].T
    views = (lora_A.T.contiguous().T, lora_B.T.contiguous().T)
    merge_lora(out, pristine.T.contiguous().T, *views, -0.5)
    assert_as_exact_as_reference(out, pristine, lora_A, lora_B, -0.5)
    field[5:65:2, 3:83:2] = 7.0
    assert torch.equal(field, torch.full((70, 90), 7.0))


@in_interpreter
def test_group_of_unequal_modules_in_the_interpreter() -> None:
    """One launch writes modules of different sizes and ranks, each as exactly as alone."""
    modules = [
        matrices(rows, columns, rank, device="cpu", dtype=torch.float32, factor=torch.float16)
        for (rows, columns), rank in zip(SIZES, RANKS, strict=True)
    ]
    pristines, lora_As, lora_Bs = (list(column) for column in zip(*modules, strict=True))
    outs = [torch.empty_like(pristine) for pristine in pristines]
    merge_lora_(outs, pristines, lora_As, lora_Bs, 2.0)
    for out, pristine, lora_A, lora_B in zip(outs, pristines, lora_As, lora_Bs, strict=True):
        assert_as_exact_as_reference(out, pristine, lora_A, lora_B, 2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 8, 17, 128])
@pytest.mark.parametrize(("rows", "columns"), [*SIZES, (1280, 5120)])
@pytest.mark.parametrize("factor", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_on_a_gpu(
    rows: int, columns: int, rank: int, dtype: torch.dtype, factor: torch.dtype
) -> None:
    """Compiled, in every type, the kernel is as exact as the reference, and the same every time."""
    pristine, lora_A, lora_B = matrices(
        rows, columns, rank, device="cuda", dtype=dtype, factor=factor
    )
    out = merge_lora(torch.empty_like(pristine), pristine, lora_A, lora_B, 0.5)
    assert_as_exact_as_reference(out, pristine, lora_A, lora_B, 0.5)
    again = merge_lora(torch.empty_like(pristine), pristine, lora_A, lora_B, 0.5)
    assert torch.equal(out, again)
