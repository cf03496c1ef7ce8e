"""How a scene is trained: the presets, and the digest that names a configuration."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

LoraDropout = Literal["layer", "element", "all"]
MaskReduction = Literal["max", "nearest"]
MAX_RANK = 128
# Options that came later, at the values that they had before they could be chosen: these are left
# out of the digest, so that adapters trained before keep their names.
IMPLIED = {"target_union": True, "mask_reduction": "max"}


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides what an adapter becomes, besides the photographs and the base.

    The defaults are the paper's. Checked on construction; ``digest`` names the whole.

    Attributes:
        steps: Optimiser steps.
        batch: Samples per step, drawn with replacement from references and target.
        rank: Rank R of the factors; the adapter is scaled by alpha / rank.
        rate_unet: Learning rate of the U-Net's factors.
        rate_text: Learning rate of the text encoder's factors; 0 leaves it as it is.
        decay_rate: Whether the rates fall to a tenth along a half cosine.
        prompt_dropout: Probability that the prompt becomes the empty one.
        mask_dropout: Probability that everything is missing.
        lora_dropout: Probability of ``lora_drop_mode``.
        lora_drop_mode: Drop whole layers' branches, elements of their inputs, or all branches.
        zoom: Crops show a window of 1 / ``zoom`` of the short side up to all of it.
        complement_share: How often the random rectangles are what is known and all else is missing;
            the paper's is a half.
        hole_share: Share of draws whose mask is the shape of the target's hole and no random one,
            so that a short run meets holes like the one it is for; the paper has none.
        align_share: Share of the references' draws that show what the target's window shows, where
            SIFT finds it, and else windows of up to one and a half short sides; the paper's is 0.
        colour_match: The colours of references are moved towards the target's by a random share of
            up to this; the paper's is 0.
        colour_jitter: Brightness, gamma and channels of references vary by up to this, as natural
            logarithms of factors (the channels by a third of it), so that colours are taken from
            what is known of the target; the paper's is 0.
        known_weight: Weight in the loss of cells that the conditioning shows anyway, beside 1 for
            those it hides; the paper's is 1.
        timestep_power: Timesteps are T * u^(1 / power): above 1, more of them are noisy, where the
            content is decided; the paper's are uniform.
        full_from: The finished adapter is fused at full strength where at least this share of the
            target's window is known, and else at the square of (share known / full_from): the less
            is known, the more the base's own continuation of it is worth. The paper has none, which
            is 0.
        target_union: Whether the target's random masks are joined with its own hole, so that
            nothing in it is shown; without, as some public code has it, for comparison.
        mask_reduction: A latent cell is missing if any of its pixels is, or (nearest) if the one in
            its middle is, as public code has it.
        pool: Pictures encoded once before training; 0 encodes fresh ones at every step.
        probe_every: Steps between two readings of the fixed probe; 0 for none.
        seed: Start of every random draw.
    """

    preset: str = "paper"
    steps: int = 2000
    batch: int = 16
    rank: int = 8
    alpha: float = 16.0
    rate_unet: float = 2e-4
    rate_text: float = 4e-5
    decay_rate: bool = False
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    prompt_dropout: float = 0.1
    mask_dropout: float = 0.1
    lora_dropout: float = 0.1
    lora_drop_mode: LoraDropout = "layer"
    zoom: float = 1.125
    complement_share: float = 0.5
    hole_share: float = 0.0
    align_share: float = 0.0
    colour_match: float = 0.0
    colour_jitter: float = 0.0
    known_weight: float = 1.0
    timestep_power: float = 1.0
    full_from: float = 0.0
    target_union: bool = True
    mask_reduction: MaskReduction = "max"
    pool: int = 0
    probe_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for option in fields(self):
            _check_kind(option.name, getattr(self, option.name), type(option.default))
        for name in ("steps", "batch", "rank"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.rank <= MAX_RANK, "rank", self.rank, f"at most {MAX_RANK}")
        for name in ("prompt_dropout", "mask_dropout", "lora_dropout"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        for name in ("rate_unet", "alpha", "clip_norm"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        _require(self.rate_text >= 0, "rate_text", self.rate_text, "0 or more")
        _require(self.zoom >= 1, "zoom", self.zoom, "1 or more")
        shares = ("complement_share", "hole_share", "align_share", "full_from")
        for name in (*shares, "colour_match", "colour_jitter"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        _require(0 < self.known_weight <= 1, "known_weight", self.known_weight, "in (0, 1]")
        _require(self.timestep_power > 0, "timestep_power", self.timestep_power, "above 0")
        _require(self.pool >= 0, "pool", self.pool, "0 or more")
        modes = ("layer", "element", "all")
        _require(
            self.lora_drop_mode in modes, "lora_drop_mode", self.lora_drop_mode, f"one of {modes}"
        )
        _require(
            self.mask_reduction in ("max", "nearest"),
            "mask_reduction",
            self.mask_reduction,
            "max or nearest",
        )

    @property
    def scale(self) -> float:
        """Factor of ``B @ A`` when the adapter is fused."""
        return self.alpha / self.rank

    @property
    def digest(self) -> str:
        """SHA-256 of the configuration's canonical JSON. 64 hex digits."""
        chosen = {k: v for k, v in asdict(self).items() if k not in IMPLIED or v != IMPLIED[k]}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def _check_kind(name: str, value: object, kind: type) -> None:
    """A finite number where a number is expected, and so on."""
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _require(number and math.isfinite(value), name, value, "a finite number")  # type: ignore[arg-type]
    elif kind is int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        _require(whole, name, value, "a whole number")
    elif kind is bool:
        _require(isinstance(value, bool), name, value, "true or false")


def _require(holds: bool, name: str, value: object, bound: str) -> None:
    if not holds:
        raise ValueError(f"Training option {name} is {value!r}: it must be {bound}.")


PRESETS: dict[str, TrainingConfig] = {
    "paper": TrainingConfig(),
    "balanced": TrainingConfig(
        preset="balanced", steps=600, pool=512, decay_rate=True, probe_every=50
    ),
    "fast": TrainingConfig(
        preset="fast", steps=200, pool=256, rate_unet=5e-4, decay_rate=True, probe_every=50
    ),
    "demo": TrainingConfig(
        preset="demo",
        steps=210,
        batch=16,
        rank=32,
        alpha=32.0,
        rate_unet=4e-3,
        rate_text=1e-3,
        decay_rate=True,
        lora_dropout=0.05,
        mask_dropout=0.0,
        complement_share=0.1,
        hole_share=0.7,
        align_share=0.8,
        colour_match=1.0,
        colour_jitter=0.1,
        known_weight=0.1,
        timestep_power=2.0,
        full_from=0.65,
        pool=224,
        probe_every=105,
    ),
}


def preset(name: str, **changes: Any) -> TrainingConfig:
    """A preset with some of its values changed.

    Raises:
        ValueError: The preset or a value's name is unknown, or a value is out of its range.
    """
    if name not in PRESETS:
        raise ValueError(f"No preset {name!r}: choose one of {', '.join(PRESETS)}.")
    known = {f.name for f in fields(TrainingConfig)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise ValueError(
            f"Unknown training option {unknown[0]!r}: choose from {', '.join(sorted(known))}."
        )
    return replace(PRESETS[name], **changes)
