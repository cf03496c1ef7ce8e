"""Reading the tables: rows become records here, and a miss becomes a sentence.

Statements are built once, so that SQLAlchemy compiles each a single time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, bindparam, func, select

from registry.errors import NotFound
from registry.records import MAX_NUMBER, AliasMove, Reference, Scene, Version
from registry.schema import alias_moves, aliases, blobs, scenes, versions

# A row whose blob was deleted by hand is still shown, so that `verify` can name it.
_VERSIONS = select(
    versions.c.scene_id,
    scenes.c.name.label("scene"),
    versions.c.number,
    versions.c.digest,
    func.coalesce(blobs.c.tensor_digest, "").label("tensor_digest"),
    func.coalesce(blobs.c.size_bytes, 0).label("size_bytes"),
    versions.c.base,
    versions.c.base_fingerprint,
    versions.c.rank,
    versions.c.created,
    versions.c.created_by,
    versions.c.metadata,
    versions.c.retired,
).select_from(
    versions.join(scenes, scenes.c.id == versions.c.scene_id).outerjoin(
        blobs, blobs.c.digest == versions.c.digest
    )
)

_BY_ALIAS = _VERSIONS.join(
    aliases,
    and_(aliases.c.scene_id == versions.c.scene_id, aliases.c.number == versions.c.number),
).where(scenes.c.name == bindparam("scene"), aliases.c.name == bindparam("alias"))

_BY_NUMBER = _VERSIONS.where(
    scenes.c.name == bindparam("scene"), versions.c.number == bindparam("number")
)

# One digest may serve several scenes; the first that is not retired stands for all.
_BY_DIGEST = (
    _VERSIONS.where(versions.c.digest == bindparam("digest"))
    .order_by(versions.c.retired.is_not(None), versions.c.created, versions.c.scene_id)
    .limit(1)
)

_PAGE = (
    _VERSIONS.where(scenes.c.name == bindparam("scene"), versions.c.number < bindparam("before"))
    .order_by(versions.c.number.desc())
    .limit(bindparam("limit"))
)
_PAGE_SERVABLE = _PAGE.where(versions.c.retired.is_(None))

_SCENES = select(scenes.c.id, scenes.c.name, scenes.c.created, scenes.c.last_number)
_SCENE_PAGE = (
    _SCENES.where(scenes.c.name > bindparam("after"))
    .order_by(scenes.c.name)
    .limit(bindparam("limit"))
)
_ONE_SCENE = _SCENES.where(scenes.c.name == bindparam("scene"))

_COUNTS = (
    select(versions.c.scene_id, func.count().label("versions"))
    .where(versions.c.retired.is_(None), versions.c.scene_id.in_(bindparam("ids", expanding=True)))
    .group_by(versions.c.scene_id)
)

_ALIASES = (
    select(aliases.c.scene_id, aliases.c.number, aliases.c.name)
    .where(aliases.c.scene_id.in_(bindparam("ids", expanding=True)))
    .order_by(aliases.c.name)
)

_MOVES = (
    select(alias_moves).where(alias_moves.c.scene_id == bindparam("id")).order_by(alias_moves.c.id)
)


def find_version(connection: Connection, reference: Reference) -> Version:
    """The version a reference names; a retired one only by its digest.

    Raises:
        NotFound: There is none.
    """
    if reference.digest is not None:
        found = _read(connection, _BY_DIGEST, {"digest": reference.digest})
    elif reference.number is not None:
        wanted = {"scene": reference.scene, "number": reference.number}
        found = _read(connection, _BY_NUMBER, wanted)
    else:
        wanted = {"scene": reference.scene, "alias": reference.alias}
        found = _read(connection, _BY_ALIAS, wanted)
    if not found:
        raise _missing(connection, reference)
    if found[0].retired is not None and reference.digest is None:
        raise NotFound(
            f"The version {found[0].reference} is retired: name another one, or bring it back "
            f"with `registry restore {found[0].reference}`."
        )
    return found[0]


def find_any_version(connection: Connection, scene: str, number: int) -> Version:
    """The version with this number, retired or not.

    Raises:
        NotFound: There is none.
    """
    found = _read(connection, _BY_NUMBER, {"scene": scene, "number": number})
    if not found:
        raise _missing(connection, Reference(scene=scene, number=number))
    return found[0]


def list_versions(
    connection: Connection, scene: str, *, before: int | None, limit: int, retired: bool
) -> list[Version]:
    """Versions of one scene below a number, newest first; retired ones only when asked for.

    Raises:
        NotFound: There is no such scene.
    """
    wanted = {"scene": scene, "before": before or MAX_NUMBER + 1, "limit": limit}
    found = _read(connection, _PAGE if retired else _PAGE_SERVABLE, wanted)
    if not found:
        find_scene(connection, scene)
    return found


def list_scenes(connection: Connection, *, after: str, limit: int) -> list[Scene]:
    """Scenes by name, those after a name, with their aliases."""
    return _scenes(connection, connection.execute(_SCENE_PAGE, {"after": after, "limit": limit}))


def find_scene(connection: Connection, name: str) -> Scene:
    """The scene of this name.

    Raises:
        NotFound: There is none.
    """
    found = _scenes(connection, connection.execute(_ONE_SCENE, {"scene": name}))
    if not found:
        raise no_scene(name)
    return found[0]


def list_moves(connection: Connection, scene: str, alias: str | None) -> list[AliasMove]:
    """Every move of a scene's aliases, oldest first.

    Raises:
        NotFound: There is no such scene.
    """
    row = connection.execute(_ONE_SCENE, {"scene": scene}).one_or_none()
    if row is None:
        raise no_scene(scene)
    return [
        AliasMove(
            scene=scene,
            alias=move.alias,
            previous=move.previous,
            number=move.number,
            action=move.action,
            moved=move.moved,
            moved_by=move.moved_by,
        )
        for move in connection.execute(_MOVES, {"id": row.id})
        if alias in (None, move.alias)
    ]


def no_scene(name: str) -> NotFound:
    """The error for a scene that is not there."""
    return NotFound(
        f"There is no scene {name!r} in the registry: `registry list` shows the names, and "
        "`registry publish` adds one."
    )


def _read(
    connection: Connection, statement: Select[Any], wanted: Mapping[str, Any]
) -> list[Version]:
    rows = connection.execute(statement, wanted).all()
    if not rows:
        return []
    names: dict[tuple[int, int], list[str]] = defaultdict(list)
    for scene_id, number, name in connection.execute(
        _ALIASES, {"ids": list({row.scene_id for row in rows})}
    ):
        names[scene_id, number].append(name)
    return [_version(row, names[row.scene_id, row.number]) for row in rows]


def _version(row: Row[Any], names: list[str]) -> Version:
    fields = dict(row._mapping)
    del fields["scene_id"]
    return Version(**fields, aliases=tuple(names))


def _scenes(connection: Connection, found: Iterable[Row[Any]]) -> list[Scene]:
    rows = list(found)
    ids = {"ids": [row.id for row in rows]}
    counts = {row.scene_id: row.versions for row in connection.execute(_COUNTS, ids)}
    pointers: dict[int, dict[str, int]] = defaultdict(dict)
    for scene_id, number, name in connection.execute(_ALIASES, ids):
        pointers[scene_id][name] = number
    return [
        Scene(
            name=row.name,
            created=row.created,
            latest=row.last_number,
            versions=counts.get(row.id, 0),
            aliases=pointers[row.id],
        )
        for row in rows
    ]


def _missing(connection: Connection, reference: Reference) -> NotFound:
    """Say which part of the reference leads nowhere, and what there is instead."""
    if reference.scene is None:
        return NotFound(
            f"No version has the digest sha256:{reference.digest}: `registry list SCENE` shows "
            "the digests."
        )
    scene = find_scene(connection, reference.scene)
    if reference.number is not None:
        return NotFound(
            f"The scene {scene.name!r} has no version {reference.number}; its latest is "
            f"{scene.latest}. `registry list {scene.name}` shows them."
        )
    names = ", ".join(f"{name} ({number})" for name, number in scene.aliases.items()) or "none"
    return NotFound(
        f"The scene {scene.name!r} has no alias {reference.alias!r}; its aliases: {names}. "
        f"Set it with `registry alias {scene.name} {reference.alias} NUMBER`."
    )
