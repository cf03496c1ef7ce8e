"""A round through everything, on every database and store, every time."""

from __future__ import annotations

from contextlib import closing
from datetime import timedelta

import pytest
from sqlalchemy import text

from registry import Conflict, CorruptObject, NotFound, Query, Registry, catalog
from registry.blobs import blob_key
from tests.registry.capsules import capsule
from tests.registry.conftest import Backend

NOW = timedelta(0)


def test_round_of_a_version(registry: Registry) -> None:
    """Published, found, moved, rolled back, retired, restored: each step shows in the next."""
    first = registry.publish(capsule(seed=0), tags={"site": "north"}, by="ada")
    second = registry.publish(capsule(seed=1), metrics={"psnr": 31.5}, parent=1, by="ada")
    assert registry.resolve("tower") == second
    assert (second.parent, second.metrics["psnr"], second.metrics["steps"]) == (1, 31.5, 10)
    assert registry.fetch(f"sha256:{first.digest}") == capsule(seed=0)
    assert registry.search(Query(tags={"site": "north"})).versions[0].number == 1
    assert registry.search(Query(metrics=["psnr>31"])).versions == (second,)
    assert registry.rollback("tower", by="bob").number == 1
    assert registry.retire("tower", 2).retired is not None
    assert registry.restore("tower", 2) == registry.resolve("tower@2")
    assert [move.action for move in registry.history("tower")] == ["publish", "publish", "rollback"]
    assert registry.verify() == []


def test_what_is_read_together_is_of_one_moment(registry: Registry, backend: Backend) -> None:
    """What others publish meanwhile shows in the next transaction, so that no export is torn."""
    registry.publish(capsule(seed=0))
    with closing(backend.open()) as other, registry.database.reading() as connection:
        scene = catalog.find_scene(connection, "tower")
        other.publish(capsule(seed=1))
        versions = catalog.list_versions(connection, "tower", before=None, limit=9, retired=True)
        assert (scene.latest, [version.number for version in versions]) == (1, [1])
        assert catalog.find_scene(connection, "tower") == scene
        assert len(catalog.list_moves(connection, "tower", "live")) == 1
    assert registry.scene("tower").latest == 2


def test_round_of_a_sweep(registry: Registry, backend: Backend) -> None:
    """What is retired and held by nobody goes; publishing it again brings the bytes back."""
    gone = registry.publish(capsule(seed=0), alias=None)
    kept = registry.publish(capsule(seed=1))
    registry.hold([gone.digest], "lane-1")
    with pytest.raises(Conflict, match="served by lane-1"):
        registry.retire("tower", 1)
    registry.release("lane-1")
    registry.retire("tower", 1)
    assert registry.sweep(grace=NOW).removed == (gone.digest,)
    assert not (backend.folder / blob_key(gone.digest)).exists()
    assert (backend.folder / blob_key(kept.digest)).exists()
    with pytest.raises(NotFound, match="removed by a sweep"):
        registry.fetch(f"sha256:{gone.digest}")
    registry.publish(capsule(seed=0), scene="bridge")
    assert registry.fetch("bridge") == capsule(seed=0)
    assert registry.verify() == []


def test_round_of_an_erasure(registry: Registry, backend: Backend) -> None:
    """Rows and bytes go, what another scene shares stays, and the name is not given again."""
    own = registry.publish(capsule(seed=0))
    shared = registry.publish(capsule(seed=1))
    registry.publish(capsule(seed=1), scene="bridge")
    erasure = registry.erase("tower", reason="the owner asked", by="ada")
    assert (erasure.removed, erasure.shared) == ((own.digest,), (shared.digest,))
    assert not (backend.folder / blob_key(own.digest)).exists()
    assert registry.tombstone("tower") == erasure.tombstone
    assert erasure.tombstone.last_number == 2
    with pytest.raises(NotFound, match=r"was erased on .* by ada \(the owner asked\)"):
        registry.resolve("tower")
    with pytest.raises(Conflict, match="was erased"):
        registry.publish(capsule(seed=2))
    with pytest.raises(Conflict, match="were erased"):
        registry.publish(capsule(seed=0), scene="bridge")
    assert registry.fetch("bridge") == capsule(seed=1)
    assert registry.verify() == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "swap"])
def test_damaged_blob_is_named_at_the_next_read(
    registry: Registry, backend: Backend, damage: str
) -> None:
    """A flipped byte, a short file, a missing and a swapped one are never served."""
    version = registry.publish(capsule(seed=0))
    other = registry.publish(capsule(seed=1), scene="bridge")
    store, key = backend.store(), blob_key(version.digest)
    data = store.get(key)
    assert data is not None
    match damage:
        case "flip":
            store.put(key, data[:-5] + bytes([data[-5] ^ 4]) + data[-4:])
        case "truncate":
            store.put(key, data[: len(data) // 2])
        case "remove":
            store.delete(key)
        case "swap":
            store.put(key, registry.fetch(f"sha256:{other.digest}"))
    with pytest.raises(CorruptObject, match=f"sha256:{version.digest}"):
        registry.fetch("tower")
    assert [(fault.code, fault.thing) for fault in registry.verify()] == [
        ("corrupt_object", "tower@1")
    ]


@pytest.mark.parametrize(
    ("edit", "read", "names"),
    [
        ("UPDATE versions SET base = 'sd2' WHERE number = 2", "resolve", "row of tower@2"),
        ("UPDATE versions SET created_by = 'eve' WHERE number = 2", "resolve", "row of tower@2"),
        ("UPDATE versions SET metadata = '{}' WHERE number = 2", "fetch", "row of tower@2"),
        ("UPDATE aliases SET number = 1 WHERE number = 2", "resolve", "alias tower@live"),
    ],
)
def test_edited_row_is_named_at_the_next_read(
    registry: Registry, edit: str, read: str, names: str
) -> None:
    """A row that was changed behind the registry's back is not answered with."""
    for seed in range(2):
        registry.publish(capsule(seed=seed))
    with registry.database.writing() as connection:
        connection.execute(text(edit))
    with pytest.raises(CorruptObject, match=f"{names} .*edited"):
        getattr(registry, read)("tower")
    assert len(registry.verify()) == 1
