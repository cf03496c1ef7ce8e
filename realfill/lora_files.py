"""LoRA weights as other programs keep them: PEFT folders, diffusers folders and kohya files.

    peft        FOLDER/unet/adapter_model.safetensors + adapter_config.json, FOLDER/text_encoder/...
    diffusers   FOLDER/pytorch_lora_weights.safetensors
    kohya       FILE.safetensors

Only names, shapes and the place of alpha differ; the values of a factor are never touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from realfill.capsule import TEXT_ENCODER, UNET
from realfill.capsule_format import DTYPES, pack
from realfill.errors import AdapterMismatch, InvalidCapsule

Kind = Literal["peft", "diffusers", "kohya"]
Factors = dict[str, tuple[Tensor, Tensor]]

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
# Written by diffusers too: the PEFT configuration of each network, as JSON.
DIFFUSERS_CONFIG = "lora_adapter_metadata"
PEFT_PREFIX = "base_model.model."
KOHYA_PREFIXES = {UNET: "lora_unet_", TEXT_ENCODER: "lora_te_"}
# Older transformers put the text encoder's layers one level deeper, and files keep that name.
TEXT_MODEL = "text_model."

_KEY = re.compile(
    r"(?:(?P<part>unet|text_encoder)\.)?(?P<module>.+?)"
    r"(?:\.lora_(?P<side>[AB])\.weight|\.(?P<way>down|up)\.weight|\.(?P<alpha>alpha))"
)
_KOHYA_KEY = re.compile(
    r"lora_(?P<part>unet|te1?)_(?P<module>\w+)\.(?:lora_(?P<way>down|up)\.weight|(?P<alpha>alpha))"
)
# diffusers before PEFT hung the factors on attention processors.
_OLD_NAMES = (
    (re.compile(r"\.processor\.to_([qkv])_lora$"), r".to_\1"),
    (re.compile(r"\.processor\.to_out_lora$"), ".to_out.0"),
    (re.compile(r"\.self_attn\.to_([qkv])_lora$"), r".self_attn.\1_proj"),
    (re.compile(r"\.self_attn\.to_out_lora$"), ".self_attn.out_proj"),
    (re.compile(r"\.(?:lora|lora_linear_layer)$"), ""),
)
# Options of PEFT that change what the factors mean, and the value with which they do not.
_PLAIN_OPTIONS: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "use_rslora": (False,),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
    "peft_type": ("LORA",),
    # Others move the base's own weights, so that the factors mean something else beside it.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
}


@dataclass(frozen=True, eq=False)
class Lora:
    """LoRA weights in the shapes of PEFT.

    Attributes:
        factors: By network, then by module path: lora_A [R, in] and lora_B [out, R], of a
            convolution [R, in, kh, kw] and [out, R, 1, 1].
        alpha: What all of them are scaled with, divided by their rank.
    """

    factors: dict[str, Factors]
    alpha: float

    @property
    def rank(self) -> int:
        """The rank that all factors have."""
        return next(a.shape[0] for pairs in self.factors.values() for a, _ in pairs.values())


def write_lora(
    lora: Lora, place: Path, kind: Kind, base: str, targets: Mapping[str, list[str]]
) -> None:
    """Write LoRA weights as another program reads them.

    Args:
        place: Folder, or for kohya the file; what is above it must exist.
        base: Name of the base, for the files to mention.
        targets: What PEFT shall look for, by network: suffixes or paths of modules.
    """
    if kind == "kohya":
        place.write_bytes(pack(_kohya_tensors(lora), _kohya_metadata(lora)))
        return
    configs = {part: _peft_config(lora, base, targets[part]) for part in lora.factors}
    place.mkdir(exist_ok=True)
    if kind == "diffusers":
        tensors = _dotted(lora, {UNET: f"{UNET}.", TEXT_ENCODER: f"{TEXT_ENCODER}.{TEXT_MODEL}"})
        packed = {f"{part}.{key}": configs[part][key] for part in configs for key in configs[part]}
        metadata = {"format": "pt", DIFFUSERS_CONFIG: json.dumps(packed, indent=2, sort_keys=True)}
        (place / DIFFUSERS_WEIGHTS).write_bytes(pack(tensors, metadata))
        return
    for part, pairs in lora.factors.items():
        (place / part).mkdir(exist_ok=True)
        tensors = _dotted(Lora({part: pairs}, lora.alpha), {part: PEFT_PREFIX})
        (place / part / PEFT_WEIGHTS).write_bytes(pack(tensors, {"format": "pt"}))
        config = json.dumps(configs[part], indent=2, sort_keys=True)
        (place / part / PEFT_CONFIG).write_text(f"{config}\n")


def read_lora(place: Path, paths: Mapping[str, Collection[str]]) -> Lora:
    """Read LoRA weights that another program wrote.

    Args:
        place: A folder of PEFT or diffusers, or a file of diffusers or kohya.
        paths: Module paths of the base's networks, to which the names are mapped.

    Raises:
        InvalidCapsule: It is none of these, or holds what a capsule cannot say.
        AdapterMismatch: A name is no module of the base.
    """
    tensors: dict[tuple[str, str], dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for part, file in _files(place).items():
        found, metadata = _load(file)
        for key, tensor in found.items():
            where, name, side = _parse(key, part, file)
            path = _path(name, where, paths[where], file)
            tensors.setdefault((where, path), {})[side] = tensor
        alphas |= _alphas_of(file, metadata)
    factors: dict[str, Factors] = {}
    for (part, path), pair in sorted(tensors.items()):
        if not {"A", "B"} <= pair.keys():
            raise InvalidCapsule(
                f"{place} holds only one of the two factors of {part}.{path}: save it again."
            )
        factors.setdefault(part, {})[path] = pair["A"], pair["B"]
    if UNET not in factors:
        raise InvalidCapsule(f"{place} holds no LoRA factors of a U-Net: give a scene's adapter.")
    return Lora(factors, _one_alpha(place, factors, tensors, alphas))


def _one_alpha(
    place: Path,
    factors: Mapping[str, Factors],
    tensors: Mapping[tuple[str, str], Mapping[str, Tensor]],
    alphas: Mapping[str, float],
) -> float:
    """The alpha of all factors; where none is named it is the rank."""
    ranks, found = set(), set()
    for part, pairs in factors.items():
        for path, (lora_a, _) in pairs.items():
            own = tensors[part, path].get("alpha")
            ranks.add(lora_a.shape[0])
            found.add(alphas.get(part, float(lora_a.shape[0])) if own is None else float(own))
    if len(ranks) != 1 or len(found) != 1:
        raise InvalidCapsule(
            f"{place} has ranks {sorted(ranks)} and alphas {sorted(found)}, and a capsule has one "
            "of each: train it with a single rank and alpha."
        )
    return found.pop()


def _files(place: Path) -> dict[str | None, Path]:
    """The weight files of a place by network; None where the file names the networks itself."""
    if place.is_file():
        return {None: place}
    if (place / DIFFUSERS_WEIGHTS).is_file():
        return {None: place / DIFFUSERS_WEIGHTS}
    if (place / PEFT_WEIGHTS).is_file():
        return {UNET: place / PEFT_WEIGHTS}
    parts = {part: place / part / PEFT_WEIGHTS for part in (UNET, TEXT_ENCODER)}
    found: dict[str | None, Path] = {part: file for part, file in parts.items() if file.is_file()}
    if not found:
        raise InvalidCapsule(
            f"{place} holds neither {UNET}/{PEFT_WEIGHTS} nor {DIFFUSERS_WEIGHTS}: give a folder "
            "that PEFT or diffusers wrote, or a kohya file."
        )
    return found


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InvalidCapsule(
            f"{file} cannot be read ({error}): give a .safetensors file, saved again if need be."
        ) from error
    for name, tensor in tensors.items():
        if not name.endswith(".alpha") and tensor.dtype not in DTYPES.values():
            raise InvalidCapsule(
                f"{file} holds {name[:80]} as {tensor.dtype}: save it as float16, bfloat16 or "
                "float32."
            )
    return tensors, metadata


def _parse(key: str, part: str | None, file: Path) -> tuple[str, str, str]:
    """Network, module as the file calls it, and which factor, or alpha, a key names."""
    kohya = part is None and _KOHYA_KEY.fullmatch(key)
    match = kohya or _KEY.fullmatch(key.removeprefix(PEFT_PREFIX) if part else key)
    where = part or (match and match["part"])
    if not match or not where:
        raise InvalidCapsule(
            f"{file} holds {key[:80]!r}, which is no plain LoRA factor of a U-Net or a text "
            "encoder: convert it to plain LoRA first."
        )
    side = "alpha" if match["alpha"] else {"down": "A", "up": "B"}.get(match["way"] or "")
    name = match["module"]
    if kohya:
        return (UNET if where == UNET else TEXT_ENCODER), name, side or ""
    for pattern, replacement in _OLD_NAMES:
        name = pattern.sub(replacement, name)
    return where, name, side or match["side"]


def _path(name: str, part: str, paths: Collection[str], file: Path) -> str:
    """The base's path of a module, which kohya writes with underscores for dots."""
    wanted = name.replace(".", "_").removeprefix("text_model_" if part == TEXT_ENCODER else "")
    for path in paths:
        if path.removeprefix(TEXT_MODEL).replace(".", "_") == wanted:
            return path
    raise AdapterMismatch(
        f"{file} adapts {part}.{name[:80]}, which this base has not: name the base that it was "
        "trained for."
    )


