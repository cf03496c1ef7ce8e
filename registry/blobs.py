"""Bytes stored under their own digest, and the stores that can hold them.

A blob lies at `blobs/sha256/ab/<digest>`, where ab are the first two digits. Only damaged bytes
are written over, where the store can tell. Every read is checked against the digest, because
stores may lose or alter bytes and S3 servers differ in what they check.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, S3Store

from registry.cache import Cache, CacheMetrics
from registry.database import first_line
from registry.errors import CorruptObject, StorageUnavailable

RETRY_LIMIT = 3
RETRY_S = 30
FOLDER = "blobs/sha256"
SIGNATURES = "signatures/sha256"

_DIGEST = re.compile(r"[0-9a-f]{64}")


class ObjectStore(Protocol):
    """Named bytes. Keys are relative paths with forward slashes."""

    @property
    def place(self) -> str:
        """Where the objects lie, for messages."""

    def put(self, key: str, data: bytes) -> None:
        """Write the object, whole or not at all, over an older one.

        Raises:
            StorageUnavailable: The store does not answer or has no room.
        """

    def create(self, key: str, data: bytes) -> bool:
        """Write the object unless there is one; a store that knows no conditions writes over it.

        Returns:
            Whether it was written.

        Raises:
            StorageUnavailable: The store does not answer or has no room.
        """

    def get(self, key: str) -> bytes | None:
        """The object, or None where there is none.

        Raises:
            StorageUnavailable: The store does not answer.
        """

    def delete(self, key: str) -> None:
        """Remove the object; without one, do nothing.

        Raises:
            StorageUnavailable: The store does not answer.
        """

    def keys(self, prefix: str) -> Iterator[str]:
        """Every key below the prefix, a whole path component.

        Raises:
            StorageUnavailable: The store does not answer.
        """

    def torn(self, before: datetime) -> list[Path]:
        """Half-written files that interrupted writers left before that time; S3 keeps none."""


class ObstoreObjects:
    """An ObjectStore over any store of the obstore package.

    Args:
        store: Local directory, S3 bucket or memory.
        place: Its address, for messages.
        folder: Its local directory, if it is one: then what is put is also forced to the disk.
    """

    def __init__(self, store: Any, place: str, folder: Path | None = None) -> None:
        self._store = store
        self._folder = folder
        self.place = place

    def put(self, key: str, data: bytes) -> None:
        """See ObjectStore."""
        with self._translated("write", key):
            self._write(key, data, "overwrite")

    def create(self, key: str, data: bytes) -> bool:
        """See ObjectStore."""
        try:
            self._write(key, data, "create")
        except AlreadyExistsError:
            return False
        except (BaseError, OSError):
            # Some servers answer "not implemented" to a condition; whatever else failed does so
            # again, and is told of.
            self.put(key, data)
        return True

    def _write(self, key: str, data: bytes, mode: Literal["create", "overwrite"]) -> None:
        obstore.put(self._store, key, data, mode=mode, use_multipart=False)
        if self._folder is not None:
            _force_to_disk(self._folder / key)

    def get(self, key: str) -> bytes | None:
        """See ObjectStore."""
        with self._translated("read", key):
            try:
                return obstore.get(self._store, key).bytes().to_bytes()
            except FileNotFoundError:
                return None

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        with self._translated("delete", key):
            try:
                obstore.delete(self._store, key)
            except FileNotFoundError:
                return

    def keys(self, prefix: str) -> Iterator[str]:
        """See ObjectStore."""
        with self._translated("list", prefix):
            for page in obstore.list(self._store, prefix):
                for entry in page:
                    yield entry["path"]

    def torn(self, before: datetime) -> list[Path]:
        """See ObjectStore."""
        if self._folder is None:
            return []
        # What obstore writes to before it renames has a # and a number at its end.
        left = [path for path in (self._folder / FOLDER).glob("*/*#*") if path.is_file()]
        return [path for path in left if _written(path) <= before.timestamp()]

    @contextmanager
    def _translated(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            raise StorageUnavailable(
                f"The registry could not {verb} {key} at {self.place}: {first_line(error)}. "
                "Check that the place exists, that you may write there and that it has room, "
                "then try again; nothing was changed."
            ) from error


class Blobs:
    """Content-addressed bytes in an ObjectStore.

    Args:
        store: Where the bytes go; it need not be trusted.
        cache: Copies nearer by, checked like the store's.
    """

    def __init__(self, store: ObjectStore, cache: Cache | None = None) -> None:
        self._store = store
        self._cache = cache

    def put(self, data: bytes, digest: str) -> None:
        """Store the bytes, unless a sound copy is there, and read them back.

        Raises:
            CorruptObject: The store gave back other bytes than it was given.
            StorageUnavailable: The store does not answer or has no room.
        """
        key = blob_key(digest)
        stored = self._store.get(key)
        if stored is None:
            # What another writer stored meanwhile, and may have published, is not put at risk.
            self._store.create(key, data)
        elif _digest(stored) != digest:
            self._store.put(key, data)
        else:
            return
        self.read(digest)

    def get(self, digest: str) -> bytes:
        """The bytes with this digest, checked, from the cache where it has them.

        Raises:
            CorruptObject, StorageUnavailable: As `read`.
        """
        if self._cache is None:
            return self.read(digest)
        return self._cache.get(digest, self.read)

    def read(self, digest: str) -> bytes:
        """The bytes with this digest, checked, from the store itself.

        Raises:
            CorruptObject: The bytes are missing, or differ from the digest.
            StorageUnavailable: The store does not answer.
        """
        key = blob_key(digest)
        data = self._store.get(key)
        if data is None:
            raise CorruptObject(
                f"The bytes of sha256:{digest} are missing: there is no {key} at "
                f"{self._store.place}. Restore the file from a backup, or publish the same "
                "capsule again."
            )
        found = _digest(data)
        if found != digest:
            raise CorruptObject(
                f"The stored bytes of sha256:{digest} were altered: {key} at {self._store.place} "
                f"has {len(data)} bytes with sha256 {found}. Restore the file from a backup, or "
                "publish the same capsule again."
            )
        return data

    def delete(self, digest: str) -> None:
        """Remove the bytes and their signature; without any, do nothing.

        Raises:
            StorageUnavailable: The store does not answer.
        """
        self._store.delete(signature_key(digest))
        self._store.delete(blob_key(digest))
        self.drop_copy(digest)

    def signature(self, digest: str) -> bytes | None:
        """The signature of the bytes, unchecked, or None.

        Raises:
            StorageUnavailable: The store does not answer.
        """
        return self._store.get(signature_key(digest))

    def sign(self, digest: str, signature: bytes) -> None:
        """Put a signature beside the bytes, over an older one.

        Raises:
            StorageUnavailable: The store does not answer or has no room.
        """
        self._store.put(signature_key(digest), signature)

    def cache_metrics(self) -> CacheMetrics | None:
        """Of the cache; None where there is none."""
        return None if self._cache is None else self._cache.metrics()

    def copies(self) -> list[str]:
        """Digests of which the cache has a copy."""
        return [] if self._cache is None else self._cache.digests()

    def drop_copy(self, digest: str) -> None:
        """Remove the cache's copy; without one, do nothing."""
        if self._cache is not None:
            self._cache.drop(digest)

    def digests(self) -> Iterator[str]:
        """Every digest that the store has bytes for, sound or not.

        Raises:
            StorageUnavailable: The store does not answer.
        """
        for key in self._store.keys(FOLDER):
            digest = key.rpartition("/")[2]
            if key == blob_key(digest) and _DIGEST.fullmatch(digest):
                yield digest

    def torn(self, before: datetime) -> list[str]:
        """Half-written files that interrupted writers left before that time."""
        return [str(path) for path in self._store.torn(before)]

    def remove_torn(self, before: datetime) -> list[str]:
        """Remove those files, and name them."""
        left = self._store.torn(before)
        for path in left:
            path.unlink(missing_ok=True)
        return [str(path) for path in left]


