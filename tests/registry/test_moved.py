"""A registry whose directory is moved, or replaced, under whoever has it open."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from registry import Registry
from registry.errors import NotFound, StorageUnavailable
from tests.registry.capsules import capsule


def test_a_moved_registry_takes_nothing_that_nobody_would_find(tmp_path: Path) -> None:
    """Neither reads nor writes go on in files without a name; put back, it is as before."""
    place = tmp_path / "registry"
    with_tower = Registry.open(place)
    with_tower.publish(capsule())
    place.rename(tmp_path / "away")
    with pytest.raises(StorageUnavailable, match=r"registry\.db is gone.*put it back"):
        with_tower.resolve("tower")
    with pytest.raises(StorageUnavailable, match="is gone"):
        with_tower.publish(capsule(scene="bridge"))
    assert not place.exists()
    (tmp_path / "away").rename(place)
    assert with_tower.resolve("tower").number == 1
    assert with_tower.publish(capsule(scene="bridge")).number == 1


def test_another_registry_at_the_same_place_is_seen(tmp_path: Path) -> None:
    """As by whoever opens it now: what was replaced is not told any more."""
    place = tmp_path / "registry"
    held = Registry.open(place)
    held.publish(capsule())
    place.rename(tmp_path / "away")
    Registry.open(place).publish(capsule(scene="bridge"))
    assert [scene.name for scene in held.scenes()] == ["bridge"]
    with pytest.raises(NotFound):
        held.resolve("tower")
    assert held.publish(capsule(scene="square")).number == 1
    assert [scene.name for scene in Registry.open(place).scenes()] == ["bridge", "square"]


def test_every_connection_notices_that_the_file_is_another(tmp_path: Path) -> None:
    """Not only the one that is used first after it."""
    place = tmp_path / "registry"
    held = Registry.open(place)
    held.publish(capsule())
    barrier = threading.Barrier(4)

    def names(_: int) -> list[str]:
        barrier.wait()
        return [scene.name for scene in held.scenes()]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(names, range(4))) == [["tower"]] * 4
        place.rename(tmp_path / "away")
        Registry.open(place).publish(capsule(scene="bridge"))
        for _ in range(3):
            assert list(pool.map(names, range(4))) == [["bridge"]] * 4
