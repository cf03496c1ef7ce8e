"""Which implementation of attention the U-Net runs."""

from __future__ import annotations

from typing import Literal, get_args

Attention = Literal["auto", "xformers", "sdpa", "cudnn"]


def choose_attention(
    setting: Attention, device_type: str, *, installed: bool
) -> Literal["xformers", "sdpa", "cudnn"]:
    """Which attention to run.

    Args:
        setting: auto, xformers, sdpa or cudnn.
        device_type: Of the base, "cuda" or "cpu".
        installed: Whether xformers can be imported.

    Raises:
        ValueError: The setting is unknown, or asks for what cannot run here.
    """
    if setting not in get_args(Attention):
        raise ValueError(f"attention is {setting!r}; use one of {get_args(Attention)}")
    if setting == "cudnn" and device_type != "cuda":
        raise ValueError(f"attention is 'cudnn', but the base is on {device_type}; use 'sdpa'")
    usable = device_type == "cuda" and installed
    if setting == "xformers" and not usable:
        reason = "it is not installed" if device_type == "cuda" else f"the base is on {device_type}"
        raise ValueError(
            f"attention is 'xformers', but {reason}; pip install 'realfill-serve[gpu]' on a "
            "machine with CUDA, or set attention to 'auto' or 'sdpa'"
        )
    if setting == "auto":
        return "xformers" if usable else "sdpa"
    return setting
