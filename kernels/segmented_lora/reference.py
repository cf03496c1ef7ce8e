"""Definition of segmented_lora in torch, and what computes it on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# Products of fewer rows or columns are rounded by where the operands lie in memory.
SMALLEST_PRODUCT = 16


def segmented_lora_reference_(
    out: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, slots: Tensor, scales: Tensor
) -> None:
    """out[n] += scales[s] * (x[n] @ lora_A[s].T) @ lora_B[s].T in float32 or wider, rounded once.

    Args:
        out, x, lora_A, lora_B, slots, scales: As in `kernels.segmented_lora.segmented_lora_`.
    """
    _add_terms_(out, x, lora_A, lora_B, slots, scales, shrink=_shrink)


def segmented_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    slots: Tensor,
    scales: Tensor,
) -> Tensor:
    """x[n] @ weight.T + bias and each sample's term in float32 or wider, rounded once.

    Args:
        x, weight, bias, lora_A, lora_B, slots, scales: As in
            `kernels.segmented_lora.segmented_linear`.
    """
    inner = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(inner)
    out = F.linear(wide, weight.to(inner), None if bias is None else bias.to(inner))
    segmented_lora_reference_(out, wide, lora_A, lora_B, slots, scales)
    return out.to(x.dtype)


def segmented_conv_lora_reference_(
    out: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    slots: Tensor,
    scales: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> None:
    """out[n] += scales[s] * lora_B[s] @ conv(x[n], lora_A[s]), rounded once.

    Args:
        out, x, lora_A, lora_B, slots, scales, kernel_size, stride, padding: As in
            `kernels.segmented_lora.segmented_conv_lora_`.
    """
    columns = out.view(*out.shape[:2], -1).transpose(1, 2)
    if kernel_size == (1, 1) and padding == (0, 0):
        pixels = x[:, :, :: stride[0], :: stride[1]].flatten(2).transpose(1, 2)
        _add_terms_(columns, pixels, lora_A, lora_B, slots, scales, shrink=_shrink)
        return

    def shrink(x: Tensor, lora_A: Tensor) -> Tensor:
        return _shrink_by_convolution(x, lora_A, kernel_size, stride, padding)

    _add_terms_(columns, x, lora_A, lora_B, slots, scales, shrink=shrink)


def _add_terms_(
    out: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    slots: Tensor,
    scales: Tensor,
    *,
    shrink: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Run by run of samples that have an adapter, so that out and x are only ever viewed."""
    inner = torch.promote_types(out.dtype, torch.float32)
    for start, run in _runs(slots.tolist()):
        samples = slice(start, start + len(run))
        # For a batch of one torch takes other algorithms, which round otherwise: it is made two.
        run = run * 2 if len(run) == 1 else run
        inputs = x[samples].to(inner).expand(len(run), *x.shape[1:])
        down = shrink(inputs, _of_slots(lora_A, run).to(inner))
        down *= _of_slots(scales, run).to(inner)[:, None, None]
        _expand_(out[samples], down, _of_slots(lora_B, run).to(inner))


def _runs(slots: list[int]) -> list[tuple[int, list[int]]]:
    """Where each unbroken run of samples with an adapter starts, and their slots."""
    runs: list[tuple[int, list[int]]] = []
    before = -1
    for n, slot in enumerate(slots):
        if slot >= 0:
            if before < 0:
                runs.append((n, []))
            runs[-1][1].append(slot)
        before = slot
    return runs


def _of_slots(packed: Tensor, slots: list[int]) -> Tensor:
    """What each of these slots holds: a view where they are equal or follow each other. [N, ...]"""
    first, number = slots[0], len(slots)
    if slots == list(range(first, first + number)):
        return packed[first : first + number]
    if slots.count(first) == number:
        return packed[first].expand(number, *packed.shape[1:])
    return packed[slots]


def _shrink(x: Tensor, lora_A: Tensor) -> Tensor:
    """x[n] @ lora_A[n].T. [N, T, R]"""
    return _product(x, lora_A.transpose(1, 2))


def _shrink_by_convolution(
    x: Tensor,
    lora_A: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """Each sample by its own filters, as the groups of one convolution. [N, H' * W', R]"""
    samples, channels, height, width = x.shape
    rank = lora_A.shape[1]
    filters = lora_A.reshape(samples * rank, channels, *kernel_size)
    grouped = x.reshape(1, samples * channels, height, width)
    down = F.conv2d(grouped, filters, stride=stride, padding=padding, groups=samples)
    return down.view(samples, rank, -1).transpose(1, 2)


def _expand_(out: Tensor, down: Tensor, lora_B: Tensor) -> None:
    """out[n] += down[n] @ lora_B[n].T, of as many samples as out has. [N, T, out]"""
    factors = down, lora_B.transpose(1, 2)
    if out.stride(1) == 1:
        # Pixels lie closer than channels: the product of the transposes writes along them.
        out, factors = out.transpose(1, 2), (lora_B, down.transpose(1, 2))
    if min(out.shape[1:]) < SMALLEST_PRODUCT:
        out.copy_(out.to(down.dtype) + _product(*factors)[: len(out)])
    elif out.dtype == down.dtype and len(out) == len(down):
        out.baddbmm_(*factors)
    else:
        widened = out.to(down.dtype).expand(len(down), *out.shape[1:])
        out.copy_(torch.baddbmm(widened, *factors)[: len(out)])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left[n] @ right[n], padded to a size at which a sample's bits are its own. [N, T, out]"""
    rows, columns = left.shape[1], right.shape[2]
    if min(rows, columns) < SMALLEST_PRODUCT:
        left = F.pad(left, (0, 0, 0, max(0, SMALLEST_PRODUCT - rows)))
        right = F.pad(right, (0, max(0, SMALLEST_PRODUCT - columns)))
    return torch.bmm(left, right)[:, :rows, :columns]
