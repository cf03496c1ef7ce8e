"""Seconds per call of everything a registry does often."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.registry.contents import capsule
from registry import Query, Registry

SMALL_BYTES = 64_000
CAPSULE_BYTES = 6_000_000
WARM_UP = 5


def seconds_of(calls: Iterable[Callable[[], object]]) -> list[float]:
    """How long each call takes."""
    seconds = []
    for call in calls:
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds


def publish(registry: Registry, repeats: int) -> list[float]:
    """Publish small capsules, each new, and move `live` to each."""
    files = [capsule("publish", seed, SMALL_BYTES) for seed in range(WARM_UP + repeats)]
    return seconds_of([partial(registry.publish, data) for data in files])[WARM_UP:]


def set_alias(registry: Registry, repeats: int) -> list[float]:
    """Move an alias of the scene `publish` to and fro between two of its versions."""
    numbers = [1 + turn % 2 for turn in range(WARM_UP + repeats)]
    moves = [partial(registry.set_alias, "publish", "next", number) for number in numbers]
    return seconds_of(moves)[WARM_UP:]


def resolve(registry: Registry, references: list[str]) -> list[float]:
    """Resolve one reference after the other."""
    for reference in references[:WARM_UP]:
        registry.resolve(reference)
    return seconds_of([partial(registry.resolve, text) for text in references])


def pages(registry: Registry, repeats: int) -> dict[str, list[float]]:
    """Turn pages of a hundred in every way there is, each page another one than before."""
    deep = registry.search(limit=10_000).after
    kinds: dict[str, Callable[[int], Any]] = {
        "scenes": lambda turn: registry.scenes(after=f"scene-{97 * turn % 900:05}"),
        "versions": lambda turn: registry.versions(f"scene-{97 * turn % 900 + 1:05}"),
        "newest": lambda turn: registry.search(),
        "deep": lambda turn: registry.search(after=deep),
        "tag": lambda turn: registry.search(Query(tags={"part": str(turn % 10)})),
        "alias": lambda turn: registry.search(Query(alias="live")),
        "metric": lambda turn: registry.search(Query(metrics=["psnr>=20"])),
        "text": lambda turn: registry.search(Query(text=f"{97 * turn % 900 + 1:05}")),
    }
    found = {}
    for name, turn_to in kinds.items():
        turn_to(0)
        found[name] = seconds_of([partial(turn_to, turn) for turn in range(repeats)])
    return found


def fetch(place: str, database: str | None, cache: Path, repeats: int) -> dict[str, list[float]]:
    """Fetch a capsule of 6 MB from the store into an empty cache, then again from the cache."""
    registry = Registry.open(place, database=database, cache=cache)
    version = registry.publish(capsule("fetch", 0, CAPSULE_BYTES), alias=None)
    reference = f"sha256:{version.digest}"
    found: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(repeats):
        for copy in cache.glob("*.capsule"):
            copy.unlink()
        for name in found:
            found[name] += seconds_of([partial(registry.fetch, reference)])
    registry.close()
    return found
