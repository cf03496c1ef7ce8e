"""Migrations on both databases: down and up again, and with rows that an older registry wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from sqlalchemy import Connection, inspect, select, text

from registry import Query, Registry
from registry.blobs import open_directory
from registry.database import Database, migration_config, upgrade
from registry.deliveries import EndpointState, claim, enlist, note, states
from registry.ledger import record
from registry.schema import metadata, versions
from registry.upload import inspect as inspect_capsule
from tests.registry.capsules import capsule
from tests.registry.servers import Postgres

# As the first revision's code wrote them, column for column.
ROWS: dict[str, str] = {
    "scenes": "(id, name, last_number, created) VALUES (:scene_id, :scene, 3, :at)",
    "blobs": "(digest, tensor_digest, size_bytes, stored) "
    "VALUES (:digest, :tensor_digest, :size_bytes, :at)",
    "versions": "(scene_id, number, digest, base, base_fingerprint, rank, metadata, created, "
    "created_by, retired) VALUES (:scene_id, :number, :digest, :base, :base_fingerprint, :rank, "
    ":metadata, :at, 'Ada', :retired)",
    "aliases": "(scene_id, name, number) VALUES (:scene_id, 'live', :number)",
    "alias_moves": "(scene_id, alias, number, action, moved, moved_by) "
    "VALUES (:scene_id, 'live', :number, 'publish', :at, 'ada')",
    "audit": "(at, \"by\", action, scene, details) VALUES (:at, 'ada', 'version.published', "
    ":scene, '{}')",
    "outbox": "(created, event, body, attempts) VALUES (:at, 'version.published', '{}', 0)",
}
AT = datetime(2026, 5, 4, 12, 30, 15, 123456, tzinfo=UTC)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database without tables."""
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path}/rows.db")
        yield database
        database.close()
        return
    server: Postgres = request.getfixturevalue("postgres_server")
    url = server.new_database(template=None)
    database = Database(url)
    yield database
    database.close()
    server.drop(url)


def write(connection: Connection, table: str, **values: Any) -> None:
    """One row of the first revision."""
    statement = text(f"INSERT INTO {table} {ROWS[table]}")
    if connection.dialect.name == "sqlite":
        values["at"] = AT.strftime("%Y-%m-%d %H:%M:%S.%f")
    names = [name for name in values if f":{name}" in ROWS[table]]
    connection.execute(statement, {name: values[name] for name in names})


def fill(connection: Connection, store_at: Path) -> None:
    """Two scenes as the first revision kept them, the tower's second version retired."""
    for scene_id, scene, seeds in ((1, "tower", (0, 1)), (2, "bridge", (2,))):
        write(connection, "scenes", scene_id=scene_id, scene=scene, at=AT)
        for number, seed in enumerate(seeds, start=1):
            data = capsule(scene=scene, seed=seed)
            upload = inspect_capsule(data)
            key = store_at / "blobs" / "sha256" / upload.digest[:2] / upload.digest
            key.parent.mkdir(parents=True, exist_ok=True)
            key.write_bytes(data)
            retired = AT if number == 2 else None
            if retired and connection.dialect.name == "sqlite":
                retired = AT.strftime("%Y-%m-%d %H:%M:%S.%f")  # type: ignore[assignment]
            row = {name: getattr(upload, name) for name in ("digest", "tensor_digest")}
            row |= {name: getattr(upload, name) for name in ("base", "base_fingerprint", "rank")}
            row |= {"size_bytes": upload.size_bytes, "metadata": json.dumps(upload.metadata)}
            row |= {"scene": scene, "scene_id": scene_id, "number": number, "retired": retired}
            for table in ("blobs", "versions", "audit", "outbox"):
                write(connection, table, **row, at=AT)
        for table in ("aliases", "alias_moves"):
            write(connection, table, scene_id=scene_id, number=1, at=AT)


def tables_of(connection: Connection) -> set[str]:
    """Names of the tables that are there."""
    return set(inspect(connection).get_table_names())


def test_up_down_and_up_again(database: Database) -> None:
    """Each direction leaves exactly what it should, and Alembic finds nothing more to do."""
    database.prepare()
    with database.writing() as connection:
        command.check(migration_config(connection))
        assert tables_of(connection) == set(metadata.tables) | {"alembic_version"}
        command.downgrade(migration_config(connection), "0001")
        assert tables_of(connection) == set(ROWS) | {"alembic_version"}
        command.downgrade(migration_config(connection), "base")
        assert tables_of(connection) == {"alembic_version"}
    database.prepare()
    with database.writing() as connection:
        command.check(migration_config(connection))


