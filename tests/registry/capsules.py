"""Capsules and stores made by hand, so that the registry is tested without torch or safetensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from registry.errors import StorageUnavailable

FINGERPRINT = "5c" * 32
ITEM_TYPES = {"F16": "<f2", "F32": "<f4", "BF16": "<u2", "U8": "u1"}


def metadata(**changes: str | None) -> dict[str, str]:
    """The metadata of a sound capsule; a change to None leaves its key out."""
    texts: dict[str, str | None] = {
        "realfill.format": "1",
        "realfill.scene": "tower",
        "realfill.base": "nano",
        "realfill.base_fingerprint": FINGERPRINT,
        "realfill.rank": "2",
        "realfill.alpha": "2",
        "realfill.scale": "1.0",
        "realfill.target_modules": json.dumps(["to_q"]),
        "realfill.prompt": "a photo of sks",
        "realfill.size_px": "128",
        "realfill.training": json.dumps({"steps": 10, "probe_losses": [0.5, 0.25]}),
        "realfill.digests": json.dumps({"ref/0.png": "ab" * 32}),
        "realfill.licence": "RAIL++-M",
    }
    texts |= {f"realfill.{key}": value for key, value in changes.items()}
    return {key: value for key, value in texts.items() if value is not None}


def tensors(seed: int = 0, rank: int = 2) -> dict[str, tuple[str, Any]]:
    """One LoRA pair and a prompt embedding: name to dtype and values."""
    values = np.random.default_rng(seed)
    return {
        "prompt_embedding": ("F32", values.standard_normal((3, 4)).astype("<f4")),
        "unet.mid.to_q.lora_A": ("F16", values.standard_normal((rank, 8)).astype("<f2")),
        "unet.mid.to_q.lora_B": ("F16", values.standard_normal((8, rank)).astype("<f2")),
    }


def write(texts: Mapping[str, str], arrays: Mapping[str, tuple[str, Any]]) -> bytes:
    """A safetensors file of these texts and arrays."""
    header: dict[str, Any] = {"__metadata__": dict(texts)}
    region = b""
    for name, (dtype, values) in arrays.items():
        data = values.tobytes()
        offsets = [len(region), len(region) + len(data)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        region += data
    return frame(header, region)


def frame(header: Any, region: bytes) -> bytes:
    """A safetensors file of any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + region


def capsule(scene: str = "tower", seed: int = 0, **changes: str | None) -> bytes:
    """A sound capsule; seeds differ in their bytes."""
    return write(metadata(scene=scene, **changes), tensors(seed))


class MemoryObjects:
    """An ObjectStore in a dictionary."""

    place = "memory"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def put(self, key: str, data: bytes) -> None:
        """See ObjectStore."""
        self.objects[key] = data

    def create(self, key: str, data: bytes) -> bool:
        """See ObjectStore."""
        absent = key not in self.objects
        if absent:
            self.put(key, data)
        return absent

    def get(self, key: str) -> bytes | None:
        """See ObjectStore."""
        return self.objects.get(key)

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        self.objects.pop(key, None)

    def keys(self, prefix: str) -> Iterator[str]:
        """See ObjectStore."""
        return (key for key in list(self.objects) if key.startswith(f"{prefix}/"))

    def torn(self, before: datetime) -> list[Path]:
        """See ObjectStore."""
        return []


class FullObjects(MemoryObjects):
    """A store without room."""

    def put(self, key: str, data: bytes) -> None:
        """Refuse."""
        raise StorageUnavailable(f"The registry could not write {key}: the disk is full. Free it.")


class TearingObjects(MemoryObjects):
    """A store that keeps only half of what it is given, and says nothing."""

    def put(self, key: str, data: bytes) -> None:
        """Keep half."""
        self.objects[key] = data[: len(data) // 2]
