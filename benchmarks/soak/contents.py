"""What the soaked server serves: a registry of random scenes, and pictures to complete."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.engine.adapters import random_capsule
from realfill.base import Base
from realfill.nano.photographs import photograph
from registry import Registry

# Different ranks, since an arena packs and pads them apart.
RANKS = (4, 8, 16)
# Every third scene has several versions, so that its alias can move; the most popular one does.
EVERY, VERSIONS = 3, 3
# Pictures of several shapes; each scene keeps to one of them.
SIDES_PX = ((96, 80), (64, 64), (72, 112))


@dataclass(frozen=True)
class Contents:
    """What was published.

    Attributes:
        digests: Of each scene's versions from 1 on, the most popular scene first. The alias points
            to the last of them.
        targets: PNG files of target and mask, by scene.
    """

    digests: Mapping[str, tuple[str, ...]]
    targets: Mapping[str, tuple[bytes, bytes]]

    @property
    def scenes(self) -> tuple[str, ...]:
        """Names, the most popular first."""
        return tuple(self.digests)

    @property
    def versions(self) -> dict[str, int]:
        """How many versions each scene has."""
        return {scene: len(digests) for scene, digests in self.digests.items()}


def fill(
    base: Base,
    folder: Path,
    *,
    scenes: int,
    scale: float,
    seed: int,
    on_scene: Callable[[], object] = lambda: None,
) -> Contents:
    """Publish scenes of random adapters in a registry.

    Args:
        base: What the adapters are for.
        folder: Of the registry.
        scenes: How many; their names contain each other, as scene1 and scene10.
        scale: Of the adapters: how far they change pictures.
        seed: First seed of the adapters.
        on_scene: Called after each.
    """
    digests: dict[str, tuple[str, ...]] = {}
    registry = Registry.open(folder)
    try:
        for place in range(scenes):
            name = f"scene{place + 1}"
            count = VERSIONS if place % EVERY == 0 else 1
            digests[name] = tuple(
                registry.publish(
                    random_capsule(
                        base,
                        name,
                        rank=RANKS[place % len(RANKS)],
                        seed=seed + VERSIONS * place + version,
                        scale=scale,
                    )
                ).digest
                for version in range(count)
            )
            on_scene()
    finally:
        registry.close()
    pictures = [_picture(*sides) for sides in SIDES_PX]
    targets = {name: pictures[place % len(pictures)] for place, name in enumerate(digests)}
    return Contents(digests, targets)


def _picture(width: int, height: int) -> tuple[bytes, bytes]:
    """A photograph of that size with a hole in its middle, as PNG files."""
    photo = Image.fromarray(photograph("coffee.png")).resize((width, height))
    hole = np.zeros((height, width), np.uint8)
    hole[height // 3 : -height // 3, width // 3 : -width // 3] = 255
    return _png(photo), _png(Image.fromarray(hole))


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
