"""segmented_lora on the CPU: every sample its own adapter's term, and wrong input refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kernels.segmented_lora import segmented_conv_lora_, segmented_lora_

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ONE_TAP: dict[str, Any] = {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0)}
THREE_TAPS: dict[str, Any] = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1)}


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_factors(slots: int, depth: int, columns: int, rank: int) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B as views into one buffer, a slot after the other."""
    buffer = draw(9, slots, rank * (depth + columns) + 3)
    lora_A = buffer[:, : rank * depth].unflatten(1, (rank, depth))
    return lora_A, buffer[:, rank * depth : -3].unflatten(1, (columns, rank))


def test_terms_of_small_integers_are_exact() -> None:
    """A case small enough to follow by hand: slot 1, none, slot 0."""
    lora_A = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    lora_B = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    out = torch.ones(3, 1, 2)
    x = torch.tensor([[[5.0, 6.0]], [[7.0, 8.0]], [[9.0, 10.0]]])
    slots, scales = torch.tensor([1, -1, 0]), torch.tensor([0.5, 2.0])
    segmented_lora_(out, x, lora_A, lora_B, slots, scales)
    assert out.tolist() == [[[37.0, 49.0]], [[1.0, 1.0]], [[5.5, 10.0]]]


@settings(deadline=None, max_examples=60)
@given(
    slots=st.lists(st.integers(-1, 3), min_size=1, max_size=7),
    tokens=st.integers(1, 30),
    depth=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.sampled_from([1, 5, 16]),
    dtype=st.sampled_from(TYPES),
    factor=st.sampled_from(TYPES),
)
def test_every_sample_gets_its_own_term_rounded_once(
    slots: list[int],
    tokens: int,
    depth: int,
    columns: int,
    rank: int,
    dtype: torch.dtype,
    factor: torch.dtype,
) -> None:
    """Whatever the slots, sizes and types, the error is that of one rounding."""
    samples = len(slots)
    lora_A, lora_B = (part.to(factor) for part in packed_factors(4, depth, columns, rank))
    x, out = draw(1, samples, tokens, depth).to(dtype), draw(2, samples, tokens, columns).to(dtype)
    scales = torch.tensor([1.0, 2.0, 0.0, -0.3])
    wanted, magnitude = out.double().clone(), out.double().abs()
    for n, slot in enumerate(slots):
        if slot >= 0:
            parts = (x[n].double(), lora_A[slot].double().T, lora_B[slot].double().T)
            scale = float(scales[slot])
            wanted[n] += scale * (parts[0] @ parts[1]) @ parts[2]
            magnitude[n] += abs(scale) * (parts[0].abs() @ parts[1].abs()) @ parts[2].abs()
    before = out.clone()
    segmented_lora_(out, x, lora_A, lora_B, torch.tensor(slots), scales)
    inner = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    bound = torch.finfo(dtype).eps / 2 * wanted.abs() + (rank + depth + 3) * inner * magnitude
    assert ((out.double() - wanted).abs() <= bound + 1e-7).all()
    for n, slot in enumerate(slots):
        assert slot >= 0 or torch.equal(out[n], before[n])


@pytest.mark.parametrize(
    ("tokens", "depth", "columns"),
    [(256, 128, 128), (64, 192, 192), (63, 341, 65), (1, 63, 341), (9, 40, 4), (341, 5, 1)],
)
def test_a_sample_does_not_depend_on_its_batch(tokens: int, depth: int, columns: int) -> None:
    """Alone, beside others, at another place, without a neighbour's adapter: the same bits."""
    lora_A, lora_B = packed_factors(8, depth, columns, 32)
    x, out = draw(1, 8, tokens, depth), draw(2, 8, tokens, columns)
    slots, scales = torch.arange(8, dtype=torch.int32), torch.rand(8)
    together = out.clone()
    segmented_lora_(together, x, lora_A, lora_B, slots, scales)
    order = torch.tensor([5, 2, 7, 0, 1, 3, 6, 4])
    moved = out[order]
    segmented_lora_(moved, x[order], lora_A, lora_B, slots[order], scales)
    assert torch.equal(moved, together[order])
    thinned, fewer = out.clone(), slots.clone()
    fewer[[0, 3, 4]] = -1
    segmented_lora_(thinned, x, lora_A, lora_B, fewer, scales)
    kept = fewer >= 0
    assert torch.equal(thinned[kept], together[kept])
    assert torch.equal(thinned[~kept], out[~kept])
    for start, stop in [(0, 1), (3, 4), (7, 8), (1, 3), (2, 5), (3, 8)]:
        part = out[start:stop].clone()
        segmented_lora_(part, x[start:stop], lora_A, lora_B, slots[start:stop], scales)
        assert torch.equal(part, together[start:stop])


