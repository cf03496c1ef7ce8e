"""The container under a capsule: safetensors, written deterministically and read with suspicion.

The safetensors library writes metadata in random order, so the header is written here: keys sorted,
tensors by falling item size and then by name, no pickle anywhere. Two digests inside the metadata
make every changed byte visible: one of the tensor region, one of all the rest of the header.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from realfill.errors import InvalidCapsule

MAX_HEADER_BYTES = 4 * 1024 * 1024
MAX_DIMENSIONS = 8
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
CODES = {dtype: code for code, dtype in DTYPES.items()}
TENSOR_DIGEST = "realfill.tensor_digest"
HEADER_DIGEST = "realfill.header_digest"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header describes it; offsets count from the start of the tensor region."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Container:
    """A checked header, and the bytes of the tensors, not yet looked at."""

    metadata: dict[str, str]
    entries: dict[str, TensorEntry]
    region: memoryview


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Write tensors and metadata as one safetensors file: same inputs, same bytes.

    Raises:
        InvalidCapsule: A tensor has another dtype than float32, float16, bfloat16 or uint8, or a
            text is not valid Unicode.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES:
            raise InvalidCapsule(
                f"Tensor {name} is {tensor.dtype}: convert it to one of {', '.join(DTYPES)}."
            )
    # Large items first keep every tensor aligned to its own item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    chunks = [_to_bytes(tensors[name]) for name in names]
    entries: dict[str, Any] = {}
    position = 0
    for name, chunk in zip(names, chunks, strict=True):
        entries[name] = {
            "dtype": CODES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [position, position + len(chunk)],
        }
        position += len(chunk)
    region = b"".join(chunks)
    complete = {**metadata, TENSOR_DIGEST: hashlib.sha256(region).hexdigest()}
    complete[HEADER_DIGEST] = _header_digest({"__metadata__": complete, **entries})
    header = {"__metadata__": dict(sorted(complete.items())), **entries}
    try:
        encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise InvalidCapsule(f"The metadata is not valid Unicode ({error}): fix it.") from error
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + region


def unpack(data: bytes | memoryview) -> Container:
    """Read and check the header; no byte of a tensor is touched.

    Raises:
        InvalidCapsule: The file is torn, its header was changed, or tensors do not tile the region.
    """
    encoded, region = split(data)
    header = _parse(encoded)
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InvalidCapsule(
            "The file has no text metadata, so it is no capsule: export one with `realfill train`."
        )
    if metadata.get(HEADER_DIGEST) != _header_digest(header):
        raise InvalidCapsule(
            "The capsule's header is not the one that was written: fetch or train it again."
        )
    entries = {
        name: _entry(name, entry) for name, entry in header.items() if name != "__metadata__"
    }
    _check_tiling(entries, len(region))
    return Container(metadata, entries, region)


def tensors_of(container: Container) -> dict[str, Tensor]:
    """Copy the tensors out of a container, and check that they are those that were written.

    Raises:
        InvalidCapsule: A byte was changed, or a value is not finite.
    """
    buffer = bytearray(container.region)
    if container.metadata.get(TENSOR_DIGEST) != hashlib.sha256(buffer).hexdigest():
        raise InvalidCapsule(
            "The capsule's tensors are not the ones that were written: fetch or train it again."
        )
    tensors = {}
    for name, entry in container.entries.items():
        flat = torch.frombuffer(
            buffer, dtype=DTYPES[entry.dtype], count=math.prod(entry.shape), offset=entry.begin
        )
        if flat.is_floating_point() and not flat.isfinite().all():
            raise InvalidCapsule(f"Tensor {name} holds values that are not finite: train it again.")
        tensors[name] = flat.view(entry.shape)
    return tensors


def split(data: bytes | memoryview) -> tuple[bytes, memoryview]:
    """The header's bytes and the tensor region.

    Raises:
        InvalidCapsule: The lengths do not fit the file.
    """
    view = memoryview(data)
    if len(view) < 8:
        raise InvalidCapsule(f"The capsule has {len(view)} bytes, so it is torn: fetch it again.")
    length = int.from_bytes(view[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise InvalidCapsule(
            f"The capsule's header claims {length} bytes, at most {MAX_HEADER_BYTES} are allowed:"
            " this is no capsule, or a damaged one."
        )
    if 8 + length > len(view):
        raise InvalidCapsule(
            f"The capsule has {len(view)} bytes and its header alone needs {8 + length}, so it is"
            " torn: fetch it again."
        )
    return bytes(view[8 : 8 + length]), view[8 + length :]


def canonical(value: Any) -> str:
    """JSON that is the same for equal values.

    Raises:
        InvalidCapsule: The value has no JSON form.
    """
    try:
        return json.dumps(
            value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )
    except (TypeError, ValueError) as error:
        raise InvalidCapsule(
            f"{str(value)[:80]} cannot be written as JSON ({error}): use plain finite values."
        ) from error


def strict_json(text: str | bytes) -> Any:
    """Parse JSON that repeats no key and holds no NaN.

    Raises:
        ValueError: The text is no such JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key appears twice")
    return mapping


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _parse(encoded: bytes) -> dict[str, Any]:
    try:
        # The format demands the brace first; bytes that are not UTF-8 raise a ValueError too.
        header = strict_json(encoded.decode()) if encoded.startswith(b"{") else None
    except ValueError as error:
        raise InvalidCapsule(
            f"The capsule's header is damaged ({error}): fetch or train it again."
        ) from error
    if not isinstance(header, dict):
        raise InvalidCapsule("The file does not begin like a capsule: give a .safetensors capsule.")
    return header


def _header_digest(header: Mapping[str, Any]) -> str:
    """SHA-256 over everything the header says, save for this digest itself."""
    metadata = {k: v for k, v in header["__metadata__"].items() if k != HEADER_DIGEST}
    text = json.dumps({**header, "__metadata__": metadata}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _entry(name: str, entry: Any) -> TensorEntry:
    """One tensor of the header, checked by itself."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = (
            len(entry) == 3
            and isinstance(shape, list)
            and len(shape) <= MAX_DIMENSIONS
            and all(type(number) is int for number in (*shape, begin, end))
            and min(shape, default=1) > 0
            and begin % DTYPES[dtype].itemsize == 0
            and end - begin == math.prod(shape) * DTYPES[dtype].itemsize
        )
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise InvalidCapsule(
            f"The capsule's tensor {name[:80]!r} is described as {str(entry)[:120]}, which cannot"
            " be: train it again."
        )
    return TensorEntry(dtype, tuple(shape), begin, end)


def _check_tiling(entries: dict[str, TensorEntry], region_bytes: int) -> None:
    """Every byte of the region belongs to exactly one tensor."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin != position:
            raise InvalidCapsule(
                f"The capsule's tensor {name[:80]!r} begins at byte {entry.begin}, the one before"
                f" ends at {position}; gaps and overlaps are not allowed: train it again."
            )
        position = entry.end
    if position != region_bytes:
        raise InvalidCapsule(
            f"The capsule's tensors need {position} bytes and {region_bytes} are there, so it is"
            " torn: fetch it again."
        )


def _to_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
