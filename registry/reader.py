"""What a registry answers without changing anything; all that a service needs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from registry import catalog
from registry.blobs import Blobs, ObjectStore
from registry.cache import Cache, CacheMetrics
from registry.database import Database
from registry.errors import CorruptObject, NotFound
from registry.leases import claims_of
from registry.records import AliasMove, Lease, Page, Reference, Scene, Version, check_scene
from registry.search import Query, search
from registry.upload import read_header
from registry.verification import altered_fields

PAGE = 100


def now() -> datetime:
    """The present moment, in UTC."""
    return datetime.now(UTC)


class Reader:
    """Looks versions up, lists them and reads their bytes.

    Args:
        database: Where the rows are, its tables prepared.
        store: Where the bytes are; it need not be trusted.
        clock: Present time, in UTC.
        cache: Copies of the bytes nearer by.
    """

    def __init__(
        self,
        database: Database,
        store: ObjectStore,
        clock: Callable[[], datetime] = now,
        cache: Cache | None = None,
    ) -> None:
        self._database = database
        self._blobs = Blobs(store, cache)
        self._clock = clock

    @property
    def database(self) -> Database:
        """Where the rows are, for those who deliver events or copy scenes."""
        return self._database

    @property
    def blobs(self) -> Blobs:
        """Where the bytes are, for those who copy scenes."""
        return self._blobs

    def close(self) -> None:
        """Close the database's connections."""
        self._database.close()

    def drop_erased(self) -> None:
        """Remove copies of erased scenes from the cache, where another machine left them."""
        copies = self._blobs.copies()
        if copies:
            with self._database.reading() as connection:
                erased = catalog.erased_of(connection, copies)
            for digest in erased:
                self._blobs.drop_copy(digest)

    def resolve(self, reference: str) -> Version:
        """The version that a reference names now.

        Retired versions are found by their digest only, so that work which pinned a digest ends
        as it began.

        Args:
            reference: `name` (its alias live), `name@alias`, `name@3` or `sha256:<64 hex>`.

        Raises:
            InvalidReference: The text has none of these forms.
            NotFound: It names nothing.
            CorruptObject: The row of the version or of the alias was edited by hand.
        """
        parsed = Reference.parse(reference)
        with self._database.reading() as connection:
            return catalog.find_version(connection, parsed)

    def cache_metrics(self) -> CacheMetrics | None:
        """What the cache of fetched capsules holds and has found; None where there is none."""
        return self._blobs.cache_metrics()

    def fetch(self, reference: str) -> bytes:
        """The capsule that a reference names now, its bytes checked against digest and row.

        Raises:
            InvalidReference, NotFound: As `resolve`; or a sweep removed the bytes.
            CorruptObject: The stored bytes are missing or altered, or the row was edited.
            StorageUnavailable: The store or the database failed.
        """
        try:
            version, data = self._read(reference)
        except CorruptObject:
            # A sweep may have come between the row and the bytes: then the row tells by now.
            version, data = self._read(reference)
        altered = altered_fields(version, read_header(data))
        if altered:
            raise CorruptObject(
                f"The database's row of {version.reference} differs from its capsule in "
                f"{', '.join(altered)}: it was edited. Restore the database from a backup."
            )
        return data

    def _read(self, reference: str) -> tuple[Version, bytes]:
        version = self.resolve(reference)
        if version.swept is not None:
            raise NotFound(
                f"The bytes of {version.reference} were removed by a sweep on "
                f"{version.swept:%Y-%m-%d}: publish the same capsule again."
            )
        return version, self._blobs.get(version.digest)

    def scenes(self, *, after: str = "", limit: int = PAGE) -> list[Scene]:
        """Scenes by name, beginning with the one that follows `after`."""
        with self._database.reading() as connection:
            return catalog.list_scenes(connection, after=after, limit=limit)

    def scene(self, name: str) -> Scene:
        """One scene with its aliases, or NotFound."""
        check_scene(name)
        with self._database.reading() as connection:
            return catalog.find_scene(connection, name)

    def versions(
        self, scene: str, *, before: int | None = None, limit: int = PAGE, retired: bool = False
    ) -> list[Version]:
        """Versions of a scene, newest first.

        Args:
            before: Only numbers below this one, to turn pages.
            retired: Also those that were retired.

        Raises:
            NotFound: There is no such scene.
        """
        check_scene(scene)
        with self._database.reading() as connection:
            return catalog.list_versions(
                connection, scene, before=before, limit=limit, retired=retired
            )

    def search(
        self, query: Query | None = None, *, after: str | None = None, limit: int = PAGE
    ) -> Page:
        """Versions of all scenes that meet every condition of the query, newest first.

        Args:
            after: What the page before gave as its `after`.

        Raises:
            InvalidReference: `after` or `limit` is malformed.
        """
        with self._database.reading() as connection:
            return search(connection, query or Query(), after=after, limit=limit)

    def history(self, scene: str, alias: str | None = None) -> list[AliasMove]:
        """Every move of the scene's aliases, or of one of them, oldest first, or NotFound."""
        check_scene(scene)
        with self._database.reading() as connection:
            return catalog.list_moves(connection, scene, alias)

    def leases(self) -> list[Lease]:
        """Every claim that has not expired, by digest and holder."""
        with self._database.reading() as connection:
            return claims_of(connection, self._clock())