@pytest.mark.parametrize("slots", [[1, 1, 1], [2, 0, 1], [0, 1, 2], [1, -1, 2], [-1, -1, -1]])
def test_padding_the_rank_with_zeros_adds_nothing(slots: list[int]) -> None:
    """An adapter of rank 16 in an arena of rank 32 gives the same, up to rounding."""
    lora_A, lora_B = packed_factors(3, 24, 20, 16)
    wide_A, wide_B = F.pad(lora_A, (0, 0, 0, 16)), F.pad(lora_B, (0, 16))
    x, out = draw(1, 3, 10, 24), draw(2, 3, 10, 20)
    wide = out.clone()
    scales = torch.tensor([1.0, 2.0, 3.0])
    segmented_lora_(out, x, lora_A, lora_B, torch.tensor(slots), scales)
    segmented_lora_(wide, x, wide_A, wide_B, torch.tensor(slots), scales)
    torch.testing.assert_close(wide, out, rtol=0, atol=1e-5)


def test_views_are_written_where_they_lie_and_nowhere_else() -> None:
    """Transposed and sliced tensors leave what is around them alone."""
    lora_A, lora_B = packed_factors(3, 6, 4, 2)
    field = torch.full((3, 9, 20), 7.0)
    out = field[:, 1:9:2, 5:15].transpose(1, 2)
    x = draw(1, 6, 3, 20).permute(1, 2, 0)[:, ::2]
    wanted = out.contiguous()
    arguments = (lora_A, lora_B, torch.tensor([2, 0, 2]), torch.ones(3))
    segmented_lora_(wanted, x.contiguous(), *arguments)
    segmented_lora_(out, x, *arguments)
    torch.testing.assert_close(out, wanted)
    out.fill_(7.0)
    assert torch.equal(field, torch.full((3, 9, 20), 7.0))