def test_rows_of_the_first_revision_are_kept_and_completed(
    database: Database, tmp_path: Path
) -> None:
    """What was published is served, found and verified after the upgrade, and kept going down."""
    with database.writing() as connection:
        upgrade(connection, "0001")
        fill(connection, tmp_path)
    database.upgrade()
    registry = Registry(database, open_directory(tmp_path))
    assert registry.verify() == []
    assert registry.resolve("tower").created == AT
    assert registry.fetch("tower@live") == capsule(seed=0)
    found = registry.search(Query(text="tower ada a photo"))
    assert [version.reference for version in found.versions] == ["tower@1"]
    everything = registry.versions("tower", retired=True)
    assert [(version.number, version.retired) for version in everything] == [(2, AT), (1, None)]
    if database.place.startswith("postgresql"):
        # Rows of a serial column that were written with their number leave its counter behind.
        with database.writing() as connection:
            connection.execute(text("SELECT setval('scenes_id_seq', 2)"))
    assert registry.publish(capsule(scene="bridge", seed=7)).number == 4
    with database.writing() as connection:
        command.downgrade(migration_config(connection), "0001")
        kept = connection.execute(select(versions.c.scene_id, versions.c.number)).all()
    assert sorted(map(tuple, kept)) == [(1, 1), (1, 2), (2, 1), (2, 4)]


def write_events(connection: Connection, *states: str) -> None:
    """Events of revision 0002: attempts, due, failure and delivered of each."""
    for state in states:
        at, due = "'2026-05-04 12:00:00.000000+00'", "'2026-05-05 12:00:00.000000+00'"
        if connection.dialect.name == "sqlite":
            at, due = at.replace("+00", ""), due.replace("+00", "")
        values = state.replace("AT", at).replace("DUE", due)
        connection.execute(
            text(
                "INSERT INTO outbox (created, event, body, attempts, due, failure, delivered) "
                f"VALUES ({at}, 'alias.moved', '{{}}', {values})"
            )
        )


DELIVERED, WAITING, LOST = "1, NULL, NULL, AT", "2, DUE, 'answered 500'", "20, NULL, 'gone'"


def test_deliveries_are_carried_over(database: Database) -> None:
    """The first endpoints that are named inherit what the outbox knew, and no later one does."""
    with database.writing() as connection:
        upgrade(connection, "0002")
        write_events(connection, DELIVERED, f"{WAITING}, NULL", f"{LOST}, NULL")
    database.upgrade()
    with database.writing() as connection:
        write_event(connection, "version.retired")
    assert enlist(database, ["http://a/", "http://b/"]) == ("http://a/", "http://b/")
    enlist(database, ["http://c/"])
    assert states(database) == [
        EndpointState("http://a/", 1, 2, 1, "gone"),
        EndpointState("http://b/", 1, 2, 1, "gone"),
        EndpointState("http://c/", 0, 0, 0, None),
    ]
    assert [one.event.kind for one in claim(database, "http://a/", AT)] == ["version.retired"]
    later = claim(database, "http://b/", AT + timedelta(days=1))
    assert [(one.event.id, one.attempts) for one in later] == [(2, 3), (4, 1)]


def test_what_was_never_sent_is_no_delivery(database: Database) -> None:
    """Without webhooks there is nobody to inherit: an endpoint begins with the next event."""
    with database.writing() as connection:
        upgrade(connection, "0002")
        write_events(connection, "0, NULL, NULL, NULL")
    database.upgrade()
    assert states(database) == []
    enlist(database, ["http://a/"])
    assert claim(database, "http://a/", AT) == []


def test_deliveries_go_back_to_the_outbox(database: Database) -> None:
    """An event counts as delivered when nobody waits for it, as revision 0002 has it."""
    database.prepare()
    now = AT
    with database.writing() as connection:
        write_event(connection, "before.all")
    enlist(database, ["http://a/", "http://b/"])
    with database.writing() as connection:
        write_event(connection, "taken.by_all")
        write_event(connection, "taken.by_one")
    for address, failure in (("http://a/", None), ("http://b/", "answered 500")):
        first, second = claim(database, address, now)
        note(database, first, now)
        due = now if failure else None
        note(database, replace(second, failure=failure, due=due), now)
    with database.writing() as connection:
        command.downgrade(migration_config(connection), "0002")
        rows = connection.execute(
            text(
                "SELECT event, attempts, failure, due IS NULL, delivered IS NULL FROM outbox "
                "ORDER BY id"
            )
        )
        assert [tuple(row) for row in rows] == [
            ("before.all", 0, None, True, False),
            ("taken.by_all", 1, None, True, False),
            ("taken.by_one", 1, "answered 500", False, True),
        ]


def write_event(connection: Connection, event: str) -> None:
    """An event of today, with what it owes."""
    record(connection, event, "tower", "ada", AT, {})
