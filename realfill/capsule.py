"""Capsules: one file per adapter, with everything that serving it needs (docs/capsule.md)."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from realfill.adapter import Adapter
from realfill.capsule_format import (
    HEADER_DIGEST,
    TENSOR_DIGEST,
    Container,
    TensorEntry,
    canonical,
    pack,
    split,
    strict_json,
    tensors_of,
    unpack,
)
from realfill.errors import AdapterMismatch, InvalidCapsule

if TYPE_CHECKING:
    from realfill.base import Base

FORMAT = 1
MAX_RANK = 128
PROMPT_TOKENS = 77
UNET, TEXT_ENCODER = "unet", "text_encoder"
PROMPT_EMBEDDING, UNCOND_EMBEDDING = "prompt_embedding", "uncond_embedding"
EMBEDDINGS = (PROMPT_EMBEDDING, UNCOND_EMBEDDING)

_FACTOR = re.compile(rf"({UNET}|{TEXT_ENCODER})\.(\w+(?:\.\w+)*)\.lora_([AB])", re.ASCII)
_FEATURES = re.compile(r"reference_features(?:\.\w+)+", re.ASCII)
# Pictures may be bytes: small references for the ranking and thumbnails for people.
_PICTURES = re.compile(r"(?:references|thumbnail)(?:\.\w+)+", re.ASCII)
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_KEYS = frozenset(
    {f"realfill.{key}" for key in ("format", "scene", "base", "base_fingerprint", "rank", "alpha")}
    | {f"realfill.{key}" for key in ("scale", "target_modules", "prompt", "size_px", "training")}
    | {f"realfill.{key}" for key in ("training_digest", "digests", "licence")}
)


@dataclass(frozen=True, kw_only=True)
class CapsuleHeader:
    """What a capsule says about itself.

    Attributes:
        base: Name or identifier of the base that the adapter was trained for.
        base_fingerprint: Its fingerprint, 64 hex digits; this is what is compared.
        target_modules: Suffixes of the U-Net modules that the adapter changes.
        size_px: Resolution it was trained at.
        training: What it was trained with, as JSON; under `configuration`, if that key is there,
            lies the part that decides about the outcome.
        digests: SHA-256 of the scene's files, by name.
        licence: Notice that flows down from the base.
        shapes: Shape of every tensor by name; filled by reading.
    """

    scene: str
    base: str
    base_fingerprint: str
    rank: int
    alpha: float
    scale: float
    target_modules: tuple[str, ...]
    prompt: str
    size_px: int
    training: Mapping[str, Any]
    digests: Mapping[str, str]
    licence: str
    format: int = FORMAT
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        checks = {
            f"format {self.format}, this program reads {FORMAT}": self.format == FORMAT,
            "no scene name": bool(self.scene.strip()),
            "no base name": bool(self.base.strip()),
            f"base fingerprint {self.base_fingerprint[:80]!r}, not 64 hex digits": bool(
                _FINGERPRINT.fullmatch(self.base_fingerprint)
            ),
            f"rank {self.rank}, not within 1..{MAX_RANK}": 1 <= self.rank <= MAX_RANK,
            f"alpha {self.alpha}, not a positive number": 0 < self.alpha < math.inf,
            f"scale {self.scale}, not alpha / rank = {self.alpha}/{self.rank}": math.isclose(
                self.scale * self.rank, self.alpha, rel_tol=1e-6
            ),
            "no target modules": bool(self.target_modules),
            f"size {self.size_px} px, not a positive number": self.size_px > 0,
        }
        faults = [fault for fault, sound in checks.items() if not sound]
        if faults:
            raise InvalidCapsule(
                f"The capsule of scene {self.scene[:80]!r} has {'; '.join(faults)}: train it again."
            )

    @property
    def training_digest(self) -> str:
        """SHA-256 of the training configuration: equal for runs that should give equal weights."""
        configuration = self.training.get("configuration", self.training)
        return hashlib.sha256(canonical(configuration).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Capsule:
    """A capsule in memory.

    Attributes:
        adapter: U-Net weights.
        text_adapter: Text-encoder weights, kept for export and further training; may be empty.
        prompt_embedding: The prompt through the adapted text encoder. [77, d]
        extras: `uncond_embedding` [77, d], `reference_features.*`, `references.*` (small pictures
            to rank against) and `thumbnail.*`.
    """

    header: CapsuleHeader
    adapter: Adapter
    text_adapter: Adapter
    prompt_embedding: Tensor
    extras: dict[str, Tensor]


def write_capsule(capsule: Capsule) -> bytes:
    """Write a capsule; the same capsule always gives the same bytes.

    Raises:
        InvalidCapsule: A reader would refuse what was given.
    """
    tensors = {PROMPT_EMBEDDING: capsule.prompt_embedding, **capsule.extras}
    for part, adapter in ((UNET, capsule.adapter), (TEXT_ENCODER, capsule.text_adapter)):
        if adapter.factors and adapter.scale != capsule.header.scale:
            raise InvalidCapsule(
                f"The {part} adapter has scale {adapter.scale}, the header {capsule.header.scale}:"
                " give both the same."
            )
        for module, (lora_a, lora_b) in adapter.factors.items():
            tensors[f"{part}.{module}.lora_A"] = lora_a
            tensors[f"{part}.{module}.lora_B"] = lora_b
    written = pack(tensors, metadata_of(capsule.header))
    # Better now than when the training is long over.
    read_capsule(written, None)
    return written


def read_header(data: bytes | memoryview) -> CapsuleHeader:
    """Read what a capsule says about itself, without touching a tensor.

    Raises:
        InvalidCapsule: The header is not that of a sound capsule.
    """
    return _header(unpack(data))


def read_capsule(data: bytes | memoryview, base: Base | None) -> Capsule:
    """Read a capsule whole; the header is checked before any tensor.

    Args:
        data: The file's bytes.
        base: The base it is meant for, or None to leave that open.

    Raises:
        InvalidCapsule: The bytes are not a sound capsule.
        AdapterMismatch: The capsule is sound but was trained for another base.
    """
    container = unpack(data)
    header = _header(container)
    if base is not None:
        _check_base(header, base)
    tensors = tensors_of(container)
    factors: dict[str, dict[str, tuple[Tensor, Tensor]]] = {UNET: {}, TEXT_ENCODER: {}}
    for part, module in _modules(container.entries):
        lora_a = tensors.pop(f"{part}.{module}.lora_A")
        lora_b = tensors.pop(f"{part}.{module}.lora_B")
        factors[part][module] = lora_a, lora_b
    return Capsule(
        header=header,
        adapter=Adapter(factors[UNET], header.scale),
        text_adapter=Adapter(factors[TEXT_ENCODER], header.scale),
        prompt_embedding=tensors.pop(PROMPT_EMBEDDING),
        extras=tensors,
    )


def digests(data: bytes | memoryview) -> tuple[str, str]:
    """SHA-256 of the file, its identity, and of its tensor region, equal for equal weights.

    Raises:
        InvalidCapsule: The bytes are torn.
    """
    _, region = split(data)
    return hashlib.sha256(data).hexdigest(), hashlib.sha256(region).hexdigest()


def metadata_of(header: CapsuleHeader) -> dict[str, str]:
    """The header as the texts that a file carries."""
    family = "realfill-nano" if header.base == "nano" else "stable-diffusion-v2-inpainting"
    return {
        "realfill.format": str(header.format),
        "realfill.scene": header.scene,
        "realfill.base": header.base,
        "realfill.base_fingerprint": header.base_fingerprint,
        "realfill.rank": str(header.rank),
        "realfill.alpha": repr(float(header.alpha)),
        "realfill.scale": repr(float(header.scale)),
        "realfill.target_modules": canonical(list(header.target_modules)),
        "realfill.prompt": header.prompt,
        "realfill.size_px": str(header.size_px),
        "realfill.training": canonical(dict(header.training)),
        "realfill.training_digest": header.training_digest,
        "realfill.digests": canonical(dict(header.digests)),
        "realfill.licence": header.licence,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{family}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": header.scene,
    }


def _header(container: Container) -> CapsuleHeader:
    """Check metadata and tensor names, and say them as a header."""
    header = header_of(container.metadata)
    _check_tensors(container.entries, header.rank)
    shapes = {name: entry.shape for name, entry in container.entries.items()}
    return replace(header, shapes=shapes)


def header_of(metadata: Mapping[str, str]) -> CapsuleHeader:
    """Read what `metadata_of` wrote.

    Raises:
        InvalidCapsule: A key is missing, unknown, or has a value that it cannot have.
    """
    _check_keys(metadata)
    try:
        header = _parsed(metadata)
    except ValueError as error:
        raise InvalidCapsule(
            f"The capsule's metadata cannot be read ({error}): train or export it again."
        ) from error
    if header.training_digest != metadata["realfill.training_digest"]:
        raise InvalidCapsule(
            "The capsule's training digest belongs to another configuration: train it again."
        )
    return header


def _check_keys(metadata: Mapping[str, str]) -> None:
    """Every key of ours is there, and none that is not; other namespaces are free."""
    missing = sorted(_KEYS - metadata.keys())
    known = _KEYS | {TENSOR_DIGEST, HEADER_DIGEST}
    unknown = sorted(k for k in metadata if k.startswith("realfill.") and k not in known)
    if missing or unknown:
        fault = f"no {missing[0]}" if missing else f"an unknown key {unknown[0][:80]}"
        raise InvalidCapsule(
            f"The capsule's metadata has {fault}: it is of another version, so train or export it"
            " again."
        )


def _parsed(metadata: Mapping[str, str]) -> CapsuleHeader:
    """The values of the metadata; ValueError where one is not what its key promises."""
    training = strict_json(metadata["realfill.training"])
    file_digests = strict_json(metadata["realfill.digests"])
    modules = strict_json(metadata["realfill.target_modules"])
    if not (isinstance(training, dict) and _is_text(file_digests, dict)):
        raise ValueError("realfill.training and realfill.digests are JSON objects")
    if not _is_text(modules, list):
        raise ValueError("realfill.target_modules is a JSON list of names")
    return CapsuleHeader(
        scene=metadata["realfill.scene"],
        base=metadata["realfill.base"],
        base_fingerprint=metadata["realfill.base_fingerprint"],
        rank=int(metadata["realfill.rank"]),
        alpha=float(metadata["realfill.alpha"]),
        scale=float(metadata["realfill.scale"]),
        target_modules=tuple(modules),
        prompt=metadata["realfill.prompt"],
        size_px=int(metadata["realfill.size_px"]),
        training=training,
        digests=file_digests,
        licence=metadata["realfill.licence"],
        format=int(metadata["realfill.format"]),
    )


def _is_text(value: Any, kind: type[dict[str, str]] | type[list[str]]) -> bool:
    """Whether a value is a list or an object whose values are all texts."""
    if not isinstance(value, kind):
        return False
    items = value.values() if isinstance(value, dict) else value
    return all(isinstance(item, str) for item in items)


def _check_tensors(entries: Mapping[str, TensorEntry], rank: int) -> None:
    """Every name is known, every dtype fits it, every pair is complete and of the header's rank."""
    for name, entry in entries.items():
        picture = bool(_PICTURES.fullmatch(name))
        known = picture or name in EMBEDDINGS or _FEATURES.fullmatch(name)
        if not (known or _FACTOR.fullmatch(name)):
            raise InvalidCapsule(f"The capsule holds an unknown tensor {name[:80]!r}: remove it.")
        if entry.dtype == "U8" and not picture:
            raise InvalidCapsule(f"The capsule's tensor {name} is U8 and must be F16, BF16 or F32.")
        if name in EMBEDDINGS and (len(entry.shape) != 2 or entry.shape[0] != PROMPT_TOKENS):
            raise InvalidCapsule(
                f"The capsule's {name} is {list(entry.shape)} and must be [{PROMPT_TOKENS}, d]:"
                " train it again."
            )
    modules = _modules(entries)
    if PROMPT_EMBEDDING not in entries or UNET not in {part for part, _ in modules}:
        lacking = f"{UNET} adapter" if PROMPT_EMBEDDING in entries else PROMPT_EMBEDDING
        raise InvalidCapsule(f"The capsule holds no {lacking}: train or export it again.")
    for part, module in modules:
        pair = [entries.get(f"{part}.{module}.lora_{side}") for side in "AB"]
        shapes = [list(entry.shape) if entry else None for entry in pair]
        lora_a, lora_b = (shape or [] for shape in shapes)
        if [len(lora_a), len(lora_b)] != [2, 2] or not lora_a[0] == lora_b[1] == rank:
            raise InvalidCapsule(
                f"The capsule's factors for {part}.{module} are {shapes[0]} and {shapes[1]}, at"
                f" rank {rank} they must be [{rank}, in] and [out, {rank}]: train it again."
            )


