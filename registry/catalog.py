"""Reading the tables: rows become records here, and a miss becomes a sentence.

Statements are built once, so that SQLAlchemy compiles each a single time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    Connection,
    Row,
    Select,
    and_,
    bindparam,
    func,
    select,
)

from registry.errors import CorruptObject, NotFound
from registry.records import MAX_NUMBER, AliasMove, Reference, Scene, Tombstone, Version
from registry.schema import (
    alias_moves,
    aliases,
    blobs,
    scenes,
    tombstones,
    versions,
)
from registry.seals import seal_of

# A row whose blob was deleted by hand is still shown, so that `verify` can name it.
VERSIONS: Select[Any] = select(
    versions.c.scene_id,
    versions.c.seal,
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
    versions.c.parent,
    blobs.c.given_up.label("swept"),
).select_from(
    versions.join(scenes, scenes.c.id == versions.c.scene_id).outerjoin(
        blobs, blobs.c.digest == versions.c.digest
    )
)

# Where the alias went last, by its history.
_WENT_TO = (
    select(alias_moves.c.number)
    .where(alias_moves.c.scene_id == aliases.c.scene_id, alias_moves.c.alias == bindparam("alias"))
    .order_by(alias_moves.c.id.desc())
    .limit(1)
    .scalar_subquery()
)

_BY_ALIAS = (
    VERSIONS.add_columns(_WENT_TO.label("went_to"))
    .join(
        aliases,
        and_(aliases.c.scene_id == versions.c.scene_id, aliases.c.number == versions.c.number),
    )
    .where(scenes.c.name == bindparam("scene"), aliases.c.name == bindparam("alias"))
)

_BY_NUMBER = VERSIONS.where(
    scenes.c.name == bindparam("scene"), versions.c.number == bindparam("number")
)

# One digest may serve several scenes; the first that is not retired stands for all.
_BY_DIGEST = (
    VERSIONS.where(versions.c.digest == bindparam("digest"))
    .order_by(versions.c.retired.is_not(None), versions.c.created, versions.c.scene_id)
    .limit(1)
)

_PAGE = (
    VERSIONS.where(scenes.c.name == bindparam("scene"), versions.c.number < bindparam("before"))
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

# Aliases, tags and metrics of a page's versions, in one statement. The pairs are joined and not
# looked for with IN, for which SQLite would read the three tables from end to end.
_LABELS = """
WITH wanted(scene_id, number) AS (VALUES {pairs})
SELECT 'alias', w.scene_id, w.number, a.name, CAST(NULL AS VARCHAR), CAST(NULL AS FLOAT)
FROM wanted w JOIN aliases a ON a.scene_id = w.scene_id AND a.number = w.number
UNION ALL SELECT 'tag', w.scene_id, w.number, t.key, t.value, CAST(NULL AS FLOAT)
FROM wanted w JOIN tags t ON t.scene_id = w.scene_id AND t.number = w.number
UNION ALL SELECT 'metric', w.scene_id, w.number, m.name, CAST(NULL AS VARCHAR), m.value
FROM wanted w JOIN metrics m ON m.scene_id = w.scene_id AND m.number = w.number
"""

_MOVES = (
    select(alias_moves).where(alias_moves.c.scene_id == bindparam("id")).order_by(alias_moves.c.id)
)


_TOMBSTONE = select(tombstones).where(tombstones.c.scene == bindparam("scene"))

# What a row and a record have in common, by the same names.
_NOT_IN_RECORDS = {"scene_id", "seal"}
_FIELDS = [
    column.name for column in VERSIONS.selected_columns if column.name not in _NOT_IN_RECORDS
]


def find_version(connection: Connection, reference: Reference) -> Version:
    """The version a reference names; a retired one only by its digest.

    Raises:
        NotFound: There is none.
        CorruptObject: Its row, or the alias, was edited by hand.
    """
    if reference.digest is not None:
        rows = connection.execute(_BY_DIGEST, {"digest": reference.digest}).all()
    elif reference.number is not None:
        wanted = {"scene": reference.scene, "number": reference.number}
        rows = connection.execute(_BY_NUMBER, wanted).all()
    else:
        by_name = {"scene": reference.scene, "alias": reference.alias}
        rows = connection.execute(_BY_ALIAS, by_name).all()
    if not rows:
        raise _missing(connection, reference)
    _check_edits(rows[0], reference)
    (found,) = read_versions(connection, rows)
    if found.retired is not None and reference.digest is None:
        raise NotFound(
            f"The version {found.reference} is retired: name another one, or bring it back "
            f"with `registry restore {found.reference}`."
        )
    return found


def find_any_version(connection: Connection, scene: str, number: int) -> Version:
    """The version with this number, retired or not.

    Raises:
        NotFound: There is none.
        CorruptObject: Its row was edited by hand.
    """
    reference = Reference(scene=scene, number=number)
    rows = connection.execute(_BY_NUMBER, {"scene": scene, "number": number}).all()
    if not rows:
        raise _missing(connection, reference)
    _check_edits(rows[0], reference)
    return read_versions(connection, rows)[0]


def is_sealed(connection: Connection, scene: str, number: int) -> bool:
    """Whether the row says what it said when it was written."""
    row = connection.execute(_BY_NUMBER, {"scene": scene, "number": number}).one()
    return bool(row.seal == seal_of(row._mapping))


def list_versions(
    connection: Connection, scene: str, *, before: int | None, limit: int, retired: bool
) -> list[Version]:
    """Versions of one scene below a number, newest first; retired ones only when asked for.

    Raises:
        NotFound: There is no such scene.
    """
    wanted = {"scene": scene, "before": before or MAX_NUMBER + 1, "limit": limit}
    rows = connection.execute(_PAGE if retired else _PAGE_SERVABLE, wanted).all()
    if not rows:
        find_scene(connection, scene)
    return read_versions(connection, rows)


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
        raise no_scene(connection, name)
    return found[0]


def find_tombstone(connection: Connection, scene: str) -> Tombstone | None:
    """What remains of an erased scene, or None."""
    row = connection.execute(_TOMBSTONE, {"scene": scene}).one_or_none()
    return None if row is None else Tombstone(**row._mapping)


def erased_of(connection: Connection, digests: Sequence[str]) -> list[str]:
    """Those of the digests that were erased for good."""
    erased = select(blobs.c.digest).where(blobs.c.erased.is_not(None))
    gone = set(connection.execute(erased).scalars())
    return [digest for digest in digests if digest in gone]


def list_moves(connection: Connection, scene: str, alias: str | None) -> list[AliasMove]:
    """Every move of a scene's aliases, oldest first.

    Raises:
        NotFound: There is no such scene.
    """
    row = connection.execute(_ONE_SCENE, {"scene": scene}).one_or_none()
    if row is None:
        raise no_scene(connection, scene)
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


def no_scene(connection: Connection, name: str) -> NotFound:
    """The error for a scene that is not there, or not any more."""
    tombstone = find_tombstone(connection, name)
    if tombstone is not None:
        return NotFound(
            f"The scene {name!r} was erased on {tombstone.erased:%Y-%m-%d} by "
            f"{tombstone.erased_by} ({tombstone.reason}): its name is not used again, so publish "
            "under another one."
        )
    return NotFound(
        f"There is no scene {name!r} in the registry: `registry list` shows the names, and "
        "`registry publish` adds one."
    )


def read_versions(connection: Connection, rows: Sequence[Row[Any]]) -> list[Version]:
    """Rows of the statement VERSIONS as records, with their aliases, tags and metrics."""
    if not rows:
        return []
    labels: dict[tuple[int, int], _Labels] = defaultdict(_Labels)
    # Whole numbers from the database itself, so they may stand in the text.
    pairs = ", ".join(f"({int(row.scene_id)}, {int(row.number)})" for row in rows)
    found = connection.exec_driver_sql(_LABELS.format(pairs=pairs))
    for kind, scene_id, number, name, value, measure in found:
        of = labels[scene_id, number]
        if kind == "alias":
            of.aliases.append(name)
        elif kind == "tag":
            of.tags[name] = value
        else:
            of.metrics[name] = measure
    return [_version(row, labels[row.scene_id, row.number]) for row in rows]


@dataclass
class _Labels:
    aliases: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def _version(row: Row[Any], labels: _Labels) -> Version:
    fields = {name: row._mapping[name] for name in _FIELDS}
    return Version(
        **fields,
        aliases=tuple(sorted(labels.aliases)),
        tags=dict(sorted(labels.tags.items())),
        metrics=dict(sorted(labels.metrics.items())),
    )


def _check_edits(row: Row[Any], reference: Reference) -> None:
    thing = f"{row.scene}@{row.number}"
    if row.seal != seal_of(row._mapping):
        raise CorruptObject(
            f"The database's row of {thing} was edited: it differs from its seal. "
            "Restore the database from a backup."
        )
    if reference.alias is not None and row.went_to != row.number:
        raise CorruptObject(
            f"The alias {row.scene}@{reference.alias} was edited: it points to version "
            f"{row.number} and its last move went to {row.went_to}. Set it with `registry alias`, "
            "or restore the database from a backup."
        )


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
