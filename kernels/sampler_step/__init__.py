"""One denoising step of every sample, and the U-Net's next input."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.launch import kernels_run_on
from kernels.sampler_step.reference import sampler_step_reference_

__all__ = ["sampler_step", "sampler_step_"]

COEFFICIENTS = 6
KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def sampler_step(
    rows: Tensor,
    latents: Tensor,
    prediction: Tensor,
    known: Tensor,
    *,
    history: Tensor | None = None,
    noise: Tensor | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sampler_step_` into fresh memory.

    Args:
        rows, latents, prediction, known, history, noise: As in `sampler_step_`.
        dtype: Of the U-Net's input; that of `prediction` if None.
        memory_format: Of the U-Net's input: contiguous or channels-last.

    Returns:
        The next latents and the predicted x0, float32, contiguous [N, C, h, w], and the U-Net's
        next input [N, C + K, h, w].

    Raises:
        ValueError: As `sampler_step_`.
    """
    if latents.dim() != 4 or known.dim() != 4:
        raise ValueError(
            f"latents is {tuple(latents.shape)} and known {tuple(known.shape)}; pass "
            "[N, C, h, w] and [N, K, h, w]"
        )
    shape = (latents.shape[0], latents.shape[1] + known.shape[1], *latents.shape[2:])
    kind = dtype or prediction.dtype
    packed = torch.empty(shape, dtype=kind, device=latents.device, memory_format=memory_format)
    following = torch.empty(latents.shape, dtype=torch.float32, device=latents.device)
    x0 = torch.empty_like(following)
    sampler_step_(following, x0, packed, rows, latents, prediction, known, history, noise)
    return following, x0, packed


def sampler_step_(
    following: Tensor,
    x0: Tensor,
    packed: Tensor,
    rows: Tensor,
    latents: Tensor,
    prediction: Tensor,
    known: Tensor,
    history: Tensor | None = None,
    noise: Tensor | None = None,
) -> None:
    """Advance every sample by its own row of coefficients, on CUDA in one launch.

    x0 = row[4] * latents + row[5] * prediction, and following = row[0] * latents +
    row[1] * prediction + row[2] * history + row[3] * noise, from left to right in float32, each
    product and each sum rounded: no sample's value depends on its place in the batch. No gradient
    flows through it.

    Args:
        following: Memory of the next latents; may be `latents`. Float32, contiguous. [N, C, h, w]
        x0: Memory of the predicted x0; may be `history`. Float32, contiguous. [N, C, h, w]
        packed: Memory of the U-Net's next input, the next latents followed by `known`, of the
            U-Net's type; contiguous or channels-last. [N, C + K, h, w]
        rows: Coefficients of each sample's step, of any samplers. [N, 6], float32
        latents: Where the samples stand. [N, C, h, w]
        prediction: Output of the U-Net. [N, C, h, w]
        known: What stands behind the latents in the input: mask and masked image. [N, K, h, w]
        history: The x0 of the step before; finite, even where its coefficient is 0. None where
            no sample needs it. [N, C, h, w]
        noise: Fresh standard normal noise, likewise. [N, C, h, w]

    Raises:
        ValueError: Shapes, types, devices or strides do not fit.
    """
    given = {"latents": latents, "prediction": prediction, "history": history, "noise": noise}
    parts = {name: tensor for name, tensor in given.items() if tensor is not None}
    _check_parts(parts, rows, known)
    _check_outcomes(following, x0, packed, latents, known)
    if not packed.numel():
        return
    types = [tensor.dtype for tensor in (*parts.values(), known, packed)]
    with torch.no_grad():
        if kernels_run_on(latents.device) and all(kind in KERNEL_TYPES for kind in types):
            from kernels.sampler_step.kernel import sampler_step_kernel_ as step_
        else:
            step_ = sampler_step_reference_
        step_(following, x0, packed, rows, latents, prediction, known, history, noise)


def _check_parts(parts: dict[str, Tensor], rows: Tensor, known: Tensor) -> None:
    """Refuse what is read where it does not fit together."""
    latents = parts["latents"]
    if latents.dim() != 4:
        raise ValueError(f"latents is {tuple(latents.shape)}; pass [N, C, h, w]")
    if rows.shape != (len(latents), COEFFICIENTS) or rows.dtype != torch.float32:
        raise ValueError(
            f"rows is {rows.dtype} of shape {tuple(rows.shape)}; pass float32 of shape "
            f"{(len(latents), COEFFICIENTS)}"
        )
    sizes = (latents.shape[0], *latents.shape[2:])
    if known.dim() != 4 or (known.shape[0], *known.shape[2:]) != sizes:
        raise ValueError(
            f"known is {tuple(known.shape)}, but latents {tuple(latents.shape)}; pass "
            "[N, K, h, w] and [N, C, h, w]"
        )
    for name, tensor in (*parts.items(), ("known", known)):
        if name != "known" and tensor.shape != latents.shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, but latents {tuple(latents.shape)}; "
                "pass one shape"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; pass a floating tensor")
        if tensor.device != rows.device:
            raise ValueError(f"{name} is on {tensor.device}, but rows on {rows.device}; move it")


def _check_outcomes(
    following: Tensor, x0: Tensor, packed: Tensor, latents: Tensor, known: Tensor
) -> None:
    """Refuse memory to write to that is of another shape, type, place or layout."""
    for name, tensor in (("following", following), ("x0", x0)):
        right = tensor.shape == latents.shape and tensor.dtype == torch.float32
        if not right or not tensor.is_contiguous() or tensor.device != latents.device:
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; pass "
                f"contiguous float32 of shape {tuple(latents.shape)} on {latents.device}"
            )
    shape = (latents.shape[0], latents.shape[1] + known.shape[1], *latents.shape[2:])
    if packed.shape != shape or packed.device != latents.device:
        raise ValueError(
            f"packed is {tuple(packed.shape)} on {packed.device}; pass {shape} on {latents.device}"
        )
    last = torch.channels_last
    if not (packed.is_contiguous() or packed.is_contiguous(memory_format=last)):
        raise ValueError(
            f"packed has strides {packed.stride()}; pass a contiguous or channels-last tensor"
        )
    if not packed.is_floating_point():
        raise ValueError(f"packed is {packed.dtype}; pass a floating tensor")
