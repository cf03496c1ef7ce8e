"""The registry: immutable versions of scene adapters, and aliases that move between them.

    registry = Registry.open("./realfill-registry")
    version = registry.publish(capsule)         # version 1 of the scene the capsule names
    data = registry.fetch("tower@live")         # its bytes, checked against their digest

Publishing first stores and re-reads the bytes, then writes every row in one transaction: whoever
looks sees the whole version or none. A `Registry` may be shared by threads; a forked process must
open its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sqlalchemy.engine import URL

from registry import catalog, ledger
from registry.address import (
    CACHE_BYTES_VARIABLE,
    CACHE_VARIABLE,
    DATABASE_FILE,
    DATABASE_VARIABLE,
    DEFAULT_PLACE,
    PLACE_VARIABLE,
    locate,
    locate_cache,
)
from registry.aliases import Step, expected_number, step_back
from registry.errors import CorruptObject, InvalidReference, InvalidUpload
from registry.keeper import Keeper, person
from registry.records import (
    LIVE,
    Reference,
    Version,
    check_alias,
    check_metrics,
    check_number,
    check_scene,
    check_tags,
)
from registry.schema import REVISION
from registry.upload import Upload, inspect

__all__ = [
    "CACHE_BYTES_VARIABLE",
    "CACHE_VARIABLE",
    "DATABASE_FILE",
    "DATABASE_VARIABLE",
    "DEFAULT_PLACE",
    "PLACE_VARIABLE",
    "Registry",
]


class Registry(Keeper):
    """Versions and aliases of scene adapters; `Registry.open` builds one from an address."""

    @staticmethod
    def open(
        place: str | Path | None = None,
        *,
        database: str | URL | None = None,
        create: bool = True,
        cache: str | Path | None = None,
        cache_bytes: int | None = None,
    ) -> Registry:
        """Open a registry, and create it first where there is none.

        Args:
            place: Directory or `s3://bucket/prefix` for the bytes; by default the variable
                REALFILL_REGISTRY, else ./realfill-registry.
            database: URL of the database; by default the variable REALFILL_REGISTRY_DATABASE,
                else the file registry.db in the directory.
            create: False to refuse a directory that holds no registry yet.
            cache: Folder for checked copies of what is fetched; by default the variable
                REALFILL_REGISTRY_CACHE, else none are kept.
            cache_bytes: Bound of the copies; by default the variable
                REALFILL_REGISTRY_CACHE_BYTES, else 4 GiB.

        Raises:
            NotFound: There is no registry, and create is False.
            StorageUnavailable: The place or the database cannot be used.
        """
        opened, store = locate(place, database, create=create)
        opened.prepare()
        registry = Registry(opened, store, cache=locate_cache(cache, cache_bytes))
        registry.drop_erased()
        return registry

    @staticmethod
    def upgrade(place: str | Path | None = None, *, database: str | None = None) -> str:
        """Bring the tables of an existing registry to this code's revision, and return that.

        Raises:
            NotFound: There is no registry.
            StorageUnavailable: The tables are newer than this code.
        """
        opened, _ = locate(place, database, create=False)
        opened.upgrade()
        return REVISION

    def publish(
        self,
        data: bytes,
        *,
        scene: str | None = None,
        alias: str | None = LIVE,
        by: str | None = None,
        tags: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
        parent: int | None = None,
        override: bool = False,
    ) -> Version:
        """Add a capsule as the scene's next version and point the alias to it.

        Bytes that the scene holds already give the version they have; the alias still moves, and
        tags and metrics are added to it.

        Args:
            data: The capsule file.
            scene: Scene to publish under; the capsule's own by default.
            alias: Name to move to the version, or None to move none.
            by: Who publishes; the login name by default.
            tags: What to say of it, by key.
            metrics: What was measured of it; the numbers of its training report are there anyway.
            parent: Number of the version that training began from.
            override: Also where the alias is protected.

        Raises:
            InvalidUpload: The bytes are not a sound capsule.
            InvalidReference: The scene, the alias, a tag or a metric is not allowed.
            NotFound: There is no such parent.
            AlreadyExists: The scene holds these bytes in a retired version.
            Protected: The alias is protected, and override is False.
            Conflict: The scene or the bytes were erased.
            StorageUnavailable: The store or the database failed; nothing is visible.
        """
        upload = inspect(data)
        scene = _own_scene(upload) if scene is None else check_scene(scene)
        if alias is not None:
            check_alias(alias)
        labels = check_tags(tags or {}), check_metrics(metrics or {})
        with self._database.reading() as connection:
            ledger.refuse_erased(connection, scene, upload.digest)
        try:
            self._blobs.put(data, upload.digest)
            stored = True
        except CorruptObject:
            # A sweep may have taken them at once; below, where their row is held, none can.
            stored = False
        step = Step(0, scene, alias or "", 0, "publish", person(by), self._clock(), None, override)
        with self._database.writing() as connection:
            ledger.add_scene(connection, scene, step.at)
            step = replace(step, scene_id=ledger.lock_scene(connection, scene))
            swept = ledger.take_blob(connection, upload, step.at)
            # Once more, now that both rows are held.
            ledger.refuse_erased(connection, scene, upload.digest)
            if swept or not stored:
                self._blobs.put(data, upload.digest)
            held = ledger.held_as(connection, step.scene_id, upload.digest)
            if held is None or held.retired is None:
                if held is None:
                    number = ledger.add_version(connection, step, upload, parent)
                else:
                    number = held.number
                step = replace(step, number=number)
                ledger.set_labels(connection, step, *labels)
                if alias is not None:
                    ledger.move(connection, step)
                return catalog.find_any_version(connection, scene, number)
        # After the transaction, so that bytes which a sweep had removed are back and stay.
        raise ledger.retired_already(scene, held.number)

    def set_alias(
        self,
        scene: str,
        alias: str,
        number: int,
        *,
        expect: int | None = None,
        by: str | None = None,
        override: bool = False,
    ) -> Version:
        """Point an alias to a version.

        Args:
            expect: Number the alias must point to now, 0 for no such alias, None for any.
            override: Also where the alias is protected.

        Raises:
            NotFound: There is no such version, or it is retired.
            PreconditionFailed: The alias points elsewhere than expected.
            Protected: It is protected, and override is False.
        """
        reference = Reference(scene=check_scene(scene), number=check_number(number))
        step = Step(0, scene, check_alias(alias), number, "alias", person(by), self._clock())
        return self._point(reference, replace(step, override=override), expect)

    def promote(
        self,
        reference: str,
        *,
        to: str = LIVE,
        expect: int | None = None,
        by: str | None = None,
        override: bool = False,
    ) -> Version:
        """Point the alias `to` to the version that `name@alias` or `name@3` names now.

        Raises:
            InvalidReference: The reference is a digest, which several scenes may hold.
            NotFound, PreconditionFailed, Protected: As `set_alias`.
        """
        parsed = Reference.parse(reference)
        if parsed.scene is None:
            raise InvalidReference(
                f"The digest {reference} names bytes and no scene: promote it as name@number, "
                "which `registry show` prints for it."
            )
        step = Step(0, parsed.scene, check_alias(to), 0, "promote", person(by), self._clock())
        return self._point(parsed, replace(step, override=override), expect)

    def _point(self, reference: Reference, step: Step, expect: int | None) -> Version:
        with self._database.writing() as connection:
            scene_id = ledger.lock_scene(connection, step.scene)
            number = catalog.find_version(connection, reference).number
            ledger.move(connection, replace(step, scene_id=scene_id, number=number), expect)
            return catalog.find_any_version(connection, step.scene, number)

    def rollback(
        self,
        scene: str,
        alias: str = LIVE,
        *,
        expect: int | None = None,
        by: str | None = None,
        override: bool = False,
    ) -> Version:
        """Point an alias back to the version it left last; again goes one further back.

        Args:
            expect: Number the alias must point to now, None for any; with it, of several who roll
                the same version back one does, and the alias goes back once.
            override: Also where the alias is protected.

        Raises:
            NotFound: There is no such scene, or no earlier version that is not retired.
            PreconditionFailed: The alias points elsewhere than expected.
            Protected: The alias is protected, and override is False.
        """
        check_scene(scene)
        check_alias(alias)
        with self._database.writing() as connection:
            scene_id = ledger.lock_scene(connection, scene)
            # First, so that who comes too late is told so, and not that nothing is left.
            expected_number(connection, scene_id, scene, alias, expect)
            undoes, number = step_back(connection, scene_id, scene, alias)
            by, at = person(by), self._clock()
            step = Step(scene_id, scene, alias, number, "rollback", by, at, undoes, override)
            ledger.move(connection, step)
            return catalog.find_any_version(connection, scene, number)


def _own_scene(upload: Upload) -> str:
    """What a capsule calls its scene, if that can be a name here."""
    try:
        return check_scene(upload.scene)
    except InvalidReference as error:
        raise InvalidUpload(
            f"The capsule's realfill.scene is wrong. {error} Or publish it under another name, "
            "with --scene."
        ) from error
