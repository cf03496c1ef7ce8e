"""The kernels of groupnorm_silu equal their reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.groupnorm_silu import groupnorm_silu
from kernels.groupnorm_silu.reference import groupnorm_silu_reference
from kernels.launch import interpreted
from tests.kernels.interpreter import assert_passes_in_the_interpreter, in_interpreter

pytest.importorskip("triton", reason="Triton is there on Linux only")
pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

# Channels, groups, height, width: one value, one channel a group, several chunks and a rest.
SIZES = [(1, 1, 1, 1), (63, 63, 1, 5), (341, 11, 3, 1), (10, 2, 31, 11), (12, 4, 9, 63)]
FORMATS = [torch.contiguous_format, torch.channels_last]


def test_kernel_equals_reference_in_the_interpreter() -> None:
    """The tests of this file that are marked so pass in the interpreter."""
    assert_passes_in_the_interpreter(__file__)


def features(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.5) -> Tensor:
    """Normal numbers around a mean."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


def parameters(channels: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Weight and bias."""
    return features(channels, dtype=dtype, mean=1), features(channels, dtype=dtype, mean=0)


def assert_as_exact_as_reference(
    y: Tensor, x: Tensor, groups: int, weight: Tensor, bias: Tensor, silu: bool
) -> None:
    """Twice the reference's error plus one epsilon, both against float64."""
    exact = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5)
    exact = F.silu(exact) if silu else exact
    reference = groupnorm_silu_reference(x, groups, weight, bias, 1e-5, silu)
    error = (reference.double() - exact).abs().max()
    epsilon = torch.finfo(x.dtype).eps * exact.abs().max()
    assert float((y.double() - exact).abs().max()) <= float(2 * error + epsilon)


@in_interpreter
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("channels", "groups", "height", "width"), SIZES)
def test_normalisation_in_the_interpreter(
    channels: int,
    groups: int,
    height: int,
    width: int,
    memory_format: torch.memory_format,
    silu: bool,
) -> None:
    """Awkward sizes in both memory formats come out as exact as the reference's."""
    x = features(2, channels, height, width).contiguous(memory_format=memory_format)
    weight, bias = parameters(channels)
    y = groupnorm_silu(x, groups, weight, bias, 1e-5, silu=silu)
    assert y.is_contiguous(memory_format=memory_format)
    assert_as_exact_as_reference(y, x, groups, weight, bias, silu)


@in_interpreter
def test_a_slice_in_the_interpreter() -> None:
    """Strides of no memory format are read where they lie."""
    x = features(3, 12, 20, 34)[::2, ::2, 1:19, ::3]
    weight, bias = (tensor[::2] for tensor in parameters(12))
    y = groupnorm_silu(x, 3, weight, bias, 1e-5)
    assert y.is_contiguous()
    assert_as_exact_as_reference(y, x, 3, weight, bias, True)


@in_interpreter
@pytest.mark.parametrize("side", [16, 20])
def test_a_group_far_from_zero_in_the_interpreter(side: int) -> None:
    """With a mean of 4096 and a deviation of 1, E[x^2] - E[x]^2 would be noise in float32."""
    x = features(2, 4, side, side, mean=4096)
    assert_as_exact_as_reference(
        groupnorm_silu(x, 2, torch.ones(4), torch.zeros(4), 1e-5),
        x,
        2,
        torch.ones(4),
        torch.zeros(4),
        True,
    )
    mean, squared = x[0, :2].mean(), (x[0, :2] ** 2).mean()
    assert abs(float(squared - mean**2) - float(x[0, :2].double().var())) > 0.1


@in_interpreter
def test_a_sample_does_not_depend_on_its_batch_in_the_interpreter() -> None:
    """Alone and at another place, the same bits."""
    x = features(3, 8, 20, 20)
    weight, bias = parameters(8)
    together = groupnorm_silu(x, 2, weight, bias, 1e-5)
    for n in range(3):
        assert torch.equal(groupnorm_silu(x[n : n + 1], 2, weight, bias, 1e-5)[0], together[n])
    assert torch.equal(groupnorm_silu(x[[2, 0, 1]], 2, weight, bias, 1e-5), together[[2, 0, 1]])


@pytest.mark.skipif(interpreted(), reason="a process that interprets cannot compile")
@pytest.mark.parametrize("alone", [True, False])
def test_kernels_compile_for_hopper_without_a_gpu(
    alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler accepts both kernels, which the interpreter alone does not prove."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.groupnorm_silu import kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = {"CHUNK": kernel.CHUNK_PIXELS, "PIXELS": 32, "GROUPS": 8, "CHANNELS": 16}
    constants = {
        kernel._statistics: tile,
        kernel._normalise: {**tile, "CHUNKS": 1 if alone else 16, "ALONE": alone, "SILU": True},
    }
    pointers = dict.fromkeys(("x", "y", "weight", "bias"), "*bf16")
    pointers |= {"means": "*fp32", "squares": "*fp32", "eps": "fp32"}
    for function, fixed in constants.items():
        types = {
            name: "constexpr" if name in fixed else pointers.get(name, "i32")
            for name in function.arg_names
        }
        compiled = triton.compile(
            ASTSource(function, types, constexprs=fixed), target=GPUTarget("cuda", 90, 32)
        )
        assert "ld.global" in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("channels", "groups", "height", "width"),
    [*SIZES, (320, 32, 64, 64), (2560, 32, 8, 8), (960, 32, 33, 31)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalisation_on_a_gpu(
    channels: int,
    groups: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    """Compiled, in every type and both memory formats, as exact as the reference."""
    x = features(2, channels, height, width, dtype=dtype).contiguous(memory_format=memory_format)
    weight, bias = parameters(channels, dtype)
    y = groupnorm_silu(x.cuda(), groups, weight.cuda(), bias.cuda(), 1e-5)
    assert y.is_contiguous(memory_format=memory_format)
    assert_as_exact_as_reference(y.cpu(), x, groups, weight, bias, True)
