"""The database: where it is, how a transaction runs, and how its tables come about.

SQLite needs two event hooks. Python's driver would otherwise open transactions by itself, late
and without the write lock, so two writers could both read and then both fail. With them, a
writing transaction takes the lock at its first statement and a reading one never waits.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from registry.errors import StorageUnavailable
from registry.schema import REVISION

BUSY_TIMEOUT_MS = 30_000
# A service has as many threads that ask the registry as it takes completions: 36 unless it is set
# otherwise. While the database hangs, those that could be answered must not wait for those that
# cannot. Connections beyond the usual five are closed after their use.
MOST_CONNECTIONS = 100
MIGRATIONS = Path(__file__).parent / "migrations"

# Any number will do, if all processes that migrate one PostgreSQL database agree on it.
MIGRATION_LOCK = 7_325_411

# Alembic keeps its context in module globals, so that threads must take turns.
_ONE_MIGRATION = threading.Lock()


class Database:
    """One engine, from which threads take connections.

    Args:
        url: SQLAlchemy URL; `postgresql://` is understood as psycopg 3.

    Raises:
        StorageUnavailable: The URL is malformed, or its driver is not installed.
    """

    def __init__(self, url: str | URL) -> None:
        self._engine = _create_engine(url)
        sqlite = self._engine.dialect.name == "sqlite"
        # A transaction of SQLite sees one moment already; elsewhere each statement has its own.
        still = {} if sqlite else {"isolation_level": "REPEATABLE READ"}
        self._reading = self._engine.execution_options(realfill_reading=True, **still)
        # SQLite has one writer; threads queue here, in turn, where its own wait is by chance.
        self._one_writer: AbstractContextManager[Any] = (
            threading.Lock() if sqlite else nullcontext()
        )
        in_file = sqlite and self._engine.url.database not in (None, "", ":memory:")
        self._watch = _Watch(self._engine) if in_file else None

    @property
    def place(self) -> str:
        """The URL without its password, for messages."""
        return self._engine.url.render_as_string(hide_password=True)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads, and that sees one moment.

        Raises:
            StorageUnavailable: The database does not answer.
        """
        with self._translated(), self._reading.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that is committed at the end and undone by any exception.

        Raises:
            StorageUnavailable: The database does not answer or has no room; nothing was changed.
        """
        with self._one_writer, self._translated(), self._engine.begin() as connection:
            yield connection

    def prepare(self) -> None:
        """Create the tables of a new database; refuse one of another revision.

        Raises:
            StorageUnavailable: The tables are of another revision than this code.
        """
        with self.reading() as connection:
            found = _revision(connection)
        if found is None:
            with self.writing() as connection:
                _lock_migrations(connection)
                # Another process may have created the tables while this one waited.
                if (found := _revision(connection)) is None:
                    upgrade(connection)
                    found = REVISION
        if found != REVISION:
            raise StorageUnavailable(
                f"The registry's tables at {self.place} are of revision {found} and this realfill "
                f"needs {REVISION}: run `registry upgrade` with the newer realfill of the two."
            )

    def upgrade(self) -> None:
        """Bring existing tables to this code's revision.

        Raises:
            StorageUnavailable: The tables are newer than this code.
        """
        from alembic.util import CommandError

        with self.writing() as connection:
            _lock_migrations(connection)
            try:
                upgrade(connection)
            except CommandError as error:
                raise StorageUnavailable(
                    f"The registry's tables at {self.place} are newer than this realfill "
                    f"({error}): install the newer realfill."
                ) from error

    def forget(self) -> None:
        """Overwrite what was deleted where it may still lie: in SQLite's log of changes."""
        if self._engine.dialect.name != "sqlite":
            return
        with self._one_writer, self._translated():
            connection = self._engine.raw_connection()
            try:
                connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
            finally:
                connection.close()

    def close(self) -> None:
        """Close the pooled connections."""
        self._engine.dispose()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        if self._watch is not None:
            self._watch.look()
        try:
            yield
        except (DBAPIError, PoolTimeout) as error:
            cause = getattr(error, "orig", None) or error
            raise StorageUnavailable(
                f"The registry's database at {self.place} failed: {first_line(cause)}. Check that "
                "it is reachable and writable and that its disk has room, then try again; "
                "nothing was changed."
            ) from error


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Run the migrations inside the connection's own transaction."""
    # Alembic takes a quarter of a second to import, and only new databases need it.
    from alembic import command

    with _ONE_MIGRATION:
        command.upgrade(migration_config(connection), revision)


def migration_config(connection: Connection | None = None) -> Any:
    """Alembic's configuration, without an ini file."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def first_line(error: BaseException) -> str:
    """The vendor's message, shortened to its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _create_engine(url: str | URL) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        sqlite = parsed.get_backend_name() == "sqlite"
        in_memory = sqlite and parsed.database in (None, "", ":memory:")
        pool = {} if in_memory else {"pool_size": 5, "max_overflow": MOST_CONNECTIONS - 5}
        engine = create_engine(parsed, pool_pre_ping=not sqlite, **pool)
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise StorageUnavailable(
            "The registry's database URL cannot be read: write it like sqlite:////srv/registry.db "
            "or postgresql://user:password@host/name."
        ) from error
    except ModuleNotFoundError as error:
        raise StorageUnavailable(
            f"The registry's database needs the Python package {error.name}: install it "
            "(PostgreSQL: pip install 'psycopg[binary]')."
        ) from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


class _Watch:
    """Notices that SQLite's file is another one, or gone: open, it goes on without a name.

    What is written there then would be of use to nobody, while whoever opens the directory anew
    sees other rows.
    """

    def __init__(self, engine: Engine) -> None:
        self._file = Path(str(engine.url.database)).absolute()
        self._opened = False
        event.listen(engine, "connect", self._note)
        event.listen(engine, "checkout", self._check)

    def look(self) -> None:
        """Before a connection is used.

        Raises:
            StorageUnavailable: The file is gone.
        """
        if self._opened and self._identity() is None:
            raise StorageUnavailable(
                f"The registry's database {self._file} is gone, or its directory was moved: put it "
                "back, or start again with the new place; nothing was changed."
            )

    def _note(self, _: sqlite3.Connection, record: ConnectionPoolEntry) -> None:
        record.info["file"] = self._identity()
        # A file that is named by a URI of SQLite's own is not looked for.
        self._opened = self._opened or record.info["file"] is not None

    def _check(self, _: sqlite3.Connection, record: ConnectionPoolEntry, __: object) -> None:
        """Let the pool open a connection anew that belongs to another file."""
        known = record.info["file"]
        if known is not None and known != self._identity():
            raise DisconnectionError

    def _identity(self) -> tuple[int, int] | None:
        """Device and number of the file; None where there is none."""
        try:
            found = self._file.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino


def _configure_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # None: the driver opens no transaction by itself.
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    # What is erased must not stay readable in the file's free pages.
    connection.execute("PRAGMA secure_delete = ON")


def _begin_sqlite(connection: Connection) -> None:
    reading = connection.get_execution_options().get("realfill_reading", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def _revision(connection: Connection) -> str | None:
    """The revision of the tables, or None before there are any."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.execute(
        text("SELECT version_num FROM alembic_version")
    ).scalar_one_or_none()
    return found


def _lock_migrations(connection: Connection) -> None:
    """One process migrates at a time; SQLite's write lock is held already."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
