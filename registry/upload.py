"""Capsule bytes, checked without torch before anything is stored.

A capsule is a safetensors file: eight bytes of little-endian header length, a JSON header, then
the tensor region. The registry checks the frame (lengths, offsets, dtypes), the `realfill.*`
metadata, that the LoRA factors pair up at the rank the header names, and that every float is
finite. Whether the adapter suits a base is for the engine to say.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from registry.errors import InvalidUpload

FORMAT = "1"
MAX_HEADER_BYTES = 4 * 1024 * 1024
MAX_RANK = 128
MAX_DIMENSIONS = 8
MAX_BASE_LENGTH = 200
MAX_METRICS = 32
MAX_METRIC = 1e300
METRIC_NAME = re.compile(r"[a-z][a-z0-9._-]{0,62}")

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

# A float is infinite or NaN exactly when all bits of its exponent are set.
EXPONENT_BITS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}

REQUIRED_TEXT = ("realfill.scene", "realfill.base", "realfill.prompt")
REQUIRED_NUMBERS = ("realfill.alpha", "realfill.scale", "realfill.size_px")
REQUIRED_JSON = {
    "realfill.target_modules": list,
    "realfill.training": dict,
    "realfill.digests": dict,
}
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the header; begin and end count from the start of the tensor region."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Upload:
    """What the registry keeps of a sound capsule; the fields are those of `Version`.

    The scene is what the capsule calls itself, which may be no name that the registry takes.
    """

    scene: str
    digest: str
    tensor_digest: str
    size_bytes: int
    base: str
    base_fingerprint: str
    rank: int
    metadata: dict[str, Any]
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Header:
    """What a capsule says of itself; the fields are those of `Version`."""

    size_bytes: int
    base: str
    base_fingerprint: str
    rank: int
    metadata: dict[str, Any]


def read_header(data: bytes) -> Header:
    """Read what a stored capsule says of itself, without looking at its tensors.

    Raises:
        InvalidUpload: The header is no capsule's.
    """
    header, _ = _split(data)
    metadata = _read_metadata(header.get("__metadata__"))
    return Header(
        size_bytes=len(data),
        base=metadata["realfill.base"],
        base_fingerprint=metadata["realfill.base_fingerprint"],
        rank=_read_rank(metadata),
        metadata=metadata,
    )


def inspect(data: bytes) -> Upload:
    """Check capsule bytes and read what the registry keeps of them.

    Raises:
        InvalidUpload: The bytes are torn, malformed or hold a value that is not finite.
    """
    header, region = _split(data)
    _check_digests(header, region)
    metadata = _read_metadata(header.pop("__metadata__", None))
    entries = {name: _read_entry(name, entry) for name, entry in header.items()}
    _check_tiling(entries, len(region))
    rank = _read_rank(metadata)
    _check_factors(entries, rank)
    _check_finite(entries, region)
    return Upload(
        scene=metadata["realfill.scene"],
        digest=hashlib.sha256(data).hexdigest(),
        tensor_digest=hashlib.sha256(region).hexdigest(),
        size_bytes=len(data),
        base=metadata["realfill.base"],
        base_fingerprint=metadata["realfill.base_fingerprint"],
        rank=rank,
        metadata=metadata,
        metrics=_measured(metadata["realfill.training"]),
    )


def _measured(training: dict[str, Any]) -> dict[str, float]:
    """The numbers of a training report, and the least of its probe's losses as `probe_loss`."""
    found = {name: value for name, value in training.items() if _is_metric(name, value)}
    probe = training.get("probe")
    losses = list(probe.values()) if isinstance(probe, dict) else []
    if losses and all(_is_metric("probe_loss", loss) for loss in losses):
        found["probe_loss"] = min(losses)
    return {name: float(found[name]) for name in sorted(found)[:MAX_METRICS]}


def _is_metric(name: str, value: Any) -> bool:
    sound = type(value) in (int, float) and abs(value) < MAX_METRIC
    return sound and METRIC_NAME.fullmatch(name) is not None


