"""What happened in a registry, in the order it was written down: the rows of its outbox."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import Row, func, select

from registry.schema import outbox

if TYPE_CHECKING:
    from registry.registry import Registry

# PostgreSQL numbers rows before they are committed, so that a lower number may show up later.
LOOK_BACK = 500


@dataclass(frozen=True, slots=True)
class Event:
    """One change.

    Args:
        id: Its place in the outbox of this registry.
        kind: Such as `version.published` or `alias.moved`.
        data: Who, when, which scene, and what changed.
    """

    id: int
    kind: str
    created: datetime
    data: Mapping[str, Any]

    @property
    def message_id(self) -> str:
        """The same for every attempt, so that receivers can drop duplicates."""
        return f"evt_{self.id}_{int(self.created.timestamp() * 1e6)}"

    @property
    def payload(self) -> bytes:
        """The body of a webhook, the same bytes for every attempt."""
        body = {"type": self.kind, "timestamp": self.created.isoformat(), "data": self.data}
        return json.dumps(body, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()


def event_of(row: Row[Any]) -> Event:
    """A row of the outbox as a record."""
    data = {key: value for key, value in row.body.items() if key != "event"}
    return Event(id=row.id, kind=row.event, created=row.created.astimezone(UTC), data=data)


def read_events(registry: Registry, *, after: int = 0, limit: int = 100) -> list[Event]:
    """Events by number, from the one that follows `after`."""
    wanted = select(outbox).where(outbox.c.id > after).order_by(outbox.c.id).limit(limit)
    with registry.database.reading() as connection:
        return [event_of(row) for row in connection.execute(wanted)]


def last_event(registry: Registry) -> int:
    """Number of the newest event, 0 before there is any."""
    with registry.database.reading() as connection:
        return connection.execute(select(func.max(outbox.c.id))).scalar_one() or 0


def watch(
    registry: Registry,
    *,
    after: int | None = None,
    every_s: float = 1.0,
    wait: Callable[[float], object] = time.sleep,
) -> Iterator[Event]:
    """Events as they come, for ever; each once.

    Args:
        after: Number to begin behind; by default the newest, so that only new ones are shown.
        every_s: Pause between looks at the database.
        wait: What pauses; may raise to end the watch.
    """
    start = last_event(registry) if after is None else after
    highest, seen = start, set[int]()
    while True:
        low = max(start, highest - LOOK_BACK)
        page = read_events(registry, after=low, limit=2 * LOOK_BACK)
        seen = {number for number in seen if number > low}
        fresh = [event for event in page if event.id not in seen]
        for event in fresh:
            seen.add(event.id)
            highest = max(highest, event.id)
            yield event
        if not fresh:
            wait(every_s)
