"""Capsules to and from the LoRA files of other programs: PEFT, diffusers, kohya.

Those files hold factors and nothing else of a capsule, so an export puts a companion beside them
with the rest: the embeddings, the references, the header. With the companion an import gives the
capsule back byte for byte. Without one it makes a new capsule, with the same factors bit for bit.

It lies in this package, because factors of convolutions need the base's shapes and the prompt its
text encoder; the registry, which imports no torch, handles capsules as bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from realfill.adapter import Adapter
from realfill.base import PROMPT, Base, target_layers
from realfill.capsule import (
    PROMPT_EMBEDDING,
    TEXT_ENCODER,
    UNET,
    Capsule,
    CapsuleHeader,
    header_of,
    metadata_of,
    read_capsule,
    write_capsule,
)
from realfill.capsule_format import TENSOR_DIGEST, pack, tensors_of, unpack
from realfill.errors import AdapterMismatch, InvalidCapsule
from realfill.lora_files import DIFFUSERS_WEIGHTS, Factors, Kind, Lora, read_lora, write_lora

COMPANION = "capsule_rest.safetensors"
WHOLE_DIGEST = "interchange.tensor_digest"
SUFFIX = ".safetensors"


def export_capsule(data: bytes, place: Path, kind: Kind, base: Base) -> Path:
    """Write a capsule's factors as another program reads them, and the rest into a companion.

    Args:
        data: The capsule.
        place: Folder to write (peft, diffusers), or file (kohya); its parent must exist.
        base: The base that the capsule was trained for.

    Returns:
        The companion: in the folder, or beside the file.

    Raises:
        InvalidCapsule: The bytes are not a sound capsule.
        AdapterMismatch: The capsule is for another base.
    """
    capsule = read_capsule(data, base)
    networks = _networks(base)
    adapters = {UNET: capsule.adapter, TEXT_ENCODER: capsule.text_adapter}
    factors = {
        part: _shaped(adapter.factors, networks[part])
        for part, adapter in adapters.items()
        if adapter.factors
    }
    suffixes = {UNET: capsule.header.target_modules, TEXT_ENCODER: base.text_adapter_modules}
    targets = {part: _targets(networks[part], suffixes[part], factors[part]) for part in factors}
    write_lora(Lora(factors, capsule.header.alpha), place, kind, capsule.header.base, targets)
    rest = {PROMPT_EMBEDDING: capsule.prompt_embedding, **capsule.extras}
    metadata = {**metadata_of(capsule.header), WHOLE_DIGEST: unpack(data).metadata[TENSOR_DIGEST]}
    companion = _companion(place)
    companion.write_bytes(pack(rest, metadata))
    return companion


def import_capsule(
    place: Path, base: Base, *, scene: str | None = None, prompt: str = PROMPT
) -> bytes:
    """Make a capsule of LoRA files that this program or another one wrote.

    Args:
        place: A folder of PEFT or diffusers, or a file of diffusers or kohya.
        base: The base that the factors were trained for.
        scene: Name of the scene; a companion knows it.
        prompt: What it was trained with, where there is no companion to say so.

    Raises:
        InvalidCapsule: The files cannot be read, hold what a capsule cannot say, or were changed
            since they were exported.
        AdapterMismatch: The factors do not fit the base.
    """
    networks = _networks(base)
    paths = {
        part: [path for path, layer in network.named_modules() if _is_matrix(layer)]
        for part, network in networks.items()
    }
    lora = read_lora(place, paths)
    factors: dict[str, Factors] = {UNET: {}, TEXT_ENCODER: {}}
    for part, pairs in lora.factors.items():
        factors[part] = {path: (a.flatten(1), b.flatten(1)) for path, (a, b) in pairs.items()}
    companion = _companion(place)
    if companion.is_file():
        return _restored(companion, factors, base, scene)
    if scene is None:
        raise InvalidCapsule(
            f"{place} does not say which scene it is of, and there is no {companion.name} beside "
            "it: name the scene with --scene."
        )
    return _made(lora, factors, base, scene, prompt)


def _restored(
    companion: Path, factors: Mapping[str, Factors], base: Base, scene: str | None
) -> bytes:
    """The capsule that was exported, of its companion and the factors beside it."""
    container = unpack(companion.read_bytes())
    metadata = {k: v for k, v in container.metadata.items() if k != WHOLE_DIGEST}
    rest = tensors_of(container)
    header = header_of(metadata)
    capsule = Capsule(
        header=header,
        adapter=Adapter(factors[UNET], header.scale),
        text_adapter=Adapter(factors[TEXT_ENCODER], header.scale),
        prompt_embedding=rest.pop(PROMPT_EMBEDDING),
        extras=rest,
    )
    written = write_capsule(capsule)
    if unpack(written).metadata[TENSOR_DIGEST] != container.metadata.get(WHOLE_DIGEST):
        raise InvalidCapsule(
            f"The factors beside {companion} were changed since they were exported: delete that "
            "file to import them as a new capsule, or export the old one again."
        )
    read_capsule(written, base)
    if scene is not None and scene != header.scene:
        return write_capsule(replace(capsule, header=replace(header, scene=scene)))
    return written


def _made(lora: Lora, factors: Mapping[str, Factors], base: Base, scene: str, prompt: str) -> bytes:
    """A new capsule of factors alone; it has no references to rank candidates by."""
    scale = lora.alpha / lora.rank
    text = Adapter(factors[TEXT_ENCODER], scale)
    header = CapsuleHeader(
        scene=scene,
        base=base.name,
        base_fingerprint=base.fingerprint,
        rank=lora.rank,
        alpha=lora.alpha,
        scale=scale,
        target_modules=tuple(_targets(base.unet, base.adapter_modules, factors[UNET])),
        prompt=prompt,
        size_px=base.size_px,
        training={"imported": True},
        digests={},
        licence=base.licence,
    )
    # Shapes first: the prompt can only go through a text adapter that fits.
    draft = Capsule(
        header=header,
        adapter=Adapter(factors[UNET], scale),
        text_adapter=text,
        prompt_embedding=base.embed(prompt).detach().cpu().half(),
        extras={},
    )
    written = write_capsule(draft)
    read_capsule(written, base)
    if not text.factors:
        return written
    with _fused(base.text_encoder, text):
        embedding = base.embed(prompt).detach().cpu().half()
    return write_capsule(replace(draft, prompt_embedding=embedding))


@contextmanager
def _fused(network: nn.Module, adapter: Adapter) -> Iterator[None]:
    """The network with an adapter in its weights, and afterwards without, to the last bit."""
    weights = {
        path: network.get_submodule(path).get_parameter("weight") for path in adapter.factors
    }
    pristine = {path: weight.detach().clone() for path, weight in weights.items()}
    try:
        with torch.no_grad():
            for path, (lora_a, lora_b) in adapter.factors.items():
                delta = adapter.scale * lora_b.float() @ lora_a.float()
                weights[path].add_(delta.view_as(weights[path]).to(weights[path]))
        yield
    finally:
        with torch.no_grad():
            for path, weight in weights.items():
                weight.copy_(pristine[path])


def _networks(base: Base) -> dict[str, nn.Module]:
    return {UNET: base.unet, TEXT_ENCODER: base.text_encoder}


def _is_matrix(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | nn.Conv2d)


def _shaped(factors: Mapping[str, tuple[Tensor, Tensor]], network: nn.Module) -> Factors:
    """Factors in PEFT's shapes: those of a convolution get its kernel back."""
    shaped = {}
    for path, (lora_a, lora_b) in factors.items():
        layer = network.get_submodule(path)
        if isinstance(layer, nn.Conv2d):
            if layer.groups != 1:
                raise AdapterMismatch(
                    f"{path} is a convolution in {layer.groups} groups, which PEFT adapts in "
                    "another way: leave it out of the target modules."
                )
            lora_a = lora_a.view(len(lora_a), *layer.weight.shape[1:])
            lora_b = lora_b[..., None, None]
        shaped[path] = lora_a, lora_b
    return shaped


def _targets(network: nn.Module, suffixes: Iterable[str], factors: Factors) -> list[str]:
    """Suffixes of modules, where they name exactly those with factors, else whole paths."""
    suffixes = sorted(suffixes)
    exact = target_layers(network, suffixes).keys() == factors.keys()
    return suffixes if exact else sorted(factors)


def _companion(place: Path) -> Path:
    """Where the rest of the capsule lies: in the folder, or beside the file."""
    if place.name == DIFFUSERS_WEIGHTS:
        return place.with_name(COMPANION)
    if place.suffix == SUFFIX and not place.is_dir():
        return place.with_name(f"{place.stem}_{COMPANION}")
    return place / COMPANION
