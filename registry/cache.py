"""Checked copies of blobs on the local disk, for those who serve from a store far away.

A copy is checked on every read like the store's own bytes; a damaged one is fetched again. Copies
appear by renaming, so that none is ever seen half-written, and a lock per digest lets several
processes fetch one blob once. The least recently read go when the folder is over its bound.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from registry.errors import StorageUnavailable

MAX_BYTES = 4 * 1024**3
LOCK_S = 60
SUFFIX = ".capsule"
PART = ".part-"
PART_S = 3600


@dataclass(frozen=True)
class CacheMetrics:
    """A cache at one moment.

    Attributes:
        budget_bytes: What it may hold.
        held_bytes: What it holds, whoever put it there.
        entries: Copies in it.
        hits: Sound copies that this process found.
        misses: Blobs that it had to read from the store.
        evictions: Copies that it removed to make room.
    """

    budget_bytes: int
    held_bytes: int
    entries: int
    hits: int
    misses: int
    evictions: int


class Cache:
    """A folder of copies, which processes of one machine may share.

    Args:
        folder: Created when it is missing; files in it that are not the cache's are left alone.
        max_bytes: Bound of all copies together; a blob above it is not kept.

    Raises:
        StorageUnavailable: The folder cannot be used.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._hits = self._misses = self._evictions = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageUnavailable(
                f"The registry's cache {folder} cannot be used: {error.strerror}. Name another "
                "folder in REALFILL_REGISTRY_CACHE."
            ) from error
        self._remove_torn()

    def get(self, digest: str, read: Callable[[str], bytes]) -> bytes:
        """The bytes with this digest, from a sound copy or else from `read`, which checks them.

        Raises:
            CorruptObject, StorageUnavailable: As `read` does; a cache that cannot be written is
                passed over.
        """
        found = self._hit(digest)
        if found is not None:
            return found
        with self._locked(digest):
            # Another process may have fetched it while this one waited.
            found = self._hit(digest)
            if found is None:
                found = read(digest)
                with self._lock:
                    self._misses += 1
                self._keep(digest, found)
            return found

    def metrics(self) -> CacheMetrics:
        """Contents, and what this process found and removed."""
        sizes = [size for _, size, _ in self._copies()]
        with self._lock:
            return CacheMetrics(
                budget_bytes=self._max_bytes,
                held_bytes=sum(sizes),
                entries=len(sizes),
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
            )

    def drop(self, digest: str) -> None:
        """Remove the copy; without one, do nothing."""
        with suppress(OSError):
            self._path(digest).unlink(missing_ok=True)

    def digests(self) -> list[str]:
        """Digests of which there is a copy, the least recently read first."""
        return [path.name.removesuffix(SUFFIX) for _, _, path in self._copies()]

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}{SUFFIX}"

    def _hit(self, digest: str) -> bytes | None:
        found = self._copy(digest)
        with self._lock:
            self._hits += found is not None
        return found

    def _copy(self, digest: str) -> bytes | None:
        path = self._path(digest)
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == digest:
                os.utime(path)
                return data
            path.unlink()
        except OSError:
            return None
        return None

    def _keep(self, digest: str, data: bytes) -> None:
        """Copy the bytes, and make room; a full disk only costs the copy."""
        if len(data) > self._max_bytes:
            return
        with suppress(OSError):
            handle, name = tempfile.mkstemp(prefix=PART, dir=self._folder)
            part = Path(name)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                part.replace(self._path(digest))
            finally:
                part.unlink(missing_ok=True)
        self._make_room(digest)

    def _make_room(self, newest: str) -> None:
        copies = self._copies()
        excess = sum(size for _, size, _ in copies) - self._max_bytes
        for _, size, path in copies:
            if excess <= 0:
                return
            if path != self._path(newest):
                with suppress(OSError):
                    path.unlink(missing_ok=True)
                excess -= size
                with self._lock:
                    self._evictions += 1

    def _remove_torn(self) -> None:
        """Parts of copies whose writers died long ago."""
        for path in self._folder.glob(f"{PART}*"):
            with suppress(OSError):
                if path.stat().st_mtime < time.time() - PART_S:
                    path.unlink()

    def _copies(self) -> list[tuple[int, int, Path]]:
        """Moment of the last read, size and path of each copy, oldest first."""
        found = []
        for path in self._folder.glob(f"*{SUFFIX}"):
            # Another process may have removed it since it was listed.
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        return sorted(found)

    @contextmanager
    def _locked(self, digest: str) -> Iterator[None]:
        """At most one process per digest; who waits too long, or cannot lock, goes on without."""
        # A lock per two digits: their files stay, and there are at most 256 of them.
        lock = FileLock(self._folder / f".{digest[:2]}.lock")
        try:
            lock.acquire(timeout=LOCK_S)
        except (Timeout, OSError):
            yield
            return
        try:
            yield
        finally:
            lock.release()
