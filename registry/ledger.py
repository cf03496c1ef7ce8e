"""Writing the tables, inside the caller's transaction: every change leaves its record there too."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Table, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from registry.aliases import Step, move_alias
from registry.catalog import no_scene
from registry.errors import AlreadyExists, Conflict
from registry.records import Version
from registry.schema import audit, blobs, outbox, scenes, versions
from registry.upload import Upload

_INSERTS: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def add_scene(connection: Connection, name: str, at: datetime) -> None:
    """Insert the scene, unless it is there."""
    _insert_if_new(connection, scenes, {"name": name, "last_number": 0, "created": at})


def lock_scene(connection: Connection, name: str) -> int:
    """The scene's id; its row is held until the transaction ends, so that changes to it queue.

    Raises:
        NotFound: There is no such scene.
    """
    scene_id: int | None = connection.execute(
        select(scenes.c.id).where(scenes.c.name == name).with_for_update()
    ).scalar_one_or_none()
    if scene_id is None:
        raise no_scene(name)
    return scene_id


def number_of(connection: Connection, scene_id: int, scene: str, digest: str) -> int | None:
    """The number these bytes have in the scene, or None.

    Raises:
        AlreadyExists: They are there, but retired.
    """
    row = connection.execute(
        select(versions.c.number, versions.c.retired).where(
            versions.c.scene_id == scene_id, versions.c.digest == digest
        )
    ).one_or_none()
    if row is None:
        return None
    if row.retired is not None:
        raise AlreadyExists(
            f"The scene {scene!r} holds these bytes already as version {row.number}, which is "
            f"retired: bring it back with `registry restore {scene}@{row.number}`."
        )
    return int(row.number)


def add_version(
    connection: Connection, scene_id: int, scene: str, upload: Upload, by: str, at: datetime
) -> int:
    """Insert the rows of a new version under the scene's next number, and return that."""
    blob = {
        "digest": upload.digest,
        "tensor_digest": upload.tensor_digest,
        "size_bytes": upload.size_bytes,
        "stored": at,
    }
    _insert_if_new(connection, blobs, blob)
    number: int = connection.execute(
        update(scenes)
        .where(scenes.c.id == scene_id)
        .values(last_number=scenes.c.last_number + 1)
        .returning(scenes.c.last_number)
    ).scalar_one()
    connection.execute(
        insert(versions).values(
            scene_id=scene_id,
            number=number,
            digest=upload.digest,
            base=upload.base,
            base_fingerprint=upload.base_fingerprint,
            rank=upload.rank,
            metadata=upload.metadata,
            created=at,
            created_by=by,
        )
    )
    details = {"number": number, "digest": upload.digest}
    _record(connection, "version.published", scene, by, at, details)
    return number


def move(connection: Connection, step: Step, expect: int | None = None) -> None:
    """Move an alias, and record it if it pointed elsewhere.

    Raises:
        Conflict: It points elsewhere than expected.
    """
    if move_alias(connection, step, expect):
        details = {"alias": step.alias, "number": step.number, "action": step.action}
        _record(connection, "alias.moved", step.scene, step.by, step.at, details)


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
        Conflict: An alias points to it.
    """
    if retired is not None and version.aliases:
        names = ", ".join(version.aliases)
        raise Conflict(
            f"The version {version.reference} cannot be retired while aliases point to it: "
            f"{names}. Move them first with `registry alias` or `registry rollback`."
        )
    connection.execute(
        update(versions)
        .where(versions.c.scene_id == scene_id, versions.c.number == version.number)
        .values(retired=retired)
    )
    event = "version.restored" if retired is None else "version.retired"
    details = {"number": version.number, "digest": version.digest}
    _record(connection, event, version.scene, by, at, details)


def _insert_if_new(connection: Connection, table: Table, values: dict[str, Any]) -> None:
    statement = _INSERTS[connection.dialect.name](table)
    connection.execute(statement.values(values).on_conflict_do_nothing())


def _record(
    connection: Connection, event: str, scene: str, by: str, at: datetime, details: dict[str, Any]
) -> None:
    """One row for those who ask later, one for those who are to be told."""
    connection.execute(
        insert(audit).values(at=at, by=by, action=event, scene=scene, details=details)
    )
    body = {"event": event, "at": at.isoformat(), "by": by, "scene": scene, **details}
    connection.execute(insert(outbox).values(created=at, event=event, body=body, attempts=0))
