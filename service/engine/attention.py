"""Which implementation of attention the U-Net runs."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import time
from collections.abc import Callable
from statistics import median
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Literal["auto", "xformers", "sdpa", "cudnn"]
Chosen = Literal["xformers", "sdpa", "cudnn"]
# Of queries, keys and values. [N, L, H, W] and [N, K, H, W] twice to [N, L, H, W]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# xformers is the default unless it takes so many times as long as torch's own attention.
MUCH_SLOWER = 1.1

logger = logging.getLogger(__name__)


def attend_by_torch(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention by whichever kernel torch chooses."""
    queries, keys, values = (tokens.transpose(1, 2) for tokens in (queries, keys, values))
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)


def attend_by_cudnn(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention by cuDNN's kernels alone."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attend_by_torch(queries, keys, values)


def attend_by_xformers(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention by whichever kernel xformers chooses."""
    attended: Tensor = _xformers()(queries, keys, values)
    return attended


ATTEND: dict[Chosen, Attend] = {
    "xformers": attend_by_xformers,
    "sdpa": attend_by_torch,
    "cudnn": attend_by_cudnn,
}


def _xformers() -> Attend:
    attend: Attend = importlib.import_module("xformers.ops").memory_efficient_attention
    return attend


def xformers_obstacle(
    device: torch.device, dtype: torch.dtype, attend: Attend | None = None
) -> str | None:
    """Why xformers cannot run here; None where it can.

    To be installed is not enough: its wheels ask for the runtime of CUDA 12, and where a torch for
    CUDA 13 finds none to load they import, warn, and have no kernel. So a small attention is run.

    Args:
        device: Of the base.
        dtype: Of the base.
        attend: xformers' attention; imported unless given.
    """
    if device.type != "cuda" and attend is None:
        return f"the base is on {device.type}"
    try:
        attend = attend or _xformers()
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


def times_as_long(attend: Attend, peer: Attend, tokens: Tensor, *, repeats: int = 5) -> float:
    """How many times as long one way of attention takes as another, by medians, in turns.

    Args:
        attend: The one.
        peer: The other.
        tokens: Queries, keys and values alike. [N, L, H, W]
        repeats: Timings of each, of several calls in a row.
    """
    seconds: dict[Attend, list[float]] = {attend: [], peer: []}
    for turn in range(-1, repeats):
        for way, kept in seconds.items():
            _synchronize(tokens.device)
            began = time.perf_counter()
            for _ in range(10):
                way(tokens, tokens, tokens)
            _synchronize(tokens.device)
            if turn >= 0:
                kept.append(time.perf_counter() - began)
    return median(seconds[attend]) / median(seconds[peer])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def attention_for(
    setting: Attention, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> Chosen:
    """Which attention to run, of what runs here; auto is timed.

    Args:
        setting: auto, xformers, sdpa or cudnn.
        device: Of the base.
        dtype: Of the base.
        shape: Of the largest attention that the base computes. (N, L, H, W)

    Raises:
        ValueError: The setting is unknown, or asks for what cannot run here.
    """
    obstacle = None
    slower = 1.0
    if setting in ("auto", "xformers"):
        obstacle = xformers_obstacle(device, dtype)
    if setting == "auto" and obstacle is None:
        tokens = torch.randn(shape, device=device, dtype=dtype)
        slower = times_as_long(attend_by_xformers, attend_by_torch, tokens)
    return choose_attention(setting, device.type, obstacle=obstacle, slower=slower)


def choose_attention(
    setting: Attention, device_type: str, *, obstacle: str | None, slower: float = 1.0
) -> Chosen:
    """Which attention to run.

    Args:
        setting: auto, xformers, sdpa or cudnn.
        device_type: Of the base, "cuda" or "cpu".
        obstacle: Why xformers cannot run, from ``xformers_obstacle``.
        slower: How many times as long as torch's own attention xformers takes.

    Raises:
        ValueError: The setting is unknown, or asks for what cannot run here.
    """
    if setting not in get_args(Attention):
        raise ValueError(f"attention is {setting!r}; use one of {get_args(Attention)}")
    if setting == "cudnn" and device_type != "cuda":
        raise ValueError(f"attention is 'cudnn', but the base is on {device_type}; use 'sdpa'")
    if setting == "xformers" and obstacle is not None:
        raise ValueError(
            f"attention is 'xformers', but {obstacle}; pip install 'realfill-serve[gpu]' on a "
            "machine with CUDA, or set attention to 'auto' or 'sdpa'"
        )
    if setting != "auto":
        return setting
    if obstacle is not None:
        if device_type == "cuda":
            logger.warning("attention is sdpa: xformers cannot run, since %s", obstacle)
        return "sdpa"
    if slower > MUCH_SLOWER:
        logger.info("attention is sdpa: xformers takes %.2f times as long here", slower)
        return "sdpa"
    logger.info("attention is xformers: it takes %.2f times as long as sdpa here", slower)
    return "xformers"
