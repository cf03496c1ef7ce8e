"""Erasing a scene for good: rows, bytes and all that they held of a real place.

Features and thumbnails of the references lie inside the capsules and go with them. The rows go in
one transaction, which also gives the bytes up; if the process dies before it removed them, the
next sweep does. A tombstone keeps the name, so that a late training job cannot bring the scene
back, and the digests are refused from then on.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, delete, func, insert, select, update

from registry.errors import Conflict
from registry.ledger import lock_scene, record
from registry.records import Tombstone
from registry.schema import (
    alias_moves,
    aliases,
    blobs,
    leases,
    metrics,
    protected_aliases,
    scenes,
    tags,
    tombstones,
    versions,
)


def erase_rows(
    connection: Connection, tombstone: Tombstone, *, force: bool
) -> tuple[Tombstone, list[str], list[str]]:
    """Replace the scene's rows by the tombstone, whose count is filled in.

    Returns:
        The tombstone, the digests whose bytes are to be removed, and those that other scenes hold.

    Raises:
        NotFound: There is no such scene.
        Conflict: A lease holds some of its bytes, and force is False.
    """
    scene_id = lock_scene(connection, tombstone.scene)
    mine = select(versions.c.digest).where(versions.c.scene_id == scene_id)
    connection.execute(
        select(blobs.c.digest)
        .where(blobs.c.digest.in_(mine))
        .order_by(blobs.c.digest)
        .with_for_update()
    )
    if not force:
        _refuse_served(connection, tombstone, scene_id)
    alone, shared = _give_up(connection, scene_id, tombstone.erased)
    count = select(scenes.c.last_number).where(scenes.c.id == scene_id)
    last_number = connection.execute(count).scalar_one()
    for table in (aliases, protected_aliases, alias_moves, tags, metrics, versions):
        connection.execute(delete(table).where(table.c.scene_id == scene_id))
    connection.execute(delete(scenes).where(scenes.c.id == scene_id))
    row = {
        "scene": tombstone.scene,
        "last_number": last_number,
        "erased": tombstone.erased,
        "erased_by": tombstone.erased_by,
        "reason": tombstone.reason,
    }
    # One is there already where an import of an older registry brought the scene back.
    connection.execute(delete(tombstones).where(tombstones.c.scene == tombstone.scene))
    connection.execute(insert(tombstones).values(row))
    details = {"versions": last_number, "reason": tombstone.reason}
    at, by = tombstone.erased, tombstone.erased_by
    record(connection, "scene.erased", tombstone.scene, by, at, details)
    return Tombstone(**row), alone, shared


def _give_up(connection: Connection, scene_id: int, at: datetime) -> tuple[list[str], list[str]]:
    """Give up the bytes that only this scene has; theirs, then those of other scenes too."""
    mine = select(versions.c.digest).where(versions.c.scene_id == scene_id)
    others = select(versions.c.digest).where(
        versions.c.scene_id != scene_id, versions.c.digest == blobs.c.digest
    )
    here = blobs.c.digest.in_(mine)
    found = select(blobs.c.digest, others.exists().label("shared")).where(here)
    rows = connection.execute(found.order_by(blobs.c.digest)).all()
    alone_here = here & ~others.exists()
    connection.execute(
        delete(leases).where(leases.c.digest.in_(select(blobs.c.digest).where(alone_here)))
    )
    given_up = func.coalesce(blobs.c.given_up, at)
    connection.execute(
        update(blobs)
        .where(alone_here)
        .values(marked=func.coalesce(blobs.c.marked, at), given_up=given_up, erased=at)
    )
    alone = [row.digest for row in rows if not row.shared]
    return alone, [row.digest for row in rows if row.shared]


def _refuse_served(connection: Connection, tombstone: Tombstone, scene_id: int) -> None:
    served = (
        select(leases.c.holder)
        .join(versions, versions.c.digest == leases.c.digest)
        .where(versions.c.scene_id == scene_id, leases.c.expires > tombstone.erased)
        .distinct()
        .order_by(leases.c.holder)
    )
    holders = list(connection.execute(served).scalars())
    if holders:
        raise Conflict(
            f"The scene {tombstone.scene!r} cannot be erased while it is served by "
            f"{', '.join(holders)}: stop them first, or erase it with --force."
        )
