"""What a base is known by: a digest of all its weights, whatever precision they are loaded in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from realfill.errors import BaseUnavailable

# Folders of a base that hold weights.
TENSOR_PARTS = ("unet", "vae", "text_encoder")


def fingerprint_of_folder(folder: Path) -> str:
    """SHA-256 over the sorted digests of all tensors as they stand in the folder's safetensors."""
    lines = []
    for part in TENSOR_PARTS:
        for path in _weight_files(folder / part):
            with safe_open(path, framework="pt") as tensors:
                names = list(tensors.keys())
                lines += [_line(part, name, tensors.get_tensor(name)) for name in names]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def fingerprint_of(parts: Mapping[str, nn.Module]) -> str:
    """The same over modules in memory, for a base that has no folder."""
    lines = [
        _line(part, n, t) for part, module in parts.items() for n, t in module.state_dict().items()
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _line(part: str, name: str, tensor: Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{part}.{name} {tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"


def _weight_files(folder: Path) -> list[Path]:
    """The full-precision weights of one part, all shards, never a variant besides."""
    found = sorted(p for p in folder.glob("*.safetensors") if not p.stem.endswith(("fp16", "bf16")))
    if not found:
        raise BaseUnavailable(
            f"No safetensors weights lie in {folder}: save the base with safe_serialization=True."
        )
    return found
