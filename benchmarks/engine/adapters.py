"""Adapters and capsules of random factors: as large as trained ones, and as much work."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from realfill.adapter import Adapter
from realfill.base import PROMPT, Base
from realfill.capsule import Capsule, CapsuleHeader, write_capsule
from service.engine import Swapper


def random_adapter(base: Base, *, rank: int, seed: int, scale: float = 1.0) -> Adapter:
    """Half-precision factors for every module that the base's adapters target."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path in Swapper(base.unet, base.adapter_modules).module_paths:
        rows, columns = base.unet.get_submodule(path).weight.flatten(1).shape
        lora_a = torch.randn(rank, columns, generator=generator) / columns**0.5
        lora_b = 0.1 * torch.randn(rows, rank, generator=generator) / rank**0.5
        factors[path] = (lora_a.half(), lora_b.half())
    return Adapter(factors, scale=scale)


def random_capsule(
    base: Base,
    scene: str,
    *,
    rank: int,
    seed: int,
    scale: float = 1.0,
    extras: Mapping[str, Tensor] | None = None,
) -> bytes:
    """A whole capsule of such an adapter; references and the like may be given as its extras."""
    header = CapsuleHeader(
        scene=scene,
        base=base.name,
        base_fingerprint=base.fingerprint,
        rank=rank,
        alpha=scale * rank,
        scale=scale,
        target_modules=base.adapter_modules,
        prompt=PROMPT,
        size_px=base.size_px,
        training={"steps": 0, "seed": seed},
        digests={},
        licence="none: random weights",
    )
    return write_capsule(
        Capsule(
            header=header,
            adapter=random_adapter(base, rank=rank, seed=seed, scale=scale),
            text_adapter=Adapter({}, scale=1.0),
            prompt_embedding=base.embed(PROMPT).detach().cpu().half(),
            extras=dict(extras or {}),
        )
    )