def blob_key(digest: str) -> str:
    """The key of a digest of 64 hex digits."""
    return f"{FOLDER}/{digest[:2]}/{digest}"


def signature_key(digest: str) -> str:
    """The key of the signature of a digest."""
    return f"{SIGNATURES}/{digest[:2]}/{digest}"


def open_directory(folder: Path) -> ObjectStore:
    """A store in a local directory, created when it is missing.

    Raises:
        StorageUnavailable: The directory cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        store = LocalStore(folder.resolve())
    except (BaseError, OSError) as error:
        raise StorageUnavailable(
            f"The registry directory {folder} cannot be used: {first_line(error)}. "
            "Name another one in REALFILL_REGISTRY."
        ) from error
    return ObstoreObjects(store, str(folder), folder.resolve())


def open_bucket(url: str) -> ObjectStore:
    """A store in an S3 bucket, `s3://bucket/prefix`; credentials come from the AWS_* environment.

    Raises:
        StorageUnavailable: The address or the environment is malformed.
    """
    try:
        store = S3Store.from_url(
            url,
            retry_config={
                "max_retries": RETRY_LIMIT,
                "retry_timeout": timedelta(seconds=RETRY_S),
            },
        )
    except (BaseError, ValueError) as error:
        raise StorageUnavailable(
            f"The registry address {url} cannot be used: {first_line(error)}. Write it like "
            "s3://bucket/prefix and set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION "
            "and, for another provider, AWS_ENDPOINT_URL."
        ) from error
    return ObstoreObjects(store, url)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _force_to_disk(path: Path) -> None:
    """Wait until the file and its name in the directory would survive a loss of power."""
    for place in (path, path.parent):
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
