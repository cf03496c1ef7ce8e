"""Matchers by name, each with the program that is fastest on its device."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch

from realfill.errors import MatcherUnavailable
from realfill.rank.correspondences import Matcher
from realfill.rank.matching import loftr

# What runs LoFTR where nothing else is asked for; docs/ranking.md has the measurements.
FASTEST = {"cpu": "onnx", "cuda": "torch"}
PROGRAMS = ("torch", "onnx")
EFFICIENTLOFTR_FOLDER = "REALFILL_EFFICIENTLOFTR"


def load_matcher(
    name: str = "nano",
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
) -> Matcher:
    """Load a matcher.

    Args:
        name: ``nano``, ``outdoor`` or a weights file for LoFTR, with ``torch:`` or ``onnx:`` in
            front to choose the program; ``efficientloftr:FOLDER``, or ``efficientloftr`` with the
            folder in the variable REALFILL_EFFICIENTLOFTR; ``sift``.
        device: Where it runs.
        dtype: Of LoFTR's convolutions and projections; below float32 torch runs it.

    Raises:
        MatcherUnavailable: Weights, or the program, cannot be had.
    """
    kind, _, rest = name.partition(":")
    if name == "sift":
        from realfill.rank.sift import SiftMatcher

        return SiftMatcher(device)
    if kind == "efficientloftr":
        return _efficientloftr(rest, device)
    program, source = (kind, rest) if kind in PROGRAMS and rest else ("", name)
    if not program:
        fastest = FASTEST.get(torch.device(device).type, "torch")
        available = find_spec("onnxruntime") is not None and dtype == torch.float32
        program = fastest if available else "torch"
    if program == "torch":
        return loftr(source, device, dtype=dtype)
    if find_spec("onnxruntime") is None:
        raise MatcherUnavailable(
            f"matcher {name!r} needs onnxruntime, which is not installed; "
            f"install it, or use torch:{source}"
        )
    if dtype != torch.float32:
        raise MatcherUnavailable(f"matcher {name!r} runs in float32 only; use torch:{source}")
    from realfill.rank.matching_onnx import onnx_loftr

    return onnx_loftr(source, device)


def _efficientloftr(folder: str, device: str | torch.device) -> Matcher:
    folder = folder or os.environ.get(EFFICIENTLOFTR_FOLDER, "")
    if not folder:
        raise MatcherUnavailable(
            "matcher 'efficientloftr' has no weights; name their folder as efficientloftr:FOLDER "
            f"or in {EFFICIENTLOFTR_FOLDER}, or use 'nano'"
        )
    from realfill.rank.efficientloftr import efficientloftr

    return efficientloftr(Path(folder), device)
