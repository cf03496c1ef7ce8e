"""Which implementation of attention the U-Net runs."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Attention = Literal["auto", "xformers", "sdpa", "cudnn"]

logger = logging.getLogger(__name__)


def xformers_obstacle(
    device: torch.device,
    dtype: torch.dtype,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> str | None:
    """Why xformers cannot run here; None where it can.

    To be installed is not enough: a wheel that was built for another torch imports, warns, and has
    no kernel for anything. So a small attention is run.

    Args:
        device: Of the base.
        dtype: Of the base.
        attend: xformers' attention; imported unless given.
    """
    if device.type != "cuda" and attend is None:
        return f"the base is on {device.type}"
    try:
        attend = attend or importlib.import_module("xformers.ops").memory_efficient_attention
    except (ImportError, OSError) as error:
        found = importlib.util.find_spec("xformers") is not None
        return f"it does not load ({_first_line(error)})" if found else "it is not installed"
    x = torch.zeros(1, 2, 1, 64, device=device, dtype=dtype)  # [N, tokens, heads, width]
    try:
        attend(x, x, x)
    except (NotImplementedError, RuntimeError) as error:
        return f"it has no kernel for torch {torch.__version__} here ({_first_line(error)})"
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0].strip() if lines else type(error).__name__


def choose_attention(
    setting: Attention, device_type: str, *, obstacle: str | None
) -> Literal["xformers", "sdpa", "cudnn"]:
    """Which attention to run.

    Args:
        setting: auto, xformers, sdpa or cudnn.
        device_type: Of the base, "cuda" or "cpu".
        obstacle: Why xformers cannot run, from ``xformers_obstacle``.

    Raises:
        ValueError: The setting is unknown, or asks for what cannot run here.
    """
    if setting not in get_args(Attention):
        raise ValueError(f"attention is {setting!r}; use one of {get_args(Attention)}")
    if setting == "cudnn" and device_type != "cuda":
        raise ValueError(f"attention is 'cudnn', but the base is on {device_type}; use 'sdpa'")
    if setting == "xformers" and obstacle is not None:
        raise ValueError(
            f"attention is 'xformers', but {obstacle}; pip install 'realfill-serve[gpu]' with the "
            "xformers that was built for this torch on a machine with CUDA, or set attention to "
            "'auto' or 'sdpa'"
        )
    if setting == "auto":
        if obstacle is not None and device_type == "cuda":
            logger.warning("attention is sdpa: xformers cannot run, since %s", obstacle)
        return "sdpa" if obstacle is not None else "xformers"
    return setting
