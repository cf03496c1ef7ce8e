"""Where Triton kernels can run: on CUDA devices, or on the CPU in Triton's interpreter."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


def interpreted() -> bool:
    """Whether Triton was told to interpret kernels, which it reads when it is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def kernels_run_on(device: torch.device) -> bool:
    """Whether an op should launch its kernel for tensors of a device, rather than its reference."""
    runs = device.type == "cuda" or (device.type == "cpu" and interpreted())
    return runs and _triton_is_there()


@functools.cache
def _triton_is_there() -> bool:
    """Looked up once: a search of the import path takes longer than a small op."""
    return importlib.util.find_spec("triton") is not None
