"""Tests of the cache: checked copies, a bound, and several processes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from registry import CorruptObject, Registry, StorageUnavailable
from registry.cache import PART, Cache, CacheMetrics
from tests.registry.capsules import capsule
from tests.registry.conftest import Backend

KB = 1000


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Far:
    """A store far away, which counts what is read from it."""

    def __init__(self, *blobs: bytes) -> None:
        self.blobs = {digest_of(data): data for data in blobs}
        self.read_count = 0

    def read(self, digest: str) -> bytes:
        """The bytes, as Blobs.read gives them."""
        self.read_count += 1
        return self.blobs[digest]


def test_second_read_is_near(tmp_path: Path) -> None:
    """The store is asked once."""
    far, cache = Far(b"capsule"), Cache(tmp_path / "cache")
    assert [cache.get(digest_of(b"capsule"), far.read) for _ in range(3)] == [b"capsule"] * 3
    assert far.read_count == 1


@pytest.mark.parametrize("damaged", [b"capsulE", b"cap", b""])
def test_damaged_copy_is_fetched_again(tmp_path: Path, damaged: bytes) -> None:
    """A copy is checked on every read and never trusted."""
    far, cache = Far(b"capsule"), Cache(tmp_path)
    digest = digest_of(b"capsule")
    cache.get(digest, far.read)
    (copy,) = tmp_path.glob("*.capsule")
    copy.write_bytes(damaged)
    assert cache.get(digest, far.read) == b"capsule"
    assert (far.read_count, copy.read_bytes()) == (2, b"capsule")


def test_least_recently_read_goes_first(tmp_path: Path) -> None:
    """The bound holds after every read, and a blob above it is not kept at all."""
    blobs = [bytes([number]) * 4 * KB for number in range(3)]
    far, cache = Far(*blobs, bytes(11 * KB)), Cache(tmp_path, 10 * KB)
    one, two, three = map(digest_of, blobs)
    for digest in (one, two, one, three):
        cache.get(digest, far.read)
        time.sleep(0.01)
    assert cache.digests() == [one, three]
    cache.get(digest_of(bytes(11 * KB)), far.read)
    assert cache.digests() == [one, three]
    # Read from afar: the three, and what is too large to be kept.
    assert cache.metrics() == CacheMetrics(
        budget_bytes=10 * KB, held_bytes=8 * KB, entries=2, hits=1, misses=4, evictions=1
    )


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    """Only the cache's own copies and torn parts are removed, the latter after an hour."""
    (tmp_path / "letter.txt").write_text("dear")
    old, new = tmp_path / f"{PART}old", tmp_path / f"{PART}new"
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (1, 1))
    far, cache = Far(bytes(2 * KB), b"x" * KB), Cache(tmp_path, 2 * KB)
    for digest in far.blobs:
        cache.get(digest, far.read)
    assert cache.digests() == [digest_of(b"x" * KB)]
    assert (tmp_path / "letter.txt").exists()
    assert (old.exists(), new.exists()) == (False, True)


def test_cache_that_cannot_be_written_costs_only_the_copy(tmp_path: Path) -> None:
    """What cannot be written is still answered with."""
    far, cache = Far(b"capsule"), Cache(tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_bytes(b"in the way")
    assert cache.get(digest_of(b"capsule"), far.read) == b"capsule"
    assert cache.digests() == []


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """The message has the remedy."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageUnavailable, match="Name another folder in REALFILL_REGISTRY_CACHE"):
        Cache(tmp_path / "file" / "cache")


def read_slowly(digest: str) -> bytes:
    """Leave a trace of each read from afar."""
    Path(f"{os.getpid()}.read").touch()
    time.sleep(0.3)
    return b"capsule"


def get_once(folder: str, _turn: int) -> bytes:
    """One process's read."""
    os.chdir(folder)
    return Cache(Path(folder) / "cache").get(digest_of(b"capsule"), read_slowly)


def test_processes_fetch_a_blob_once(tmp_path: Path) -> None:
    """While one reads from afar, the others wait for its copy."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, mp_context=context) as pool:
        answers = list(pool.map(get_once, [str(tmp_path)] * 3, range(3), timeout=120))
    assert answers == [b"capsule"] * 3
    assert len(list(tmp_path.glob("*.read"))) == 1


def test_registry_serves_from_its_cache(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fetched capsule is answered with though the store lost it, and `verify` still sees that."""
    monkeypatch.setenv("REALFILL_REGISTRY_CACHE", str(tmp_path / "near"))
    monkeypatch.setenv("REALFILL_REGISTRY_CACHE_BYTES", "100000")
    registry = Registry.open(backend.place)
    version = registry.publish(capsule())
    registry.fetch("tower")
    (blob,) = (path for path in (backend.folder / "blobs").rglob("*") if path.is_file())
    blob.unlink()
    assert registry.fetch("tower") == capsule()
    assert [fault.code for fault in registry.verify()] == ["corrupt_object"]
    monkeypatch.delenv("REALFILL_REGISTRY_CACHE")
    with pytest.raises(CorruptObject, match="are missing"):
        backend.open().fetch("tower")
    registry.erase("tower", reason="asked")
    assert Cache(tmp_path / "near").digests() == []
    assert version.digest not in {path.stem for path in (tmp_path / "near").iterdir()}


def test_cache_of_another_machine_loses_what_was_erased(tmp_path: Path) -> None:
    """Whoever opens the registry with a cache drops the copies of erased scenes from it."""
    place = tmp_path / "registry"
    service = Registry.open(place, cache=tmp_path / "near")
    kept = service.publish(capsule(scene="bridge"))
    service.publish(capsule())
    service.fetch("bridge")
    service.fetch("tower")
    service.close()
    Registry.open(place).erase("tower", reason="asked")
    assert len(Cache(tmp_path / "near").digests()) == 2
    Registry.open(place, cache=tmp_path / "near").close()
    assert Cache(tmp_path / "near").digests() == [kept.digest]


def test_malformed_bound_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The variable and its value are named."""
    monkeypatch.setenv("REALFILL_REGISTRY_CACHE_BYTES", "4 GB")
    with pytest.raises(StorageUnavailable, match="REALFILL_REGISTRY_CACHE_BYTES is '4 GB'"):
        Registry.open(tmp_path / "registry", cache=tmp_path / "cache")