def _split(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """The parsed header and the tensor region."""
    if len(data) < 8:
        raise InvalidUpload(
            f"The capsule is torn: it has {len(data)} bytes and a header needs more. "
            "Upload the whole file again."
        )
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise InvalidUpload(
            f"The capsule's header claims {length} bytes and {MAX_HEADER_BYTES} are allowed. "
            "This is no capsule: upload the .safetensors file that the trainer wrote."
        )
    if 8 + length > len(data):
        raise InvalidUpload(
            f"The capsule is torn: its header needs {8 + length} bytes and {len(data)} came. "
            "Upload the whole file again."
        )
    try:
        header = json.loads(
            data[8 : 8 + length].decode(),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
        )
    except (ValueError, RecursionError) as error:
        raise InvalidUpload(
            f"The capsule's header is not JSON ({str(error)[:200]}). "
            "Upload the .safetensors file that the trainer wrote."
        ) from error
    if not isinstance(header, dict):
        raise InvalidUpload(
            f"The capsule's header is a JSON {type(header).__name__} and must be an object. "
            "Upload the .safetensors file that the trainer wrote."
        )
    return header, memoryview(data)[8 + length :]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return mapping


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _read_metadata(raw: Any) -> dict[str, Any]:
    """The metadata with its JSON values decoded, after checking every required key."""
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        raise InvalidUpload(
            "The capsule has no __metadata__ of texts, so it is a plain safetensors file. "
            "Train it with `realfill train`, or import it first."
        )
    if raw.get("realfill.format") != FORMAT:
        raise InvalidUpload(
            f"The capsule's realfill.format is {raw.get('realfill.format')!r} and this registry "
            f"reads {FORMAT!r}. Write the capsule again with a matching realfill."
        )
    for key in (*REQUIRED_TEXT, "realfill.licence"):
        if not raw.get(key, "").strip():
            raise _bad_key(key, raw.get(key), "a text")
    if not _FINGERPRINT.fullmatch(raw.get("realfill.base_fingerprint", "")):
        value = raw.get("realfill.base_fingerprint")
        raise _bad_key("realfill.base_fingerprint", value, "64 lower-case hex digits")
    for key in REQUIRED_NUMBERS:
        if not _is_positive(raw.get(key, "")):
            raise _bad_key(key, raw.get(key), "a finite number above 0")
    if len(raw["realfill.base"]) > MAX_BASE_LENGTH:
        wanted = f"a name of at most {MAX_BASE_LENGTH} characters"
        raise _bad_key("realfill.base", raw["realfill.base"], wanted)
    metadata = {**raw, **{key: _decode(raw, key, kind) for key, kind in REQUIRED_JSON.items()}}
    _check_storable(metadata)
    return metadata


def _check_digests(header: dict[str, Any], region: memoryview) -> None:
    """Where a capsule states the digests of its header and tensors, they are its own."""
    raw = header.get("__metadata__")
    if not isinstance(raw, dict):
        return
    stated = {part: raw.get(f"realfill.{part}_digest") for part in ("header", "tensor")}
    rest = {key: text for key, text in raw.items() if key != "realfill.header_digest"}
    text = json.dumps({**header, "__metadata__": rest}, sort_keys=True)
    found = {
        "header": hashlib.sha256(text.encode()).hexdigest(),
        "tensor": hashlib.sha256(region).hexdigest(),
    }
    for part, digest in stated.items():
        if digest is not None and digest != found[part]:
            raise InvalidUpload(
                f"The capsule's {part} is not the one that was written: its bytes have changed "
                "since. Upload the file that the training wrote, or train again."
            )


def _check_storable(metadata: dict[str, Any]) -> None:
    """PostgreSQL's JSON takes no NUL, no half of a surrogate pair and no infinite number."""
    try:
        text = json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidUpload(
            f"The capsule's metadata cannot be stored ({str(error)[:200]}). "
            "Write the capsule again with plain text and finite numbers."
        ) from error
    if b"\\u0000" in text:
        raise InvalidUpload(
            "The capsule's metadata holds a NUL character. Write the capsule again without it."
        )


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _decode(raw: dict[str, str], key: str, kind: type) -> Any:
    try:
        value = json.loads(raw.get(key, ""), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _bad_key(key, raw.get(key), f"a JSON {kind.__name__}") from error
    if not isinstance(value, kind):
        raise _bad_key(key, raw.get(key), f"a JSON {kind.__name__}")
    return value


def _read_rank(metadata: dict[str, Any]) -> int:
    text = metadata.get("realfill.rank", "")
    if not re.fullmatch(r"[1-9][0-9]{0,2}", text) or int(text) > MAX_RANK:
        raise _bad_key("realfill.rank", text, f"a whole number from 1 to {MAX_RANK}")
    return int(text)


def _bad_key(key: str, value: str | None, wanted: str) -> InvalidUpload:
    return InvalidUpload(
        f"The capsule's {key} is {ascii(value)[:80]} and must be {wanted}. "
        "Write the capsule again with `realfill train`."
    )


def _read_entry(name: str, entry: Any) -> TensorEntry:
    """One tensor of the header, checked by itself."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = (
            len(entry) == 3
            and dtype in ITEM_BYTES
            and len(shape) <= MAX_DIMENSIONS
            and all(type(number) is int and number >= 0 for number in (*shape, begin, end))
            and end - begin == math.prod(shape) * ITEM_BYTES[dtype]
        )
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise InvalidUpload(
            f"The capsule's tensor {ascii(name)[:80]} has an entry that does not add up: "
            f"{ascii(entry)[:120]}. Write the capsule again with `realfill train`."
        )
    return TensorEntry(dtype, tuple(shape), begin, end)


def _check_tiling(entries: dict[str, TensorEntry], region_bytes: int) -> None:
    """Every byte of the region belongs to exactly one tensor."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise InvalidUpload(
                f"The capsule's tensor {ascii(name)[:80]} begins at byte {entry.begin} and the "
                f"one before it ends at {position}: gaps and overlaps are not allowed. "
                "Write the capsule again with `realfill train`."
            )
        position = entry.end
    if position != region_bytes:
        raise InvalidUpload(
            f"The capsule is torn: its tensors need {position} bytes and {region_bytes} came. "
            "Upload the whole file again."
        )


def _check_factors(entries: dict[str, TensorEntry], rank: int) -> None:
    """There is an adapter, and every lora_A [R, in] has its lora_B [out, R] at the rank."""
    modules = {name.rpartition(".")[0] for name in entries if name.endswith((".lora_A", ".lora_B"))}
    if not modules:
        raise InvalidUpload(
            "The capsule holds no LoRA factors (tensors named *.lora_A and *.lora_B). "
            "Write the capsule again with `realfill train`."
        )
    for module in sorted(modules):
        a, b = entries.get(f"{module}.lora_A"), entries.get(f"{module}.lora_B")
        paired = a is not None and b is not None and len(a.shape) == len(b.shape) == 2
        if not paired or a.shape[0] != rank or b.shape[1] != rank:  # type: ignore[union-attr]
            raise InvalidUpload(
                f"The capsule's module {ascii(module)[:80]} has factors {a and a.shape} and "
                f"{b and b.shape}, and realfill.rank {rank} needs [{rank}, in] and "
                f"[out, {rank}]. Write the capsule again with `realfill train`."
            )


def _check_finite(entries: dict[str, TensorEntry], region: memoryview) -> None:
    for name, entry in entries.items():
        if entry.dtype not in EXPONENT_BITS:
            continue
        kind, bits = EXPONENT_BITS[entry.dtype]
        words = np.frombuffer(region[entry.begin : entry.end], dtype=kind)
        broken = int(np.count_nonzero((words & words.dtype.type(bits)) == bits))
        if broken:
            raise InvalidUpload(
                f"The capsule's tensor {ascii(name)[:80]} holds {broken} values that are "
                "infinite or NaN. Train the scene again, with a lower learning rate if it "
                "happens again."
            )
