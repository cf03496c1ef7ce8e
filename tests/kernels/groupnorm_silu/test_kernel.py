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
    y: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    silu: bool,
    added: Tensor | None = None,
) -> None:
    """Twice the reference's error plus one epsilon, both against float64."""
    summed = x.double() if added is None else x.double() + added.double()[:, :, None, None]
    exact = F.group_norm(summed, groups, weight.double(), bias.double(), 1e-5)
    exact = F.silu(exact) if silu else exact
    reference = groupnorm_silu_reference(x, groups, weight, bias, 1e-5, silu, added)
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
    """Strides of no memory format are read, and the outcome is contiguous."""
    x = features(3, 12, 20, 34)[::2, ::2, 1:19, ::3]
    weight, bias = (tensor[::2] for tensor in parameters(12))
    y = groupnorm_silu(x, 3, weight, bias, 1e-5)
    assert y.is_contiguous()
    assert_as_exact_as_reference(y, x, 3, weight, bias, True)


@in_interpreter
@pytest.mark.parametrize(("channels", "side"), [(4, 16), (4, 20), (240, 9), (1024, 11)])
def test_a_group_far_from_zero_in_the_interpreter(channels: int, side: int) -> None:
    """With a mean of 4096 and a deviation of 1, E[x^2] - E[x]^2 would be noise in float32.

    Lanes see one pixel or many, and not all of them as many.
    """
    x = features(2, channels, side, side, mean=4096)
    weight, bias = torch.ones(channels), torch.zeros(channels)
    y = groupnorm_silu(x, 2, weight, bias, 1e-5)
    assert_as_exact_as_reference(y, x, 2, weight, bias, True)
    group = x[0, : channels // 2]
    mean, squared = group.mean(), (group**2).mean()
    assert abs(float(squared - mean**2) - float(group.double().var())) > 0.1


@in_interpreter
def test_a_sample_does_not_depend_on_its_batch_in_the_interpreter() -> None:
    """Alone and at another place, the same bits."""
    x = features(3, 8, 20, 20)
    weight, bias = parameters(8)
    together = groupnorm_silu(x, 2, weight, bias, 1e-5)
    for n in range(3):
        assert torch.equal(groupnorm_silu(x[n : n + 1], 2, weight, bias, 1e-5)[0], together[n])
    assert torch.equal(groupnorm_silu(x[[2, 0, 1]], 2, weight, bias, 1e-5), together[[2, 0, 1]])


@in_interpreter
@pytest.mark.parametrize("memory_format", FORMATS)
def test_channels_far_from_each_other_in_the_interpreter(
    memory_format: torch.memory_format,
) -> None:
    """A group of channels around 0, 1000 and 2000 is as exact as one around one number."""
    x = features(2, 6, 9, 15) + 1000.0 * torch.arange(3).repeat(2)[:, None, None]
    x = x.contiguous(memory_format=memory_format)
    weight, bias = parameters(6)
    y = groupnorm_silu(x, 2, weight, bias, 1e-5)
    assert_as_exact_as_reference(y, x, 2, weight, bias, True)


@in_interpreter
@pytest.mark.parametrize("side", [5, 20])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_what_is_added_in_the_interpreter(memory_format: torch.memory_format, side: int) -> None:
    """Each sample's own, to each channel, before the mean is taken; in one launch and in two."""
    x = features(3, 20, side, side).contiguous(memory_format=memory_format)
    weight, bias = parameters(20)
    added = features(3, 40, mean=-2)[:, ::2]
    y = groupnorm_silu(x, 2, weight, bias, 1e-5, added=added)
    assert_as_exact_as_reference(y, x, 2, weight, bias, True, added)


@pytest.mark.parametrize(
    ("channels", "span"),
    [(128, 64), (256, 64), (320, 120), (512, 64), (640, 120), (960, 120), (1920, 120), (2560, 240)],
)
def test_a_span_is_whole_groups_that_begin_on_sixteen_bytes(channels: int, span: int) -> None:
    """Of half precision, in all of SD2's sizes, with few lanes idle, and never a narrow strip."""
    from kernels.groupnorm_silu.kernel import tiling

    tile = tiling(channels, 32, 4096)
    assert (tile["SPAN"], tile["SPAN"] % 8, tile["SPAN"] % tile["GROUP"]) == (span, 0, 0)
    assert (tile["CHUNK"], tiling(channels, 32, 64)["CHUNK"]) == (128, 64)


@pytest.mark.skipif(interpreted(), reason="a process that interprets cannot compile")
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("side", [8, 64])
@pytest.mark.parametrize("channels", [320, 1920, 2560])
def test_kernels_compile_for_hopper_without_a_gpu(
    channels: int, side: int, added: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler accepts both; channels-last features are moved sixteen bytes at a time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.groupnorm_silu import kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile: dict[str, object] = dict(kernel.tiling(channels, 32, side * side))
    # What a launch says of channels-last features: one channel lies beside the next.
    tile |= {"x_channel": 1} if added else {"x_channel": 1, "added": None}
    chunks = max(1, side * side // kernel.tiling(channels, 32, side * side)["CHUNK"])
    last = {"y_channel": 1, "CHUNKS": chunks, "ALONE": chunks == 1, "SILU": True}
    pointers = dict.fromkeys(("x", "y", "weight", "bias", "added"), "*bf16")
    pointers |= {"means": "*fp32", "squares": "*fp32", "eps": "fp32"}
    ptx = {}
    for function, fixed, warps in (
        (kernel._statistics, tile, kernel.STATISTICS_WARPS),
        (kernel._normalise, {**tile, **last}, kernel.WARPS),
    ):
        types = {
            name: "constexpr" if name in fixed else pointers.get(name, "i32")
            for name in function.arg_names
        }
        # And of SD2's sizes: all are multiples of sixteen.
        sixteenths = {
            (place,): [["tt.divisibility", 16]]
            for place, kind in enumerate(types.values())
            if kind not in ("constexpr", "fp32")
        }
        compiled = triton.compile(
            ASTSource(function, types, constexprs=fixed, attrs=sixteenths),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": warps},
        )
        ptx[function] = compiled.asm["ptx"]
        assert "ld.global.v4.b32" in ptx[function]
        # Nothing of x is read in smaller pieces than sixteen bytes.
        assert "ld.global.b16" not in ptx[function].split("bar.sync")[0]
    assert "st.global.v4.b32" in ptx[kernel._normalise]
    assert "st.global.b16" not in ptx[kernel._normalise]


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


@pytest.mark.gpu
@pytest.mark.parametrize("side", [8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_added_on_a_gpu(side: int, dtype: torch.dtype) -> None:
    """Compiled: as exact as the reference, which loses 165 epsilons of 64x64 pixels in float32."""
    x = features(3, 320, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = parameters(320, dtype)
    added = features(3, 320, dtype=dtype, mean=-2)
    given = (tensor.cuda() for tensor in (weight, bias))
    y = groupnorm_silu(x.cuda(), 32, *given, 1e-5, added=added.cuda())
    assert_as_exact_as_reference(y.cpu(), x, 32, weight, bias, True, added)


@pytest.mark.gpu
def test_a_sample_does_not_depend_on_its_batch_on_a_gpu() -> None:
    """Alone and at another place, the same bits, at each of SD2's levels."""
    for channels, side in ((320, 64), (640, 32), (1280, 16), (2560, 8)):
        x = features(3, channels, side, side, dtype=torch.bfloat16).cuda()
        x = x.contiguous(memory_format=torch.channels_last)
        weight, bias = (tensor.cuda() for tensor in parameters(channels, torch.bfloat16))
        together = groupnorm_silu(x, 32, weight, bias, 1e-5)
        for n in range(3):
            assert torch.equal(groupnorm_silu(x[n : n + 1], 32, weight, bias, 1e-5)[0], together[n])
