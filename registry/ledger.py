"""Writing the tables, inside the caller's transaction: every change leaves its record there too."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Table, bindparam, delete, insert, literal, select, update
from sqlalchemy.dialects import postgresql, sqlite

from registry.aliases import Step, move_alias
from registry.catalog import find_any_version, find_tombstone, no_scene
from registry.errors import AlreadyExists, Conflict, NotFound, Protected
from registry.leases import holders
from registry.records import Version
from registry.schema import (
    TEXT_LENGTH,
    audit,
    blobs,
    deliveries,
    endpoints,
    metrics,
    outbox,
    protected_aliases,
    scenes,
    tags,
    versions,
)
from registry.seals import seal_of
from registry.upload import Upload

_INSERTS: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
# Built once: building a statement takes as long as running it on SQLite.
_LOCK_SCENE = select(scenes.c.id).where(scenes.c.name == bindparam("name")).with_for_update()
_GUARD = select(protected_aliases.c.name).where(
    protected_aliases.c.scene_id == bindparam("of_scene"),
    protected_aliases.c.name == bindparam("of_name"),
)
_ADD_AUDIT, _ADD_EVENT = insert(audit), insert(outbox).returning(outbox.c.id)
_OWE = insert(deliveries).from_select(
    ["endpoint_id", "event_id", "attempts"],
    select(endpoints.c.id, bindparam("of_event", type_=outbox.c.id.type), literal(0)),
)


def refuse_erased(connection: Connection, scene: str, *digests: str) -> None:
    """Stop whoever would bring back what was erased.

    Raises:
        Conflict: A scene of this name was erased, or were some of the bytes.
    """
    if find_tombstone(connection, scene) is not None:
        raise Conflict(str(no_scene(connection, scene)))
    for digest in digests:
        erased = connection.execute(
            select(blobs.c.erased).where(blobs.c.digest == digest)
        ).scalar_one_or_none()
        if erased is not None:
            raise Conflict(
                f"The bytes sha256:{digest} were erased on {erased:%Y-%m-%d} and are not "
                "taken again: train the scene again if it may be kept now."
            )


def add_scene(connection: Connection, name: str, at: datetime) -> None:
    """Insert the scene, unless it is there."""
    insert_if_new(connection, scenes, {"name": name, "last_number": 0, "created": at})


def lock_scene(connection: Connection, name: str) -> int:
    """The scene's id; its row is held until the transaction ends, so that changes to it queue.

    Raises:
        NotFound: There is no such scene.
    """
    scene_id: int | None = connection.execute(_LOCK_SCENE, {"name": name}).scalar_one_or_none()
    if scene_id is None:
        raise no_scene(connection, name)
    return scene_id


def take_blob(connection: Connection, upload: Upload, at: datetime) -> bool:
    """Insert the row of these bytes, or hold the one that is there, so that no sweep takes them.

    Returns:
        Whether a sweep may have removed the bytes since they were stored.
    """
    fields = {
        "digest": upload.digest,
        "tensor_digest": upload.tensor_digest,
        "size_bytes": upload.size_bytes,
        "stored": at,
    }
    insert_if_new(connection, blobs, fields)
    row = lock_blob(connection, upload.digest)
    if row.marked is not None:
        connection.execute(
            update(blobs)
            .where(blobs.c.digest == upload.digest)
            .values(**fields, marked=None, given_up=None, removed=None)
        )
    return row.given_up is not None


def lock_blob(connection: Connection, digest: str) -> Any:
    """The blob's row, held until the transaction ends."""
    return connection.execute(select(blobs).where(blobs.c.digest == digest).with_for_update()).one()


def held_as(connection: Connection, scene_id: int, digest: str) -> Any:
    """Number and moment of retirement that these bytes have in the scene, or None."""
    return connection.execute(
        select(versions.c.number, versions.c.retired).where(
            versions.c.scene_id == scene_id, versions.c.digest == digest
        )
    ).one_or_none()


