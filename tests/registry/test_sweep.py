"""Tests of leases, sweeps and erasures, by a clock that is set by hand."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from registry import (
    Conflict,
    InvalidReference,
    LeaseLost,
    NotFound,
    Protected,
    Registry,
    StorageUnavailable,
)
from registry.blobs import FOLDER, blob_key, open_directory
from registry.database import Database
from registry.errors import AlreadyExists, CorruptObject
from registry.schema import audit, tombstones
from tests.registry.capsules import MemoryObjects, TearingObjects, capsule

HOUR = timedelta(hours=1)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.moment = datetime(2026, 5, 4, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.moment

    def pass_by(self, time: timedelta) -> None:
        """Let time pass."""
        self.moment += time


class Objects(MemoryObjects):
    """A store that can be told to refuse deletions, and what happens before it is read next."""

    broken = False
    before_get: Callable[[], object] | None = None

    def get(self, key: str) -> bytes | None:
        """See ObjectStore."""
        happen, self.before_get = self.before_get, None
        if happen is not None:
            happen()
        return super().get(key)

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        if self.broken:
            raise StorageUnavailable("The store does not answer: try again.")
        super().delete(key)


class Shop:
    """A registry in memory, its clock and its store."""

    def __init__(self, place: Path) -> None:
        self.clock = Clock()
        self.objects = Objects()
        database = Database(f"sqlite:///{place}/rows.db")
        database.prepare()
        self.registry = Registry(database, self.objects, clock=self.clock)

    def retired(self, seed: int = 0) -> str:
        """Publish and retire a version of tower; its digest."""
        version = self.registry.publish(capsule(seed=seed), alias=None)
        self.registry.retire("tower", version.number)
        return version.digest


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    """A registry with one version in use, which no sweep may touch."""
    shop = Shop(tmp_path)
    shop.registry.publish(capsule(seed=100), scene="kept")
    yield shop
    assert shop.registry.fetch("kept") == capsule(seed=100)
    assert shop.registry.verify() == []
    shop.registry.close()


def test_garbage_is_marked_first_and_removed_after_the_grace_period(shop: Shop) -> None:
    """One sweep marks, one that comes too early does nothing, a later one removes."""
    digest = shop.retired()
    assert shop.registry.sweep(grace=HOUR).marked == (digest,)
    shop.clock.pass_by(HOUR / 2)
    early = shop.registry.sweep(grace=HOUR)
    assert (early.marked, early.removed) == ((), ())
    shop.clock.pass_by(HOUR / 2)
    late = shop.registry.sweep(grace=HOUR)
    assert (late.removed, late.removed_bytes) == ((digest,), len(capsule()))
    assert blob_key(digest) not in shop.objects.objects
    again = shop.registry.sweep(grace=HOUR)
    assert (again.marked, again.spared, again.removed) == ((), (), ())


def test_dry_run_says_what_a_sweep_would_do_and_does_nothing(shop: Shop) -> None:
    """Its report equals that of the sweep after it, but for one word."""
    digest = shop.retired()
    stranger = "ab" * 32
    shop.objects.put(blob_key(stranger), b"left by a publisher that died")
    for grace in (HOUR, timedelta(0)):
        told = shop.registry.sweep(grace=grace, dry_run=True)
        assert set(shop.objects.objects) >= {blob_key(digest), blob_key(stranger)}
        done = shop.registry.sweep(grace=grace)
        assert told.dry_run
        assert (told.marked, told.removed) == (done.marked, done.removed)


def test_bytes_without_a_row_are_swept_too(shop: Shop) -> None:
    """What a publisher left that died before its transaction; other files are left alone."""
    stranger = "ab" * 32
    shop.objects.put(blob_key(stranger), b"left")
    shop.objects.put(f"{FOLDER}/ab/letter", b"dear")
    assert shop.registry.sweep(grace=HOUR).marked == (stranger,)
    shop.clock.pass_by(HOUR)
    assert shop.registry.sweep(grace=HOUR).removed == (stranger,)
    assert f"{FOLDER}/ab/letter" in shop.objects.objects


def test_version_that_comes_back_is_spared(shop: Shop) -> None:
    """Restoring ends the grace period; it begins anew at the next retirement."""
    digest = shop.retired()
    shop.registry.sweep(grace=HOUR)
    shop.registry.restore("tower", 1)
    shop.clock.pass_by(HOUR)
    assert shop.registry.sweep(grace=HOUR).spared == (digest,)
    shop.registry.retire("tower", 1)
    assert shop.registry.sweep(grace=HOUR).removed == ()


def test_leased_bytes_are_not_swept(shop: Shop) -> None:
    """A lease on a retired version keeps its bytes until it expires."""
    digest = shop.retired()
    shop.registry.hold([digest], "lane-1", lasting=HOUR)
    assert shop.registry.sweep(grace=timedelta(0)).marked == ()
    shop.clock.pass_by(HOUR)
    assert shop.registry.leases() == []
    assert shop.registry.sweep(grace=timedelta(0)).removed == (digest,)
    with pytest.raises(LeaseLost, match="gave them up for removal"):
        shop.registry.hold([digest], "lane-1")


def test_lease_keeps_a_version_from_being_retired(shop: Shop) -> None:
    """Holders are named; a renewed lease lasts on, a released one does not."""
    version = shop.registry.publish(capsule(), alias=None)
    shop.registry.hold([version.digest], "lane-1", lasting=HOUR)
    shop.registry.hold([version.digest], "lane-2", lasting=HOUR)
    shop.clock.pass_by(HOUR / 2)
    shop.registry.hold([version.digest], "lane-1", lasting=HOUR)
    with pytest.raises(Conflict, match="served by lane-1, lane-2"):
        shop.registry.retire("tower", 1)
    shop.clock.pass_by(HOUR / 2)
    with pytest.raises(Conflict, match="served by lane-1:"):
        shop.registry.retire("tower", 1)
    assert shop.registry.release("lane-1") == 1
    assert shop.registry.retire("tower", 1).retired is not None


def test_leases_are_taken_all_or_none(shop: Shop) -> None:
    """One digest that is gone leaves the others unclaimed."""
    digest = shop.registry.publish(capsule()).digest
    with pytest.raises(LeaseLost):
        shop.registry.hold([digest, "0" * 64], "lane-1")
    assert shop.registry.leases() == []
    assert shop.registry.hold([], "lane-1") == []


def test_swept_version_is_not_restored_until_it_is_published_again(shop: Shop) -> None:
    """Its number and row stay, and say what became of it."""
    digest = shop.retired()
    shop.registry.sweep(grace=timedelta(0))
    with pytest.raises(Conflict, match="a sweep removed its bytes"):
        shop.registry.restore("tower", 1)
    with pytest.raises(NotFound, match="removed by a sweep"):
        shop.registry.fetch(f"sha256:{digest}")
    with pytest.raises(AlreadyExists, match="registry restore tower@1"):
        shop.registry.publish(capsule())
    assert shop.registry.restore("tower", 1).swept is None
    assert shop.registry.fetch("tower@1") == capsule()


def test_interrupted_sweep_is_finished_by_the_next(shop: Shop) -> None:
    """The store failed after the decision: the bytes are given up, and removed later."""
    digest = shop.retired()
    shop.objects.broken = True
    with pytest.raises(StorageUnavailable):
        shop.registry.sweep(grace=timedelta(0))
    shop.objects.broken = False
    assert blob_key(digest) in shop.objects.objects
    assert shop.registry.sweep(grace=HOUR).removed == (digest,)


def test_missing_bytes_do_not_stop_a_sweep(shop: Shop) -> None:
    """Someone removed them by hand: nothing is left to do."""
    digest = shop.retired()
    del shop.objects.objects[blob_key(digest)]
    assert shop.registry.sweep(grace=timedelta(0)).removed == (digest,)


def test_bytes_that_came_back_after_their_removal_are_removed_again(shop: Shop) -> None:
    """A publisher stored them and was refused: by a guard, or by an erasure that came between."""
    swept = shop.retired()
    shop.registry.sweep(grace=timedelta(0))
    shop.registry.protect("kept")
    with pytest.raises(Protected):
        shop.registry.publish(capsule(), scene="kept")
    erased = shop.registry.publish(capsule("bridge", 1)).digest
    shop.objects.before_get = lambda: shop.registry.erase("bridge", reason="asked")
    with pytest.raises(Conflict, match="was erased"):
        shop.registry.publish(capsule("bridge", 1))
    assert set(shop.objects.objects) >= {blob_key(swept), blob_key(erased)}
    told = shop.registry.sweep(grace=HOUR, dry_run=True)
    assert set(shop.objects.objects) >= {blob_key(swept), blob_key(erased)}
    done = shop.registry.sweep(grace=HOUR)
    assert told.removed == done.removed == tuple(sorted([swept, erased]))
    assert set(shop.objects.objects).isdisjoint({blob_key(swept), blob_key(erased)})
    assert shop.registry.sweep(grace=HOUR).removed == ()


def test_erasure_removes_bytes_that_came_back_too(shop: Shop) -> None:
    """Those of a version that was swept, and that a refused publisher had stored again."""
    digest = shop.retired()
    shop.registry.sweep(grace=timedelta(0))
    shop.registry.protect("kept")
    with pytest.raises(Protected):
        shop.registry.publish(capsule(), scene="kept")
    assert shop.registry.erase("tower", reason="asked").removed == (digest,)
    assert blob_key(digest) not in shop.objects.objects


class SweepingObjects(MemoryObjects):
    """A store from which the first object is taken as soon as it is there."""

    taken = False

    def put(self, key: str, data: bytes) -> None:
        """Keep every object but the first."""
        if self.taken:
            super().put(key, data)
        self.taken = True


def test_bytes_that_a_sweep_takes_at_once_are_stored_again(tmp_path: Path) -> None:
    """Publishing does not fail because a sweep came between writing and reading back."""
    database = Database(f"sqlite:///{tmp_path}/rows.db")
    database.prepare()
    registry = Registry(database, SweepingObjects())
    registry.publish(capsule())
    assert registry.fetch("tower") == capsule()


def test_store_that_tears_publishes_nothing(tmp_path: Path) -> None:
    """Bytes that come back altered are tried once more, then no row is written."""
    database = Database(f"sqlite:///{tmp_path}/rows.db")
    database.prepare()
    registry = Registry(database, TearingObjects())
    with pytest.raises(CorruptObject, match="were altered"):
        registry.publish(capsule())
    assert registry.scenes() == []


def test_torn_files_of_dead_writers_are_removed(tmp_path: Path) -> None:
    """Old ones only: a writer may be at work."""
    database = Database(f"sqlite:///{tmp_path}/rows.db")
    database.prepare()
    registry = Registry(database, open_directory(tmp_path / "shop"))
    digest = registry.publish(capsule()).digest
    folder = (tmp_path / "shop" / blob_key(digest)).parent
    old, new = folder / f"{digest}#1", folder / f"{digest}#2"
    for torn in (old, new):
        torn.write_bytes(b"half")
    os.utime(old, (1, 1))
    assert registry.sweep(grace=HOUR, dry_run=True).torn == (str(old),)
    assert registry.sweep(grace=HOUR).torn == (str(old),)
    assert (old.exists(), new.exists()) == (False, True)


def test_erasure_needs_a_reason_and_no_lease(shop: Shop) -> None:
    """A served scene is erased by force only."""
    digest = shop.registry.publish(capsule()).digest
    shop.registry.hold([digest], "lane-1")
    with pytest.raises(InvalidReference, match="say who asked for it"):
        shop.registry.erase("tower", reason="")
    with pytest.raises(Conflict, match="served by lane-1"):
        shop.registry.erase("tower", reason="asked")
    assert shop.registry.erase("tower", reason="asked", force=True).removed == (digest,)
    assert shop.registry.leases() == []


def test_nothing_of_an_erased_scene_is_left_in_the_file(tmp_path: Path) -> None:
    """Neither rows nor free pages nor the log hold the prompt; the audit says that it went."""
    registry = Registry.open(tmp_path / "registry")
    registry.publish(capsule(prompt="a photo of Rosebud Cottage"), tags={"owner": "kane"})
    registry.erase("tower", reason="asked", by="ada")
    registry.close()
    for file in (tmp_path / "registry").glob("registry.db*"):
        data = file.read_bytes().lower()
        assert b"rosebud" not in data
    rows = sqlite3.connect(tmp_path / "registry" / "registry.db")
    actions = [action for (action,) in rows.execute("SELECT action FROM audit ORDER BY id")]
    rows.close()
    assert actions[-1] == "scene.erased"


def test_interrupted_erasure_is_finished_by_the_next_sweep(shop: Shop) -> None:
    """Rows go first; whatever the store still holds is removed without a grace period."""
    digest = shop.registry.publish(capsule()).digest
    shop.objects.broken = True
    with pytest.raises(StorageUnavailable):
        shop.registry.erase("tower", reason="asked")
    shop.objects.broken = False
    assert [scene.name for scene in shop.registry.scenes()] == ["kept"]
    assert shop.registry.sweep(grace=HOUR).removed == (digest,)
    assert blob_key(digest) not in shop.objects.objects


def test_scene_that_came_back_is_erased_again(shop: Shop) -> None:
    """Imports once brought erased scenes back: the tombstone of that time is no obstacle."""
    digest = shop.registry.publish(capsule()).digest
    first = {"scene": "tower", "last_number": 1, "erased": shop.clock(), "erased_by": "ada"}
    with shop.registry.database.writing() as connection:
        connection.execute(insert(tombstones).values(**first, reason="asked"))
    erasure = shop.registry.erase("tower", reason="asked again", by="bob")
    assert erasure.removed == (digest,)
    assert shop.registry.tombstone("tower") == erasure.tombstone
    with pytest.raises(Conflict, match=r"by bob \(asked again\)"):
        shop.registry.publish(capsule(seed=1))


def test_protected_alias_moves_by_override_only(shop: Shop) -> None:
    """Publishing, promoting, setting and rolling back are refused; each is audited."""
    for seed in range(2):
        shop.registry.publish(capsule(seed=seed))
    shop.registry.protect("tower", by="ada")
    shop.registry.protect("tower", by="ada")
    for change in (
        lambda: shop.registry.publish(capsule(seed=2)),
        lambda: shop.registry.promote("tower@1"),
        lambda: shop.registry.set_alias("tower", "live", 1),
        lambda: shop.registry.rollback("tower"),
    ):
        with pytest.raises(
            Protected, match=r"'live' of 'tower' is protected.* tower --alias live`"
        ):
            change()
    assert shop.registry.resolve("tower").number == 2
    assert shop.registry.scene("tower").latest == 2
    assert shop.registry.set_alias("tower", "live", 1, override=True).aliases == ("live",)
    shop.registry.unprotect("tower", by="ada")
    assert shop.registry.rollback("tower").number == 2
    with shop.registry.database.reading() as connection:
        actions = list(connection.execute(select(audit.c.action).order_by(audit.c.id)).scalars())
    assert actions.count("alias.protected") == actions.count("alias.unprotected") == 1
