"""The kernel of sampler_step has its reference's bits, in Triton's interpreter and on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.launch import interpreted
from kernels.sampler_step import sampler_step, sampler_step_
from kernels.sampler_step.reference import sampler_step_reference_
from realfill.complete.samplers import advance
from tests.kernels.interpreter import assert_passes_in_the_interpreter, in_interpreter

pytest.importorskip("triton", reason="Triton is there on Linux only")
pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

# Samples, channels, channels known, height, width.
SIZES = [(1, 1, 1, 1, 1), (3, 4, 5, 9, 7), (2, 8, 9, 11, 31), (2, 1, 2, 1, 63)]
FORMATS = [torch.contiguous_format, torch.channels_last]
TERMS = [(True, True), (True, False), (False, True), (False, False)]


def test_kernel_equals_reference_in_the_interpreter() -> None:
    """The tests of this file that are marked so pass in the interpreter."""
    assert_passes_in_the_interpreter(__file__)


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(
    sizes: tuple[int, ...],
    terms: tuple[bool, bool],
    memory_format: torch.memory_format,
    *,
    device: str,
    dtype: torch.dtype,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the dispatcher and the reference give, and the samplers' advance of the same."""
    samples, channels, n_known, height, width = sizes
    shape = (samples, channels, height, width)
    rows, latents = draw(1, samples, 6), draw(2, *shape)
    prediction = draw(3, *shape).to(dtype).contiguous(memory_format=memory_format)
    known = draw(4, samples, n_known, height, width).to(dtype)
    history, noise = (draw(5 + k, *shape) if given else None for k, given in enumerate(terms))
    packed = torch.empty(
        samples, channels + n_known, height, width, dtype=dtype, memory_format=memory_format
    )
    reference = (torch.empty(shape), torch.empty(shape), packed)
    inputs = (rows, latents, prediction, known, history, noise)
    sampler_step_reference_(*reference, *inputs)
    moved = [None if part is None else part.to(device) for part in inputs]
    outcome = tuple(torch.empty_like(part, device=device) for part in reference)
    sampler_step_(*outcome, *moved)
    assert outcome[2].is_contiguous(memory_format=memory_format)
    wanted = advance(rows, latents, prediction, history, noise)
    return tuple(part.cpu() for part in outcome), reference, wanted


@in_interpreter
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("sizes", SIZES)
def test_step_in_the_interpreter(
    sizes: tuple[int, ...], memory_format: torch.memory_format, terms: tuple[bool, bool]
) -> None:
    """Awkward sizes, both memory formats, with and without history and noise: every bit."""
    ours, reference, wanted = step(sizes, terms, memory_format, device="cpu", dtype=torch.float32)
    for part, expected in zip(ours, reference, strict=True):
        assert torch.equal(part, expected)
    assert torch.equal(ours[0], wanted[0])
    assert torch.equal(ours[1], wanted[1])


@in_interpreter
def test_step_over_its_own_input_in_the_interpreter() -> None:
    """The next latents take the place of the latents, x0 that of the history."""
    latents, history, known = draw(1, 2, 4, 9, 9), draw(2, 2, 4, 9, 9), draw(3, 2, 5, 9, 9)
    rows, prediction, noise = draw(4, 2, 6), draw(5, 2, 4, 9, 9), draw(6, 2, 4, 9, 9)
    wanted = sampler_step(rows, latents, prediction, known, history=history, noise=noise)
    packed = torch.empty(2, 9, 9, 9)
    sampler_step_(latents, history, packed, rows, latents, prediction, known, history, noise)
    for ours, expected in zip((latents, history, packed), wanted, strict=True):
        assert torch.equal(ours, expected)


@in_interpreter
def test_views_in_the_interpreter() -> None:
    """Slices of larger tensors are read where they lie."""
    rows, known = draw(1, 6, 2).T, draw(2, 2, 9, 5, 4)[:, 2:7]
    latents, history = draw(3, 2, 8, 5, 4)[:, ::2], draw(4, 2, 5, 4, 4).permute(0, 3, 1, 2)
    prediction = draw(5, 4, 4, 5, 8)[::2, ..., ::2]
    ours = sampler_step(rows, latents, prediction, known, history=history)
    wanted = advance(rows, latents, prediction, history, None)
    assert torch.equal(ours[0], wanted[0])
    assert torch.equal(ours[1], wanted[1])
    assert torch.equal(ours[2], torch.cat([wanted[0], known], 1))


@pytest.mark.skipif(interpreted(), reason="a process that interprets cannot compile")
def test_kernel_compiles_for_hopper_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler accepts the kernel, and joins no product with a sum."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.sampler_step.kernel import PIXELS, _sampler_step

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fixed = {"HISTORY": True, "NOISE": True, "PIXELS": PIXELS, "CHANNELS": 16}
    pointers = dict.fromkeys(("following", "x0", "rows", "latents", "history", "noise"), "*fp32")
    pointers |= dict.fromkeys(("packed", "prediction", "known"), "*bf16")
    types = {
        name: "constexpr" if name in fixed else pointers.get(name, "i32")
        for name in _sampler_step.arg_names
    }
    compiled = triton.compile(
        ASTSource(_sampler_step, types, constexprs=fixed),
        target=GPUTarget("cuda", 90, 32),
        options={"enable_fp_fusion": False},
    )
    assert "mul" in compiled.asm["ptx"]
    assert "fma" not in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("sizes", [*SIZES, (16, 4, 5, 64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step_on_a_gpu(
    sizes: tuple[int, ...],
    memory_format: torch.memory_format,
    terms: tuple[bool, bool],
    dtype: torch.dtype,
) -> None:
    """Compiled, in every type of the U-Net: the reference's bits."""
    ours, reference, _ = step(sizes, terms, memory_format, device="cuda", dtype=dtype)
    for part, expected in zip(ours, reference, strict=True):
        assert torch.equal(part, expected)
