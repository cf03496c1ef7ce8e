"""Several processes change one registry at once."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from registry import AlreadyExists, Conflict, NotFound, Registry
from tests.registry.capsules import capsule

PROCESSES = 3
ROUNDS = 12
SCENES = ("tower", "bridge")
REFUSALS = (AlreadyExists, Conflict, NotFound)


def change(place: str, worker: int) -> Counter[str]:
    """Publish, move, roll back, retire and fetch; count what was done and what was refused."""
    registry = Registry.open(place)
    counts: Counter[str] = Counter()
    for turn in range(ROUNDS):
        scene = SCENES[turn % 2]
        # Half of the capsules are published by all workers, who race for one version of each.
        data = capsule(scene=scene, seed=turn if turn % 4 < 2 else 1000 * (worker + 1) + turn)
        for step in ("publish", "alias", "rollback", "retire", "fetch"):
            try:
                take(step, registry, scene, data)
                counts[step] += 1
            except REFUSALS as error:
                counts[f"{step} {error.code}"] += 1
    registry.close()
    return counts


def take(step: str, registry: Registry, scene: str, data: bytes) -> None:
    """One step on one scene."""
    latest = registry.scene(scene).latest if step != "publish" else 0
    match step:
        case "publish":
            registry.publish(data, alias=None)
        case "alias":
            live = registry.scene(scene).aliases.get("live", 0)
            registry.set_alias(scene, "live", latest, expect=live)
        case "rollback":
            registry.rollback(scene)
        case "retire":
            registry.retire(scene, max(latest - 3, 1))
        case "fetch":
            registry.fetch(scene)


def test_processes_lose_and_duplicate_nothing(tmp_path: Path) -> None:
    """Numbers are dense, racing equal bytes are one version, every alias move follows the last."""
    place = str(tmp_path / "registry")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        every = list(pool.map(change, [place] * PROCESSES, range(PROCESSES), timeout=240))
    counts = sum(every, Counter())
    print(dict(counts))
    published = counts["publish"] + counts["publish already_exists"]
    assert published == PROCESSES * ROUNDS

    registry = Registry.open(place)
    shared = sum(turn % 4 < 2 for turn in range(ROUNDS))
    own = ROUNDS - shared
    everything = [registry.versions(scene, limit=1000, retired=True) for scene in SCENES]
    assert sum(len(versions) for versions in everything) == shared + own * PROCESSES
    for scene, versions in zip(SCENES, everything, strict=True):
        numbers = [version.number for version in versions]
        assert numbers == list(range(len(versions), 0, -1))
        assert len({version.digest for version in versions}) == len(versions)
        moves = registry.history(scene, "live")
        assert [move.previous for move in moves] == [None, *(move.number for move in moves[:-1])]
        assert registry.resolve(scene).number == moves[-1].number
    assert registry.verify() == []
