"""Where a registry is: its directory or bucket, its database, and the cache in front of them."""

from __future__ import annotations

import os
from pathlib import Path

from sqlalchemy.engine import URL

from registry.blobs import ObjectStore, open_bucket, open_directory
from registry.cache import MAX_BYTES, Cache
from registry.database import Database
from registry.errors import NotFound, StorageUnavailable

DEFAULT_PLACE = "./realfill-registry"
PLACE_VARIABLE = "REALFILL_REGISTRY"
DATABASE_VARIABLE = "REALFILL_REGISTRY_DATABASE"
CACHE_VARIABLE = "REALFILL_REGISTRY_CACHE"
CACHE_BYTES_VARIABLE = "REALFILL_REGISTRY_CACHE_BYTES"
DATABASE_FILE = "registry.db"


def locate(
    place: str | Path | None, database: str | URL | None, *, create: bool
) -> tuple[Database, ObjectStore]:
    """The database and the store of an address, before the tables are looked at.

    Raises:
        NotFound: There is no registry, and create is False.
        StorageUnavailable: The place or the database cannot be used.
    """
    place = str(place or os.environ.get(PLACE_VARIABLE) or DEFAULT_PLACE)
    url = database or os.environ.get(DATABASE_VARIABLE)
    if place.startswith("s3://"):
        if not url:
            raise StorageUnavailable(
                f"The registry at {place} needs a database beside the bucket: set "
                f"{DATABASE_VARIABLE} to postgresql://user:password@host/name."
            )
        return Database(url), open_bucket(place)
    folder = Path(place.removeprefix("file://"))
    if not create and not url and not (folder / DATABASE_FILE).is_file():
        raise NotFound(
            f"There is no registry at {folder}: name its directory in {PLACE_VARIABLE} or with "
            "--registry, or publish a capsule to create it."
        )
    store = open_directory(folder)
    return Database(url or own_database(folder)), store


def own_database(folder: Path) -> URL:
    """The file in the directory that holds the rows where no other database is named."""
    # Written out, characters such as ? would be read as a part of the address.
    return URL.create("sqlite", database=str((folder / DATABASE_FILE).resolve()))


def locate_cache(folder: str | Path | None, max_bytes: int | None) -> Cache | None:
    """The cache in this folder, or in the one that the environment names; None without either.

    Raises:
        StorageUnavailable: The folder or the bound cannot be used.
    """
    folder = folder or os.environ.get(CACHE_VARIABLE)
    if not folder:
        return None
    if max_bytes is None:
        text = os.environ.get(CACHE_BYTES_VARIABLE) or str(MAX_BYTES)
        if not text.isdecimal():
            raise StorageUnavailable(
                f"The variable {CACHE_BYTES_VARIABLE} is {ascii(text)[:40]}: write a number of "
                "bytes, such as 4000000000."
            )
        max_bytes = int(text)
    return Cache(Path(folder), max_bytes)
