"""The pool of pictures that nano learns from: drawn ones, and views of the bundled photographs."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from realfill.nano.images import draw
from realfill.nano.photographs import PHOTOGRAPHS, photograph, view

POOL_PX = 160


def _drawn(span: tuple[int, int, int]) -> tuple[list[str], NDArray[np.uint8]]:
    start, stop, seed = span
    drawn = [draw(np.random.default_rng((seed, k)), POOL_PX) for k in range(start, stop)]
    return [caption for caption, _ in drawn], np.stack([picture for _, picture in drawn])


def _photographed(span: tuple[int, int, int]) -> tuple[list[str], NDArray[np.uint8]]:
    start, stop, seed = span
    views = []
    for k in range(start, stop):
        rng = np.random.default_rng((seed, 1, k))
        name = PHOTOGRAPHS[k % len(PHOTOGRAPHS)]
        views.append(view(rng, photograph(name), POOL_PX, zoom=0.35))
    names = [Path(PHOTOGRAPHS[k % len(PHOTOGRAPHS)]).stem for k in range(start, stop)]
    return [f"a photo of {name.replace('_', ' ')}" for name in names], np.stack(views)


def picture_pool(
    folder: Path, *, drawn: int, photographed: int, seed: int
) -> tuple[list[str], NDArray[np.uint8]]:
    """Captions and pictures to learn from, drawn once and kept in ``folder``. [K, 160, 160, 3]"""
    path = folder / f"pool-{drawn}-{photographed}-{seed}.npz"
    if not path.exists():
        spans = [(k, min(k + 50, drawn), seed) for k in range(0, drawn, 50)]
        shots = [(k, min(k + 50, photographed), seed) for k in range(0, photographed, 50)]
        with ProcessPoolExecutor() as workers:
            parts = list(workers.map(_drawn, spans)) + list(workers.map(_photographed, shots))
        captions = [caption for part in parts for caption in part[0]]
        folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".part.npz")
        np.savez(draft, captions=np.array(captions), pictures=np.concatenate([p for _, p in parts]))
        draft.replace(path)
    with np.load(path) as kept:
        return [str(c) for c in kept["captions"]], kept["pictures"]