@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("out_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding"),
    [((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (1, 1)), ((1, 1), (2, 1), (0, 0))],
)
@pytest.mark.parametrize("slots", [[0, 1, 2], [2, -1, 2]])
def test_convolutions_equal_fused_weights(
    slots: list[int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    x_format: torch.memory_format,
    out_format: torch.memory_format,
) -> None:
    """Each sample comes out as by the convolution with its own adapter fused, in its format."""
    weight = draw(3, 8, 6, *kernel_size)
    lora_A, lora_B = packed_factors(3, weight[0].numel(), 8, 16)
    x = draw(1, 3, 6, 9, 7).contiguous(memory_format=x_format)
    scales = torch.tensor([1.0, 2.0, -0.5])
    out = F.conv2d(x, weight, stride=stride, padding=padding)
    out = out.clone(memory_format=out_format)
    segmented_conv_lora_(
        out,
        x,
        lora_A,
        lora_B,
        torch.tensor(slots),
        scales,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
    )
    assert out.is_contiguous(memory_format=out_format)
    for n, slot in enumerate(slots):
        fused = weight.double()
        if slot >= 0:
            term = float(scales[slot]) * lora_B[slot].double() @ lora_A[slot].double()
            fused = fused + term.view_as(weight)
        wanted = F.conv2d(x[n : n + 1].double(), fused, stride=stride, padding=padding)[0]
        torch.testing.assert_close(out[n].double(), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("channels", "side"), [(32, 16), (8, 16), (192, 8), (320, 8), (33, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolved_sample_does_not_depend_on_its_batch(
    channels: int, side: int, memory_format: torch.memory_format
) -> None:
    """Alone, at another place or beside others, the same bits."""
    lora_A, lora_B = packed_factors(6, channels * 9, 48, 32)
    x, out = draw(1, 6, channels, side, side), draw(2, 6, 48, side, side)
    x, out = (tensor.contiguous(memory_format=memory_format) for tensor in (x, out))
    slots, scales = torch.arange(6), torch.rand(6)
    together = out.clone()
    segmented_conv_lora_(together, x, lora_A, lora_B, slots, scales, **THREE_TAPS)
    order = torch.tensor([5, 2, 0, 1, 3, 4])
    moved = out[order]
    segmented_conv_lora_(moved, x[order], lora_A, lora_B, slots[order], scales, **THREE_TAPS)
    assert torch.equal(moved, together[order])
    for start, stop in [(0, 1), (5, 6), (1, 3), (2, 5), (1, 6)]:
        part = out[start:stop].clone()
        arguments = (x[start:stop], lora_A, lora_B, slots[start:stop], scales)
        segmented_conv_lora_(part, *arguments, **THREE_TAPS)
        assert torch.equal(part, together[start:stop])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": torch.zeros(2, 4, 3)}, r"x \(2, 4, 3\)"),
        ({"out": torch.zeros(15)}, "pass .N, T, out."),
        ({"lora_A": torch.zeros(2, 16, 5)}, r"pass \[L, R, 3\]"),
        ({"lora_B": torch.zeros(2, 4, 16)}, r"here \(2, 5, 16\)"),
        ({"lora_A": torch.zeros(2, 0, 3), "lora_B": torch.zeros(2, 5, 0)}, "use 1 to 128"),
        ({"slots": torch.tensor([0.0, 1.0, 0.0])}, "pass int32 or int64"),
        ({"slots": torch.tensor([0, 1])}, "pass int32 or int64"),
        ({"slots": torch.tensor([0, 2, 0])}, "slot 2 is out of range; use -1 to 1"),
        ({"slots": torch.tensor([0, -2, 0])}, "slot -2 is out of range"),
        ({"scales": torch.ones(3)}, r"pass float32 of shape \(2,\)"),
        ({"scales": torch.ones(2).double()}, "pass float32"),
        ({"x": torch.zeros(3, 4, 3).half()}, "use one floating type"),
        ({"lora_B": torch.zeros(2, 5, 16).half()}, "use one floating type"),
        ({"lora_A": torch.zeros(2, 16, 3, device="meta")}, "move it"),
        ({"slots": torch.zeros(3, dtype=torch.int32, device="meta")}, "move it"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes: dict[str, Any], says: str) -> None:
    """Each fault is named with the value and what to pass, and nothing is written."""
    arguments: dict[str, Any] = {
        "out": torch.zeros(3, 4, 5),
        "x": torch.ones(3, 4, 3),
        "lora_A": torch.ones(2, 16, 3),
        "lora_B": torch.ones(2, 5, 16),
        "slots": torch.tensor([0, 1, -1]),
        "scales": torch.ones(2),
    }
    with pytest.raises(ValueError, match=says):
        segmented_lora_(**{**arguments, **changes})
    assert not arguments["out"].any()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": torch.ones(2, 3, 7)}, r"\[N, in, H, W\]"),
        ({"out": torch.zeros(2, 5, 7, 6)}, r"the convolution gives \(7, 7\) pixels"),
        ({"out": torch.zeros(2, 5, 7, 14)[..., ::2]}, None),
        ({"out": torch.zeros(2, 5, 7, 9)[..., :7]}, "contiguous or channels-last"),
        ({"stride": (0, 1)}, "use at least 1, 1 and 0"),
        ({"lora_A": torch.ones(2, 16, 3)}, r"pass \[L, R, 27\]"),
    ],
)
def test_convolutions_that_do_not_fit_are_refused(
    changes: dict[str, Any], says: str | None
) -> None:
    """Sizes and memory formats are checked; evenly spaced pixels are all that it takes."""
    arguments: dict[str, Any] = {
        "out": torch.zeros(2, 5, 7, 7),
        "x": torch.ones(2, 3, 7, 7),
        "lora_A": torch.ones(2, 16, 27),
        "lora_B": torch.ones(2, 5, 16),
        "slots": torch.tensor([0, 1]),
        "scales": torch.ones(2),
        **THREE_TAPS,
        **changes,
    }
    if says is None:
        segmented_conv_lora_(**arguments)
        assert float(arguments["out"][0, 0, 3, 3]) == 16 * 27
    else:
        with pytest.raises(ValueError, match=says):
            segmented_conv_lora_(**arguments)


def test_empty_batches_are_left_alone() -> None:
    """No sample, or no token, is no work."""
    lora_A, lora_B = packed_factors(1, 3, 5, 16)
    for shape in ((0, 4), (2, 0)):
        slots = torch.zeros(shape[0], dtype=torch.int32)
        segmented_lora_(
            torch.zeros(*shape, 5), torch.zeros(*shape, 3), lora_A, lora_B, slots, torch.ones(1)
        )
    none = torch.zeros(0, 5, 2, 2), torch.zeros(0, 3, 2, 2)
    slots = torch.zeros(0, dtype=torch.int32)
    segmented_conv_lora_(*none, lora_A, lora_B, slots, torch.ones(1), **ONE_TAP)
