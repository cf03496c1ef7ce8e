"""Events as they are watched: each once, also those that show up late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from sqlalchemy import delete, insert, select

from registry import Registry
from registry.events import Event, watch
from registry.schema import outbox
from tests.registry.capsules import capsule


@pytest.fixture
def full(registry: Registry) -> Registry:
    """A registry in which two things happened."""
    registry.publish(capsule(), by="ada")
    return registry


def until_interrupted(stream: Iterator[Event]) -> Iterator[Event]:
    """The stream as far as somebody presses Ctrl-C."""
    with suppress(KeyboardInterrupt):
        yield from stream


def test_watch_yields_events_as_they_come(full: Registry) -> None:
    """Only new ones by default, each once, in order."""
    steps: list[Callable[[], object]] = [
        lambda: full.publish(capsule(seed=1)),
        lambda: full.retire("tower", 1),
    ]

    def wait(_: float) -> None:
        if not steps:
            raise KeyboardInterrupt
        steps.pop(0)()

    seen: list[object] = []
    seen += [event.kind for event in until_interrupted(watch(full, wait=wait))]
    assert seen == ["version.published", "alias.moved", "version.retired"]
    seen += [event.kind for event in until_interrupted(watch(full, after=0, wait=wait))]
    assert len(seen) == 3 + 5


def test_watch_sees_a_row_that_was_committed_late(full: Registry) -> None:
    """PostgreSQL may show a lower number after a higher one."""
    with full.database.writing() as connection:
        row = dict(connection.execute(select(outbox).where(outbox.c.id == 1)).one()._mapping)
        connection.execute(delete(outbox).where(outbox.c.id == 1))
    calls: list[int] = []

    def wait(_: float) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        with full.database.writing() as connection:
            connection.execute(insert(outbox).values(row))

    seen: list[object] = []
    seen += [event.id for event in until_interrupted(watch(full, after=0, wait=wait))]
    assert seen == [2, 1]
