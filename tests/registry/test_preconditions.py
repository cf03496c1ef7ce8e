"""What exists is not written over, where the store can tell; uploads that break leave nothing.

rclone's S3 server ignores `If-None-Match`, so that moto's is asked here.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any
from urllib.parse import urlsplit

import obstore.store
import pytest

from registry import CorruptObject, NotFound, Registry, StorageUnavailable
from registry.blobs import (
    Blobs,
    ObjectStore,
    ObstoreObjects,
    blob_key,
    open_bucket,
    open_directory,
)
from tests.registry.capsules import MemoryObjects, capsule

DATA = b"bytes of a capsule"
DIGEST = hashlib.sha256(DATA).hexdigest()
KEY = blob_key(DIGEST)
# The first of them makes moto's environment.
SLOW = (pytest.mark.slow, pytest.mark.timeout(1800))


@pytest.fixture(params=["directory", pytest.param("moto", marks=SLOW), "obstore memory", "fake"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """Each store that knows preconditions."""
    match request.param:
        case "directory":
            return open_directory(tmp_path / "store")
        case "moto":
            return open_bucket(request.getfixturevalue("moto_place"))
        case "obstore memory":
            return ObstoreObjects(obstore.store.MemoryStore(), "memory")
        case _:
            return MemoryObjects()


class Overtaken:
    """A store as a writer sees it that looked first, and whose bytes then come late and damaged.

    Args:
        others: What happens between its look and its write.
    """

    def __init__(self, store: ObjectStore, others: Any) -> None:
        self._store = store
        self._others = others

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put(self, key: str, data: bytes) -> None:
        """Write damaged bytes."""
        self._others()
        self._store.put(key, data[:-1] + b"!")

    def create(self, key: str, data: bytes) -> bool:
        """Create with damaged bytes."""
        self._others()
        return self._store.create(key, data[:-1] + b"!")


def test_create_keeps_what_is_there(store: ObjectStore) -> None:
    """The first writer's bytes stay, and the second is told."""
    assert store.create("a/b", b"first")
    assert not store.create("a/b", b"second")
    assert store.get("a/b") == b"first"
    store.delete("a/b")
    assert store.create("a/b", b"third")


def test_a_late_writer_does_not_damage_what_another_stored(store: ObjectStore) -> None:
    """Both saw nothing; the one that comes second sends damaged bytes, and they are refused."""
    late: Any = Overtaken(store, lambda: Blobs(store).put(DATA, DIGEST))
    Blobs(late).put(DATA, DIGEST)
    assert Blobs(store).read(DIGEST) == DATA


def test_a_damaged_blob_is_still_healed(store: ObjectStore) -> None:
    """Whoever publishes next replaces bytes that are not those of the digest."""
    late: Any = Overtaken(store, lambda: None)
    with pytest.raises(CorruptObject, match="were altered"):
        Blobs(late).put(DATA, DIGEST)
    Blobs(store).put(DATA, DIGEST)
    assert Blobs(store).read(DIGEST) == DATA


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_round_of_a_registry(moto_place: str, tmp_path: Path) -> None:
    """Published, fetched, swept and published again, and the bytes are where the rows say."""
    registry = Registry.open(moto_place, database=f"sqlite:///{tmp_path}/rows.db")
    version = registry.publish(capsule(seed=0), alias=None)
    registry.publish(capsule(seed=1))
    assert registry.fetch("tower@1") == capsule(seed=0)
    registry.retire("tower", 1)
    assert registry.sweep(grace=timedelta(0)).removed == (version.digest,)
    assert open_bucket(moto_place).get(blob_key(version.digest)) is None
    with pytest.raises(NotFound, match="removed by a sweep"):
        registry.fetch(f"sha256:{version.digest}")
    registry.publish(capsule(seed=0), scene="bridge")
    assert registry.fetch("bridge") == capsule(seed=0)
    assert registry.verify() == []
    registry.close()


@contextmanager
def cutting(target: tuple[str, int], after_bytes: int) -> Iterator[str]:
    """The URL of a proxy that cuts each connection after so many bytes of what is sent."""

    class Cut(BaseRequestHandler):
        def handle(self) -> None:
            left = after_bytes
            with socket.create_connection(target) as server:
                while left > 0 and (data := self.request.recv(min(left, 65_536))):
                    server.sendall(data)
                    left -= len(data)
                server.shutdown(socket.SHUT_WR)
                # Until the server has dealt with what it got.
                with suppress(OSError):
                    while server.recv(65_536):
                        pass

    with serving(ThreadingTCPServer(("127.0.0.1", 0), Cut)) as url:
        yield url


@contextmanager
def serving(server: Any) -> Iterator[str]:
    """The URL of the server while it runs."""
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("verb", ["put", "create"])
def test_an_upload_that_breaks_leaves_nothing(
    moto_place: str, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """The connection ends within the body: the writer is told, and no reader sees a part."""
    data = bytes(range(256)) * 4096
    sound = open_bucket(moto_place)
    parts = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    with cutting((parts.hostname or "", parts.port or 0), 500_000) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(StorageUnavailable, match="could not write a/b"):
            getattr(open_bucket(moto_place), verb)("a/b", data)
    assert sound.get("a/b") is None
    assert sound.create("a/b", data)
    assert sound.get("a/b") == data


def test_a_store_without_preconditions_is_written_plainly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that answers "not implemented" to the condition gets the same bytes without it."""
    objects: dict[str, bytes] = {}

    class Plain(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            if self.headers["if-none-match"]:
                self.answer(501)
                return
            objects[self.path] = data
            self.answer(200)

        def do_GET(self) -> None:
            data = objects.get(self.path)
            self.answer(404 if data is None else 200, data or b"")

        def answer(self, status: int, body: bytes = b"") -> None:
            self.send_response(status)
            self.send_header("etag", '"1"')
            self.send_header("last-modified", "Mon, 04 May 2026 12:00:00 GMT")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Plain)) as url:
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        Blobs(open_bucket("s3://bucket")).put(DATA, DIGEST)
    assert objects == {f"/bucket/{KEY}": DATA}
