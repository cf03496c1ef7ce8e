"""Which numbers a device computes with, in training and in serving."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Precision(NamedTuple):
    """Two choices that need not be the same on a CPU.

    Attributes:
        dtype: Of a base's weights, and of what its layers hand on.
        products: What its linear layers and convolutions multiply in.
    """

    dtype: torch.dtype
    products: torch.dtype


def training_dtype(device: str | torch.device) -> torch.dtype:
    """Precision to load the base in for training: bfloat16 where the device computes in it."""
    kind = torch.device(device).type
    quick = kind == "cuda" or (kind == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if quick else torch.float32


def serving_precision(device: str | torch.device, wanted: str = "auto") -> Precision:
    """Precision to serve a base in.

    On a CPU bfloat16 is for products alone. Weights are kept, and adapters added to them, in
    float32, and rounded once; sums, norms and attention are in float32 too.

    Args:
        device: Where the base will live.
        wanted: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for bfloat16 where the device
            computes in it and float32 elsewhere.

    Raises:
        ValueError: This CPU does not multiply in bfloat16.
    """
    if wanted == "auto":
        wanted = str(training_dtype(device)).removeprefix("torch.")
    dtype: torch.dtype = getattr(torch, wanted)
    if torch.device(device).type != "cpu" or dtype != torch.bfloat16:
        return Precision(dtype, dtype)
    # The stubs know nothing of it.
    multiplies: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not multiplies:
        raise ValueError(
            "dtype is bfloat16, in which this CPU does not multiply; use float32 or auto"
        )
    return Precision(torch.float32, dtype)
