"""The registry: immutable versions of scene adapters, and aliases that move between them.

    registry = Registry.open("./realfill-registry")
    version = registry.publish(capsule)         # version 1 of the scene the capsule names
    data = registry.fetch("tower@live")         # its bytes, checked against their digest

Publishing first stores and re-reads the bytes, then writes every row in one transaction: whoever
looks sees the whole version or none. A `Registry` may be shared by threads; a forked process must
open its own.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy.engine import URL

from registry import catalog, ledger, verification
from registry.aliases import Step, step_back
from registry.blobs import Blobs, ObjectStore, open_bucket, open_directory
from registry.database import Database
from registry.errors import InvalidReference, NotFound, StorageUnavailable
from registry.records import (
    LIVE,
    AliasMove,
    Fault,
    Reference,
    Scene,
    Version,
    check_alias,
    check_number,
    check_scene,
)
from registry.schema import REVISION
from registry.upload import inspect

DEFAULT_PLACE = "./realfill-registry"
PLACE_VARIABLE = "REALFILL_REGISTRY"
DATABASE_VARIABLE = "REALFILL_REGISTRY_DATABASE"
DATABASE_FILE = "registry.db"
PAGE = 100


def _now() -> datetime:
    return datetime.now(UTC)


class Registry:
    """Versions and aliases of scene adapters; `Registry.open` builds one from an address.

    Args:
        database: Where the rows are, its tables prepared.
        store: Where the bytes are; it need not be trusted.
        clock: Present time, in UTC.
    """

    def __init__(
        self, database: Database, store: ObjectStore, clock: Callable[[], datetime] = _now
    ) -> None:
        self._database = database
        self._blobs = Blobs(store)
        self._clock = clock

    @staticmethod
    def open(
        place: str | Path | None = None, *, database: str | None = None, create: bool = True
    ) -> Registry:
        """Open a registry, and create it first where there is none.

        Args:
            place: Directory or `s3://bucket/prefix` for the bytes; by default the variable
                REALFILL_REGISTRY, else ./realfill-registry.
            database: URL of the database; by default the variable REALFILL_REGISTRY_DATABASE,
                else the file registry.db in the directory.
            create: False to refuse a directory that holds no registry yet.

        Raises:
            NotFound: There is no registry, and create is False.
            StorageUnavailable: The place or the database cannot be used.
        """
        opened, store = _locate(place, database, create)
        opened.prepare()
        return Registry(opened, store)

    @staticmethod
    def upgrade(place: str | Path | None = None, *, database: str | None = None) -> str:
        """Bring the tables of an existing registry to this code's revision, and return that.

        Raises:
            NotFound: There is no registry.
            StorageUnavailable: The tables are newer than this code.
        """
        opened, _ = _locate(place, database, create=False)
        opened.upgrade()
        return REVISION

    def close(self) -> None:
        """Close the database's connections."""
        self._database.close()

    def publish(
        self,
        data: bytes,
        *,
        scene: str | None = None,
        alias: str | None = LIVE,
        by: str | None = None,
    ) -> Version:
        """Add a capsule as the scene's next version and point the alias to it.

        Bytes that the scene holds already give the version they have; the alias still moves.

        Args:
            data: The capsule file.
            scene: Scene to publish under; the capsule's own by default.
            alias: Name to move to the version, or None to move none.
            by: Who publishes; the login name by default.

        Raises:
            InvalidUpload: The bytes are not a sound capsule.
            InvalidReference: The scene or the alias is not a name.
            AlreadyExists: The scene holds these bytes in a retired version.
            StorageUnavailable: The store or the database failed; nothing is visible.
        """
        upload = inspect(data)
        scene = check_scene(scene or upload.scene)
        if alias is not None:
            check_alias(alias)
        self._blobs.put(data, upload.digest)
        by, at = _person(by), self._clock()
        with self._database.writing() as connection:
            ledger.add_scene(connection, scene, at)
            scene_id = ledger.lock_scene(connection, scene)
            number = ledger.number_of(connection, scene_id, scene, upload.digest)
            if number is None:
                number = ledger.add_version(connection, scene_id, scene, upload, by, at)
            if alias is not None:
                ledger.move(connection, Step(scene_id, scene, alias, number, "publish", by, at))
            return catalog.find_any_version(connection, scene, number)

    def resolve(self, reference: str) -> Version:
        """The version that a reference names now.

        Retired versions are found by their digest only, so that work which pinned a digest ends
        as it began.

        Args:
            reference: `name` (its alias live), `name@alias`, `name@3` or `sha256:<64 hex>`.

        Raises:
            InvalidReference: The text has none of these forms.
            NotFound: It names nothing.
        """
        parsed = Reference.parse(reference)
        with self._database.reading() as connection:
            return catalog.find_version(connection, parsed)

    def fetch(self, reference: str) -> bytes:
        """The capsule that a reference names now, its bytes checked against the digest.

        Raises:
            InvalidReference, NotFound: As `resolve`.
            CorruptObject: The stored bytes are missing or altered.
            StorageUnavailable: The store or the database failed.
        """
        return self._blobs.get(self.resolve(reference).digest)

    def scenes(self, *, after: str = "", limit: int = PAGE) -> list[Scene]:
        """Scenes by name, from the one that follows `after`."""
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

    def history(self, scene: str, alias: str | None = None) -> list[AliasMove]:
        """Every move of the scene's aliases, or of one of them, oldest first, or NotFound."""
        check_scene(scene)
        with self._database.reading() as connection:
            return catalog.list_moves(connection, scene, alias)

    def set_alias(
        self,
        scene: str,
        alias: str,
        number: int,
        *,
        expect: int | None = None,
        by: str | None = None,
    ) -> Version:
        """Point an alias to a version.

        Args:
            expect: Number the alias must point to now, 0 for no such alias, None for any.

        Raises:
            NotFound: There is no such version, or it is retired.
            Conflict: The alias points elsewhere than expected.
        """
        reference = Reference(scene=check_scene(scene), number=check_number(number))
        return self._point(reference, check_alias(alias), expect, "alias", by)

    def promote(
        self,
        reference: str,
        *,
        to: str = LIVE,
        expect: int | None = None,
        by: str | None = None,
    ) -> Version:
        """Point the alias `to` to the version that `name@alias` or `name@3` names now.

        Raises:
            InvalidReference: The reference is a digest, which several scenes may hold.
            NotFound, Conflict: As `set_alias`.
        """
        parsed = Reference.parse(reference)
        if parsed.scene is None:
            raise InvalidReference(
                f"The digest {reference} names bytes and no scene: promote it as name@number, "
                "which `registry show` prints for it."
            )
        return self._point(parsed, check_alias(to), expect, "promote", by)

    def _point(
        self, reference: Reference, alias: str, expect: int | None, action: str, by: str | None
    ) -> Version:
        scene = str(reference.scene)
        with self._database.writing() as connection:
            scene_id = ledger.lock_scene(connection, scene)
            number = catalog.find_version(connection, reference).number
            step = Step(scene_id, scene, alias, number, action, _person(by), self._clock())
            ledger.move(connection, step, expect)
            return catalog.find_any_version(connection, scene, number)

    def rollback(self, scene: str, alias: str = LIVE, *, by: str | None = None) -> Version:
        """Point an alias back to the version it left last; again goes one further back.

        Raises:
            NotFound: There is no such scene, or no earlier version that is not retired.
        """
        check_scene(scene)
        check_alias(alias)
        with self._database.writing() as connection:
            scene_id = ledger.lock_scene(connection, scene)
            undoes, number = step_back(connection, scene_id, scene, alias)
            by, at = _person(by), self._clock()
            step = Step(scene_id, scene, alias, number, "rollback", by, at, undoes)
            ledger.move(connection, step)
            return catalog.find_any_version(connection, scene, number)

    def retire(self, scene: str, number: int, *, by: str | None = None) -> Version:
        """Hide a version; its number and its bytes are kept.

        Raises:
            NotFound: There is no such version.
            Conflict: An alias points to it.
        """
        return self._set_retired(scene, number, self._clock(), by)

    def restore(self, scene: str, number: int, *, by: str | None = None) -> Version:
        """Show a retired version again, or raise NotFound."""
        return self._set_retired(scene, number, None, by)

    def _set_retired(
        self, scene: str, number: int, retired: datetime | None, by: str | None
    ) -> Version:
        check_scene(scene)
        check_number(number)
        with self._database.writing() as connection:
            scene_id = ledger.lock_scene(connection, scene)
            version = catalog.find_any_version(connection, scene, number)
            if (version.retired is None) != (retired is None):
                at = self._clock()
                ledger.set_retired(connection, scene_id, version, retired, _person(by), at)
            return catalog.find_any_version(connection, scene, number)

    def verify(self, progress: Callable[[Version], None] | None = None) -> list[Fault]:
        """Read every capsule and compare it with its digest and its row; slow, changes nothing.

        Args:
            progress: Called after each version.
        """
        return verification.verify(self, progress)


def _person(by: str | None) -> str:
    if by is None:
        try:
            by = getpass.getuser()
        except (OSError, KeyError):
            by = "unknown"
    # PostgreSQL takes neither NUL nor half of a surrogate pair.
    return by.encode("utf-8", "replace").decode().replace("\0", "")[:200]


def _locate(
    place: str | Path | None, database: str | None, create: bool
) -> tuple[Database, ObjectStore]:
    """The database and the store of an address, before the tables are looked at."""
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
    file = folder / DATABASE_FILE
    if not create and not url and not file.is_file():
        raise NotFound(
            f"There is no registry at {folder}: name its directory in {PLACE_VARIABLE} or with "
            "--registry, or publish a capsule to create it."
        )
    store = open_directory(folder)
    return Database(url or URL.create("sqlite", database=str(file.resolve()))), store