def _modules(names: Mapping[str, object]) -> list[tuple[str, str]]:
    """Network and module path of every pair of factors, in order."""
    matches = (_FACTOR.fullmatch(name) for name in names)
    return sorted({(match[1], match[2]) for match in matches if match})


def _check_base(header: CapsuleHeader, base: Base) -> None:
    """Compare fingerprint and shapes with the base that is to carry the adapter."""
    if header.base_fingerprint != base.fingerprint:
        raise AdapterMismatch(
            f"Scene {header.scene!r} was trained for base {header.base!r} (fingerprint"
            f" {header.base_fingerprint[:12]}), this is {base.name!r} ({base.fingerprint[:12]}):"
            " use the base it was trained for, or train the scene again."
        )
    networks = {UNET: base.unet, TEXT_ENCODER: base.text_encoder}
    for part, module in _modules(header.shapes):
        try:
            weight = networks[part].get_submodule(module).weight
            in_out = [weight[0].numel(), weight.shape[0]] if weight.dim() > 1 else []
        except (AttributeError, IndexError) as error:
            raise AdapterMismatch(
                f"Base {base.name!r} has no weight matrix {part}.{module}: train the scene again."
            ) from error
        lora_a = header.shapes[f"{part}.{module}.lora_A"]
        lora_b = header.shapes[f"{part}.{module}.lora_B"]
        if in_out != [lora_a[1], lora_b[0]]:
            raise AdapterMismatch(
                f"The factors for {part}.{module} are {list(lora_a)} and {list(lora_b)}, the base's"
                f" weight is {list(weight.shape)}: train the scene again."
            )
    width = int(base.unet.config.cross_attention_dim)
    for name in EMBEDDINGS:
        if name in header.shapes and header.shapes[name][1] != width:
            raise AdapterMismatch(
                f"The capsule's {name} is {header.shapes[name][1]} wide, the base's prompts are"
                f" {width}: train the scene again."
            )
