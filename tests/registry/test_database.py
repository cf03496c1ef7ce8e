"""Tests of transactions, migrations and the errors of both."""

from __future__ import annotations

import io
import shutil
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import insert, inspect, select, text

from registry.database import Database, migration_config
from registry.errors import StorageUnavailable
from registry.schema import REVISION, metadata, scenes


@pytest.fixture
def database(empty_registry: Path, tmp_path: Path) -> Database:
    """A new SQLite file with its tables."""
    shutil.copy(empty_registry / "registry.db", tmp_path)
    database = Database(f"sqlite:///{tmp_path}/registry.db")
    database.prepare()
    return database


def test_new_database_holds_exactly_the_tables_of_the_schema(database: Database) -> None:
    """`alembic check` finds nothing to migrate after the migrations."""
    with database.writing() as connection:
        command.check(migration_config(connection))
        names = set(inspect(connection).get_table_names())
    assert names == set(metadata.tables) | {"alembic_version"}


def test_code_and_newest_migration_agree() -> None:
    """REVISION is the head, of which there is one."""
    assert ScriptDirectory.from_config(migration_config()).get_heads() == [REVISION]


def test_migrations_go_down_and_up_again(database: Database) -> None:
    """Going down leaves no table but Alembic's own."""
    with database.writing() as connection:
        command.downgrade(migration_config(connection), "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]
    database.prepare()
    with database.writing() as connection:
        command.check(migration_config(connection))


def test_migrations_can_be_written_for_postgresql() -> None:
    """The same migrations give PostgreSQL its own types."""
    config = migration_config()
    config.attributes["dialect"] = "postgresql"
    config.output_buffer = io.StringIO()
    command.upgrade(config, "head", sql=True)
    written = config.output_buffer.getvalue()
    assert "metadata JSONB NOT NULL" in written
    assert "id BIGSERIAL NOT NULL" in written
    assert "TIMESTAMP WITH TIME ZONE" in written


def test_connections_are_configured(database: Database) -> None:
    """WAL, foreign keys and the wait for a busy file are on in every connection."""
    with database.reading() as connection:
        for pragma, value in {
            "journal_mode": "wal",
            "foreign_keys": 1,
            "busy_timeout": 30000,
        }.items():
            assert connection.execute(text(f"PRAGMA {pragma}")).scalar() == value


def add_scenes(database: Database, count: int) -> None:
    """Insert that many scenes in one transaction, which may use no page more than it has."""
    with database.writing() as connection:
        pages = connection.execute(text("PRAGMA page_count")).scalar()
        connection.execute(text(f"PRAGMA max_page_count = {pages}"))
        for number in range(count):
            row = {"name": f"scene-{number}", "last_number": 0, "created": datetime.now(UTC)}
            connection.execute(insert(scenes).values(row))


def fail(database: Database) -> None:
    """Insert a scene, then stumble."""
    with database.writing() as connection:
        connection.execute(text("INSERT INTO scenes VALUES (1, 'tower', 0, '2026-01-01')"))
        raise ZeroDivisionError


def test_failed_transaction_leaves_nothing(database: Database) -> None:
    """Any exception undoes what the transaction wrote."""
    with pytest.raises(ZeroDivisionError):
        fail(database)
    with database.reading() as connection:
        assert connection.execute(select(scenes)).all() == []


def test_reader_does_not_wait_for_a_writer(database: Database) -> None:
    """While one transaction writes, another reads the state before it."""
    with database.writing() as writer:
        writer.execute(text("INSERT INTO scenes VALUES (1, 'tower', 0, '2026-01-01')"))
        with database.reading() as reader:
            assert reader.execute(select(scenes)).all() == []


def test_threads_do_not_wait_for_each_others_connections(database: Database) -> None:
    """Forty that read at the same moment, as a service's threads do while one read hangs."""
    together = threading.Barrier(40)

    def read() -> int:
        with database.reading() as connection:
            together.wait(10)
            return int(connection.execute(text("SELECT 7")).scalar_one())

    with ThreadPoolExecutor(40) as pool:
        assert [f.result() for f in [pool.submit(read) for _ in range(40)]] == [7] * 40
    database.close()


def test_writing_takes_the_lock_at_once(database: Database, tmp_path: Path) -> None:
    """A second writer is turned away at BEGIN, not after it has read."""
    other = sqlite3.connect(tmp_path / "registry.db", isolation_level=None, timeout=0)
    with database.writing() as connection:
        connection.execute(text("SELECT 1"))
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
    other.close()


def test_full_disk_is_storage_unavailable(database: Database) -> None:
    """SQLite's own message about a full disk is kept in ours."""
    with pytest.raises(StorageUnavailable, match=r"database or disk is full.*disk has room"):
        add_scenes(database, 10_000)
    with database.reading() as connection:
        assert connection.execute(select(scenes)).all() == []


def test_file_that_is_no_database_is_storage_unavailable(tmp_path: Path) -> None:
    """Another program's file is left as it is."""
    file = tmp_path / "registry.db"
    file.write_bytes(b"a letter to a friend " * 100)
    with pytest.raises(StorageUnavailable, match="file is not a database"):
        Database(f"sqlite:///{file}").prepare()
    assert file.read_bytes().startswith(b"a letter")


def test_tables_of_an_unknown_revision_are_refused(database: Database) -> None:
    """Tables of a newer realfill are not touched, and upgrading them says why."""
    with database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StorageUnavailable, match="are of revision 9999 and this realfill needs"):
        database.prepare()
    with pytest.raises(StorageUnavailable, match="newer than this realfill"):
        database.upgrade()


@pytest.mark.parametrize("url", ["", "registry.db", "nosuch://host/name"])
def test_malformed_url_is_refused(url: str) -> None:
    """The message shows how to write one."""
    with pytest.raises(StorageUnavailable, match="write it like sqlite:///"):
        Database(url)


def test_password_is_in_no_message() -> None:
    """Addresses are shown without what must stay secret."""
    pytest.importorskip("psycopg")
    assert "hunter2" not in Database("postgresql://me:hunter2@127.0.0.1:9/name").place


def test_moments_come_back_in_utc(database: Database) -> None:
    """SQLite forgets zones; the schema does not."""
    noon = datetime(2026, 5, 4, 12, 0, tzinfo=timezone(timedelta(hours=5)))
    with database.writing() as connection:
        connection.execute(insert(scenes).values(name="tower", last_number=0, created=noon))
        read = connection.execute(select(scenes.c.created)).scalar_one()
    assert read == noon
    assert read.tzinfo is UTC


def test_processes_that_open_at_once_build_the_tables_once(tmp_path: Path) -> None:
    """Three processes may find the same empty directory; all end with a working registry."""
    program = (
        "import sys; from registry import Registry; print(Registry.open(sys.argv[1]).scenes())"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "registry")],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    assert [process.communicate(timeout=240) for process in running] == [("[]\n", "")] * 3