def _alphas_of(file: Path, metadata: Mapping[str, str]) -> dict[str, float]:
    """What the configuration beside or inside a file says of alpha, by network."""
    configs: dict[str, dict[str, Any]] = {}
    try:
        if file.name == PEFT_WEIGHTS:
            part = file.parent.name if file.parent.name == TEXT_ENCODER else UNET
            configs[part] = dict(json.loads((file.parent / PEFT_CONFIG).read_text()))
        elif DIFFUSERS_CONFIG in metadata:
            for key, value in dict(json.loads(metadata[DIFFUSERS_CONFIG])).items():
                part, _, option = key.partition(".")
                configs.setdefault(part, {})[option] = value
        for config in configs.values():
            _check_plain(file, config)
        return {part: float(config["lora_alpha"]) for part, config in configs.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidCapsule(
            f"The PEFT configuration of {file} cannot be read ({error!r}): save the adapter again."
        ) from error


def _check_plain(file: Path, config: Mapping[str, Any]) -> None:
    for option, plain in _PLAIN_OPTIONS.items():
        if config.get(option, plain[0]) not in plain:
            raise InvalidCapsule(
                f"{file} was trained with {option}={str(config[option])[:80]}, which a capsule "
                "cannot say: train it with plain LoRA."
            )


def _dotted(lora: Lora, prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """Factors under the names of PEFT, behind a prefix for each network."""
    tensors = {}
    for part, pairs in lora.factors.items():
        for path, factors in pairs.items():
            name = path.removeprefix(TEXT_MODEL) if TEXT_MODEL in prefixes[part] else path
            for side, factor in zip("AB", factors, strict=True):
                tensors[f"{prefixes[part]}{name}.lora_{side}.weight"] = factor
    return tensors


def _peft_config(lora: Lora, base: str, targets: list[str]) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": _number(lora.alpha),
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": targets,
    }


def _kohya_tensors(lora: Lora) -> dict[str, Tensor]:
    tensors = {}
    for part, pairs in lora.factors.items():
        for path, (lora_a, lora_b) in pairs.items():
            deeper = TEXT_MODEL if part == TEXT_ENCODER else ""
            name = f"{deeper}{path.removeprefix(deeper)}".replace(".", "_")
            name = KOHYA_PREFIXES[part] + name
            tensors[f"{name}.lora_down.weight"] = lora_a
            tensors[f"{name}.lora_up.weight"] = lora_b
            # kohya writes alpha in the factors' precision; where that would change it, wider.
            alpha = torch.tensor(lora.alpha, dtype=lora_a.dtype)
            exact = float(alpha) == lora.alpha
            tensors[f"{name}.alpha"] = alpha if exact else torch.tensor(lora.alpha)
    return tensors


def _kohya_metadata(lora: Lora) -> dict[str, str]:
    dim, alpha = str(lora.rank), str(_number(lora.alpha))
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": dim,
        "ss_network_alpha": alpha,
    }
    if any(b.dim() == 4 for pairs in lora.factors.values() for _, b in pairs.values()):
        metadata["ss_network_args"] = json.dumps({"conv_dim": dim, "conv_alpha": alpha})
    return metadata


def _number(value: float) -> int | float:
    """The number as JSON writes it elsewhere: 4, not 4.0."""
    return int(value) if value == int(value) else value
