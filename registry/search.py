"""Finding versions by what is said of them, newest first, a page at a time.

A page begins after the last version of the one before it, by time, scene and number, so that
turning to the thousandth page costs what the first does, and none is shown twice or left out when
others are published meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, select, tuple_

from registry.catalog import VERSIONS, read_versions
from registry.errors import InvalidReference
from registry.records import Page, check_alias, check_label, check_scene
from registry.schema import aliases, metrics, scenes, tags, versions

MAX_LIMIT = 10_000

_COMPARISON = re.compile(r"([a-z][a-z0-9._-]*) *(>=|<=|>|<|=) *(\S+)")
_CURSOR = re.compile(r"([0-9]{1,18})-([0-9]{1,18})-([0-9]{1,9})")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_MICROSECONDS = 1_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Query:
    """What versions are looked for; every condition that is given must hold.

    Args:
        scene: Exactly this scene.
        text: Occurs in the scene's name, the person's or the prompt, in any case.
        tags: Key to value; None for any value.
        base: Name or fingerprint of the base.
        rank: Exactly this rank.
        metrics: Comparisons such as `psnr>=20` or `probe_loss<0.1`.
        since: Published at this moment or later.
        until: Published before this moment.
        alias: An alias of this name points to the version.
        retired: Also those that were retired.

    Raises:
        InvalidReference: A condition is malformed.
    """

    scene: str | None = None
    text: str | None = None
    tags: Mapping[str, str | None] = field(default_factory=dict)
    base: str | None = None
    rank: int | None = None
    metrics: Sequence[str] = ()
    since: datetime | None = None
    until: datetime | None = None
    alias: str | None = None
    retired: bool = False

    def __post_init__(self) -> None:
        if self.scene is not None:
            check_scene(self.scene)
        if self.alias is not None:
            check_alias(self.alias)
        for key in self.tags:
            check_label(key)
        for text in self.metrics:
            _comparison(text)
        for said in (self.text, self.base, *self.tags.values()):
            # PostgreSQL takes no NUL, and no version has one.
            if said is not None and "\0" in said:
                raise InvalidReference(
                    f"The condition {ascii(said)[:80]} holds the character NUL: leave it out."
                )
        for moment in (self.since, self.until):
            if moment is not None and moment.tzinfo is None:
                raise InvalidReference(
                    f"The time {moment} has no zone: write it like 2026-05-04T12:00:00Z."
                )


def search(connection: Connection, query: Query, *, after: str | None, limit: int) -> Page:
    """See `Registry.search`."""
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidReference(f"The page size {limit} is not allowed: use 1 to {MAX_LIMIT}.")
    statement = _statement(query, after).limit(limit + 1)
    rows = connection.execute(statement).all()
    more = len(rows) > limit
    rows = rows[:limit]
    cursor = _cursor_of(rows[-1]) if more else None
    return Page(tuple(read_versions(connection, rows)), cursor)


def _statement(query: Query, after: str | None) -> Select[Any]:
    """The query, ordered from newest to oldest by one index."""
    statement = VERSIONS
    created: Any = versions.c.created
    named = dict(query.tags)
    # One tag leads the search: its index has the order of the page.
    leading = next((key for key, value in named.items() if value is not None), None)
    if leading is not None:
        statement = statement.join(tags, _of_version(tags)).where(
            tags.c.key == leading, tags.c.value == named.pop(leading)
        )
        created = tags.c.created
        keys = (created, tags.c.scene_id, tags.c.number)
    else:
        keys = (created, versions.c.scene_id, versions.c.number)
    for key, value in named.items():
        statement = statement.where(_has_tag(key, value))
    statement = statement.where(*_conditions(query, created))
    if after is not None:
        statement = statement.where(tuple_(*keys) < tuple_(*_read_cursor(after)))
    return statement.order_by(*(key.desc() for key in keys))


def _conditions(query: Query, created: Any) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if not query.retired:
        conditions.append(versions.c.retired.is_(None))
    if query.scene is not None:
        conditions.append(scenes.c.name == query.scene)
    if query.text:
        conditions.append(versions.c.text.contains(query.text.casefold(), autoescape=True))
    if query.base is not None:
        named = _FINGERPRINT.fullmatch(query.base) is None
        column = versions.c.base if named else versions.c.base_fingerprint
        conditions.append(column == query.base)
    if query.rank is not None:
        conditions.append(versions.c.rank == query.rank)
    if query.since is not None:
        conditions.append(created >= query.since)
    if query.until is not None:
        conditions.append(created < query.until)
    if query.alias is not None:
        pointing = select(aliases.c.name).where(_of_version(aliases), aliases.c.name == query.alias)
        conditions.append(pointing.exists())
    return conditions + [_has_metric(text) for text in query.metrics]


def _of_version(table: Any) -> ColumnElement[bool]:
    return and_(table.c.scene_id == versions.c.scene_id, table.c.number == versions.c.number)


def _has_tag(key: str, value: str | None) -> ColumnElement[bool]:
    other = tags.alias()
    found = select(other.c.key).where(_of_version(other), other.c.key == key)
    return (found if value is None else found.where(other.c.value == value)).exists()


def _has_metric(text: str) -> ColumnElement[bool]:
    name, sign, bound = _comparison(text)
    holds = {
        ">=": metrics.c.value >= bound,
        "<=": metrics.c.value <= bound,
        ">": metrics.c.value > bound,
        "<": metrics.c.value < bound,
        "=": metrics.c.value == bound,
    }[sign]
    return (
        select(metrics.c.name).where(_of_version(metrics), metrics.c.name == name, holds).exists()
    )


def _comparison(text: str) -> tuple[str, str, float]:
    found = _COMPARISON.fullmatch(text.strip())
    try:
        if found is None:
            raise ValueError
        return check_label(found[1]), found[2], float(found[3])
    except ValueError as error:
        raise InvalidReference(
            f"The comparison {ascii(text)[:80]} cannot be read: write it like psnr>=20."
        ) from error


def _cursor_of(row: Any) -> str:
    since = row.created - _EPOCH
    moment = (since.days * 86_400 + since.seconds) * _MICROSECONDS + since.microseconds
    return f"{moment}-{row.scene_id}-{row.number}"


def _read_cursor(text: str) -> tuple[datetime, int, int]:
    found = _CURSOR.fullmatch(text)
    if found is None or int(found[1]) > 253_402_300_799 * _MICROSECONDS:
        raise InvalidReference(
            f"The page {ascii(text)[:80]} cannot be read: pass the text that the page before it "
            "gave, unchanged."
        )
    seconds, rest = divmod(int(found[1]), _MICROSECONDS)
    moment = datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest)
    return moment, int(found[2]), int(found[3])
