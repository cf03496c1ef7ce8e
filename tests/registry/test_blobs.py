"""Every ObjectStore passes one contract; blobs are checked whatever the store does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import obstore.store
import pytest

from registry.blobs import (
    Blobs,
    ObjectStore,
    ObstoreObjects,
    blob_key,
    open_bucket,
    open_directory,
)
from registry.errors import CorruptObject, StorageUnavailable
from tests.registry.capsules import MemoryObjects, TearingObjects

DATA = b"bytes of a capsule"
# The first of them makes moto's environment.
SLOW = (pytest.mark.slow, pytest.mark.timeout(1800))
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(
    params=["directory", "s3", pytest.param("moto", marks=SLOW), "obstore memory", "fake"]
)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    """Each kind of store in turn."""
    match request.param:
        case "directory":
            yield open_directory(tmp_path / "store")
        case "s3":
            yield open_bucket(f"s3://bucket/{request.getfixturevalue('s3_folder').name}")
        case "moto":
            yield open_bucket(request.getfixturevalue("moto_place"))
        case "obstore memory":
            yield ObstoreObjects(obstore.store.MemoryStore(), "memory")
        case _:
            yield MemoryObjects()


def test_what_is_put_is_got(store: ObjectStore) -> None:
    """An object comes back byte for byte, empty ones too."""
    store.put("a/b", DATA)
    store.put("a/empty", b"")
    assert store.get("a/b") == DATA
    assert store.get("a/empty") == b""


def test_absent_object_is_none(store: ObjectStore) -> None:
    """No object is no error."""
    assert store.get("a/b") is None


def test_later_put_replaces(store: ObjectStore) -> None:
    """The last bytes stay."""
    store.put("a/b", b"old")
    store.put("a/b", b"new")
    assert store.get("a/b") == b"new"


def test_what_is_created_is_got(store: ObjectStore) -> None:
    """Where there is nothing, creating writes."""
    assert store.create("a/b", DATA)
    assert store.get("a/b") == DATA


def test_deleting_twice_is_harmless(store: ObjectStore) -> None:
    """An absent object can be deleted."""
    store.put("a/b", DATA)
    store.delete("a/b")
    store.delete("a/b")
    assert store.get("a/b") is None


def test_keys_are_listed_by_whole_components(store: ObjectStore) -> None:
    """The prefix a/1 does not list what lies in a/10."""
    for key in ("a/1/x", "a/10/x", "a/1/y"):
        store.put(key, DATA)
    assert sorted(store.keys("a/1")) == ["a/1/x", "a/1/y"]


def test_blob_lies_under_its_digest(store: ObjectStore) -> None:
    """The key is the digest behind its first two digits."""
    Blobs(store).put(DATA, DIGEST)
    assert store.get(f"blobs/sha256/{DIGEST[:2]}/{DIGEST}") == DATA
    assert Blobs(store).get(DIGEST) == DATA


def test_missing_blob_is_named(store: ObjectStore) -> None:
    """A blob that a row refers to but no store holds is a corrupt object."""
    with pytest.raises(CorruptObject, match=f"sha256:{DIGEST} are missing"):
        Blobs(store).get(DIGEST)


def test_altered_blob_is_never_returned(store: ObjectStore) -> None:
    """Bytes that differ from their digest raise on reading."""
    store.put(blob_key(DIGEST), DATA[:-1] + b"!")
    with pytest.raises(CorruptObject, match="were altered"):
        Blobs(store).get(DIGEST)


def test_putting_again_heals_an_altered_blob(store: ObjectStore) -> None:
    """Publishing the same capsule again replaces damaged bytes."""
    store.put(blob_key(DIGEST), b"damaged")
    Blobs(store).put(DATA, DIGEST)
    assert Blobs(store).get(DIGEST) == DATA


def test_store_that_tears_is_caught_while_putting() -> None:
    """Bytes are read back before anyone relies on them."""
    with pytest.raises(CorruptObject):
        Blobs(TearingObjects()).put(DATA, DIGEST)


def test_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file in the way gives a sentence with the remedy."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageUnavailable, match="Name another one in REALFILL_REGISTRY"):
        open_directory(tmp_path / "file" / "registry")


def test_vendor_error_is_the_cause_of_ours(tmp_path: Path) -> None:
    """The library's error is kept for whoever debugs, its first line for everyone."""
    store = open_directory(tmp_path)
    (tmp_path / "blobs").write_bytes(b"")
    with pytest.raises(StorageUnavailable, match="could not write blobs/x at") as caught:
        store.put("blobs/x", DATA)
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)


def test_many_keys_are_listed_in_pages(store: ObjectStore) -> None:
    """More keys than a server gives at once are all listed."""
    keys = {f"many/{number:04}" for number in range(1100)}
    for key in keys:
        store.put(key, b"")
    assert set(store.keys("many")) == keys


def test_large_object_comes_back(store: ObjectStore) -> None:
    """Several megabytes go in one piece, and an interrupted one never shows."""
    data = bytes(range(256)) * 32_768
    store.put("large", data)
    assert store.get("large") == data


def test_digests_are_those_of_blob_keys(store: ObjectStore) -> None:
    """Other files in the folder are no blobs."""
    Blobs(store).put(DATA, DIGEST)
    for key in (f"blobs/sha256/00/{DIGEST}", "blobs/sha256/ab/letter", f"other/{DIGEST}"):
        store.put(key, DATA)
    assert list(Blobs(store).digests()) == [DIGEST]


def test_wrong_secret_is_refused(s3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are signed: with another secret nothing is stored."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageUnavailable, match="could not write a/b at s3://bucket"):
        open_bucket(f"s3://bucket/{s3_folder.name}").put("a/b", DATA)
    assert not s3_folder.exists()


def test_bucket_is_opened_without_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """An S3 address alone is enough; credentials are looked up when they are needed."""
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert open_bucket("s3://bucket/prefix").place == "s3://bucket/prefix"


def test_bucket_that_does_not_answer_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint that refuses the connection gives StorageUnavailable, soon."""
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "eu-central-1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageUnavailable, match="could not read a/b at s3://bucket"):
        open_bucket("s3://bucket").get("a/b")
