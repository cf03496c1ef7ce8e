"""Fixtures of the registry's tests.

A test that asks for `registry` runs on SQLite and a directory, and with `make test-slow` on
PostgreSQL and S3 as well, unless it also asks for `tmp_path`, to look at files.
"""

from __future__ import annotations

import hashlib
import inspect
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.environment import environment
from registry import Registry
from registry.address import (
    CACHE_BYTES_VARIABLE,
    CACHE_VARIABLE,
    DATABASE_FILE,
    DATABASE_VARIABLE,
    PLACE_VARIABLE,
)
from registry.blobs import ObjectStore, open_bucket, open_directory
from tests.registry.servers import S3, Postgres, moto, postgres, s3

PLAIN = "sqlite+directory"
OTHERS = ("postgresql+directory", "sqlite+s3", "postgresql+s3")
# Few tests, chosen to touch every table and the store: they run everywhere, every time.
QUICK_EVERYWHERE = "test_backends"
# Its client library wants a python-dateutil that the rest of the project does not.
MOTO = ("moto[server]>=5.2.5,<6",)


@dataclass(frozen=True)
class Backend:
    """Where a registry can be opened; `folder` shows its blobs, on whichever server."""

    name: str
    place: str
    database: str | None
    folder: Path

    def open(self) -> Registry:
        """Open it; several may be open at once."""
        return Registry.open(self.place, database=self.database)

    def store(self) -> ObjectStore:
        """Its store, to be written to behind its back."""
        if self.place.startswith("s3://"):
            return open_bucket(self.place)
        return open_directory(Path(self.place))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test of a registry its back ends."""
    marks = metafunc.definition.iter_markers("parametrize")
    if "backend" not in metafunc.fixturenames or any("backend" in mark.args[0] for mark in marks):
        return
    names: list[object] = [PLAIN]
    module = metafunc.module.__name__.rpartition(".")[2]
    if "tmp_path" not in inspect.signature(metafunc.function).parameters:
        quick = module == QUICK_EVERYWHERE
        names += [pytest.param(name, marks=() if quick else pytest.mark.slow) for name in OTHERS]
    metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The developer's own registry is never touched."""
    for name in (PLACE_VARIABLE, DATABASE_VARIABLE, CACHE_VARIABLE, CACHE_BYTES_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints a line into the output of the run, whether the test passes or not."""

    def show(line: str) -> None:
        with capsys.disabled():
            print(line)

    return show


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an empty registry, to be copied: migrating each time would take longer."""
    folder = tmp_path_factory.mktemp("empty") / "registry"
    Registry.open(folder).close()
    return folder


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """PostgreSQL, until the last test."""
    with postgres() as server:
        yield server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """S3, until the last test."""
    with s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_folder(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of the bucket, at `s3://bucket/` and its name, and the way to reach it."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server.bucket / s3_server.new_prefix()


@pytest.fixture(scope="session")
def moto_server(root: Path) -> Iterator[dict[str, str]]:
    """An S3 server that knows preconditions, in an environment of its own."""
    try:
        python = environment(root / ".venv-moto", MOTO, "moto.server")
    except RuntimeError as error:
        pytest.skip(str(error))
    with moto(python) as way:
        yield way


@pytest.fixture
def moto_place(
    moto_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> str:
    """The address of an empty folder there, and the way to reach it."""
    for name, value in moto_server.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{hashlib.sha256(request.node.nodeid.encode()).hexdigest()}"


@pytest.fixture
def postgres_database(postgres_server: Postgres) -> Iterator[str]:
    """The URL of a new database with the registry's tables."""
    url = postgres_server.new_database()
    yield url
    postgres_server.drop(url)


@pytest.fixture
def backend(request: pytest.FixtureRequest, empty_registry: Path, tmp_path: Path) -> Backend:
    """An empty registry's place, by the name of its back end."""
    rows, _, store = request.param.partition("+")
    folder = tmp_path / "registry"
    shutil.copytree(empty_registry, folder)
    database = None if store == "directory" else f"sqlite:///{folder / DATABASE_FILE}"
    if rows == "postgresql":
        database = request.getfixturevalue("postgres_database")
    if store == "directory":
        return Backend(request.param, str(folder), database, folder)
    s3_folder = request.getfixturevalue("s3_folder")
    return Backend(request.param, f"s3://bucket/{s3_folder.name}", database, s3_folder)


@pytest.fixture
def registry(backend: Backend) -> Iterator[Registry]:
    """An empty registry, in a directory in `tmp_path / "registry"`."""
    opened = backend.open()
    yield opened
    opened.close()