def retired_already(scene: str, number: int) -> AlreadyExists:
    """The error for bytes that someone withdrew."""
    return AlreadyExists(
        f"The scene {scene!r} holds these bytes already as version {number}, which is "
        f"retired: bring it back with `registry restore {scene}@{number}`."
    )


def add_version(
    connection: Connection, step: Step, upload: Upload, parent: int | None = None
) -> int:
    """Insert a new version under the scene's next number, and return that; its blob is there.

    Raises:
        NotFound: The scene has no version of the parent's number.
    """
    scene_id, scene = step.scene_id, step.scene
    if parent is not None and not _has_version(connection, scene_id, parent):
        raise NotFound(
            f"The scene {scene!r} has no version {parent} to be the parent: "
            f"`registry list {scene}` shows them."
        )
    number: int = connection.execute(
        update(scenes)
        .where(scenes.c.id == scene_id)
        .values(last_number=scenes.c.last_number + 1)
        .returning(scenes.c.last_number)
    ).scalar_one()
    fields = {
        "number": number,
        "digest": upload.digest,
        "base": upload.base,
        "base_fingerprint": upload.base_fingerprint,
        "rank": upload.rank,
        "created": step.at,
        "created_by": step.by,
        "retired": None,
        "parent": parent,
    }
    words = f"{scene} {step.by} {upload.metadata['realfill.prompt']}"
    connection.execute(
        insert(versions).values(
            scene_id=scene_id,
            **fields,
            metadata=upload.metadata,
            text=words.casefold()[:TEXT_LENGTH],
            seal=seal_of({"scene": scene, **fields}),
        )
    )
    row = {"scene_id": scene_id, "number": number}
    for name, value in upload.metrics.items():
        connection.execute(insert(metrics).values(**row, name=name, value=value))
    details = {"number": number, "digest": upload.digest}
    record(connection, "version.published", scene, step.by, step.at, details)
    return number


def _has_version(connection: Connection, scene_id: int, number: int) -> bool:
    here = (versions.c.scene_id == scene_id) & (versions.c.number == number)
    return connection.execute(select(versions.c.number).where(here)).one_or_none() is not None


def move(connection: Connection, step: Step, expect: int | None = None) -> None:
    """Move an alias, and record it if it pointed elsewhere.

    Raises:
        Protected: The alias is protected, and the step is no override.
        PreconditionFailed: It points elsewhere than expected.
    """
    if not step.override:
        refuse_protected(connection, step.scene_id, step.scene, step.alias)
    if move_alias(connection, step, expect):
        details = {"alias": step.alias, "number": step.number, "action": step.action}
        record(connection, "alias.moved", step.scene, step.by, step.at, details)


def set_retired(
    connection: Connection,
    scene_id: int,
    version: Version,
    retired: datetime | None,
    by: str,
    at: datetime,
) -> None:
    """Hide the version, or show it again with None.

    Raises:
        Conflict: An alias points to it or a lease holds it; or a sweep took its bytes.
    """
    blob = lock_blob(connection, version.digest)
    if retired is None and blob.given_up is not None:
        raise Conflict(
            f"The version {version.reference} cannot be restored: a sweep removed its bytes on "
            f"{blob.given_up:%Y-%m-%d}. Publish the same capsule again, then restore it."
        )
    if retired is not None:
        _refuse_in_use(connection, version, at)
    seal = seal_of({**_sealed(version), "retired": retired})
    connection.execute(
        update(versions)
        .where(versions.c.scene_id == scene_id, versions.c.number == version.number)
        .values(retired=retired, seal=seal)
    )
    event = "version.restored" if retired is None else "version.retired"
    details = {"number": version.number, "digest": version.digest}
    record(connection, event, version.scene, by, at, details)


def _refuse_in_use(connection: Connection, version: Version, at: datetime) -> None:
    if version.aliases:
        names = ", ".join(version.aliases)
        raise Conflict(
            f"The version {version.reference} cannot be retired while aliases point to it: "
            f"{names}. Move them first with `registry alias` or `registry rollback`."
        )
    serving = holders(connection, version.digest, at)
    if serving:
        raise Conflict(
            f"The version {version.reference} cannot be retired while it is served by "
            f"{', '.join(serving)}: try again when they have let it go or their leases expired."
        )


def _sealed(version: Version) -> dict[str, Any]:
    names = ["scene", "number", "digest", "base", "base_fingerprint", "rank", "parent"]
    return {name: getattr(version, name) for name in [*names, "created", "created_by"]}


def set_labels(
    connection: Connection,
    step: Step,
    new_tags: Mapping[str, str | None],
    new_metrics: Mapping[str, float],
) -> None:
    """Set tags and metrics of the step's version; a tag that is None goes.

    Raises:
        NotFound: There is no such version.
    """
    version = find_any_version(connection, step.scene, step.number)
    here = {"scene_id": step.scene_id, "number": step.number}
    kinds: tuple[tuple[str, Table, str, Mapping[str, Any], Mapping[str, Any]], ...] = (
        ("version.tagged", tags, "key", new_tags, version.tags),
        ("version.measured", metrics, "name", new_metrics, version.metrics),
    )
    for event, table, key, new, old in kinds:
        changed = {name: value for name, value in new.items() if old.get(name) != value}
        for name, value in changed.items():
            row = {**here, key: name}
            mine = [table.c[column] == field for column, field in row.items()]
            connection.execute(delete(table).where(*mine))
            if value is not None:
                extra = {"created": version.created} if table is tags else {}
                connection.execute(insert(table).values(**row, value=value, **extra))
        if changed:
            details = {"number": step.number, "changed": changed}
            record(connection, event, step.scene, step.by, step.at, details)


def is_protected(connection: Connection, scene_id: int, alias: str) -> bool:
    """Whether the alias moves only by an override."""
    found = connection.execute(_GUARD, {"of_scene": scene_id, "of_name": alias})
    return found.one_or_none() is not None


def refuse_protected(connection: Connection, scene_id: int, scene: str, alias: str) -> None:
    """Stop whoever would move a protected alias without an override.

    Raises:
        Protected: The alias is protected.
    """
    if is_protected(connection, scene_id, alias):
        raise Protected(
            f"The alias {alias!r} of {scene!r} is protected: move it with --override, or lift the "
            f"protection with `registry unprotect {scene} --alias {alias}`."
        )


def set_protected(connection: Connection, step: Step, protected: bool) -> None:
    """Guard the step's alias, or lift its guard; an alias may be guarded before it exists."""
    if protected == is_protected(connection, step.scene_id, step.alias):
        return
    here = {"scene_id": step.scene_id, "name": step.alias}
    if protected:
        row = {**here, "protected": step.at, "protected_by": step.by}
        connection.execute(insert(protected_aliases).values(row))
    else:
        connection.execute(
            delete(protected_aliases).where(
                protected_aliases.c.scene_id == step.scene_id,
                protected_aliases.c.name == step.alias,
            )
        )
    event = "alias.protected" if protected else "alias.unprotected"
    record(connection, event, step.scene, step.by, step.at, {"alias": step.alias})


def insert_if_new(connection: Connection, table: Table, values: Any) -> None:
    """Insert a row, or several, where their keys are not there yet."""
    statement = _INSERTS[connection.dialect.name](table)
    connection.execute(statement.values(values).on_conflict_do_nothing())


def record(
    connection: Connection, event: str, scene: str, by: str, at: datetime, details: dict[str, Any]
) -> None:
    """One row for those who ask later, one for those who are to be told, and one for each."""
    row = {"at": at, "by": by, "action": event, "scene": scene, "details": details}
    connection.execute(_ADD_AUDIT, row)
    body = {"event": event, "at": at.isoformat(), "by": by, "scene": scene, **details}
    added = connection.execute(_ADD_EVENT, {"created": at, "event": event, "body": body})
    connection.execute(_OWE, {"of_event": added.scalar_one()})
