"""Whole scenes into files and other registries, and the same scenes out again."""

from __future__ import annotations

import cProfile
import hashlib
import json
import tarfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from registry import (
    Conflict,
    CorruptObject,
    InvalidReference,
    InvalidUpload,
    NotFound,
    Protected,
    Registry,
)
from registry.blobs import blob_key
from registry.exports import tar_writer
from registry.manifest import MANIFEST, SceneEntry, Source, TarExport, open_export
from registry.source import RegistrySource
from registry.transfer import Transfer, export_scenes, import_scenes
from tests.registry.capsules import capsule


@pytest.fixture
def other(tmp_path: Path) -> Registry:
    """An empty registry to carry scenes to."""
    return Registry.open(tmp_path / "other")


@pytest.fixture
def full(registry: Registry) -> Registry:
    """Two scenes: one with a history, labels, a retired version and a guarded alias."""
    for seed in range(4):
        registry.publish(capsule(seed=seed), by="ada", tags={"light": f"l{seed}"})
    registry.promote("tower@2", to="candidate", by="bob")
    registry.rollback("tower", by="bob")
    registry.rollback("tower", by="bob")
    registry.measure("tower", 2, {"psnr": 21.5})
    registry.retire("tower", 4)
    registry.protect("tower")
    registry.publish(capsule("bridge", seed=9), by="cid")
    return registry


def say(registry: Registry) -> list[SceneEntry]:
    """Everything that a registry says of its scenes."""
    return RegistrySource(registry).scenes()


@pytest.mark.parametrize("name", ["out", "out.tar"])
def test_an_export_is_imported_as_it_was(
    full: Registry, other: Registry, tmp_path: Path, name: str
) -> None:
    """Numbers, digests, people, times, labels, aliases, history and guards."""
    export_scenes(full, tmp_path / name)
    done = import_scenes(other, open_export(tmp_path / name))
    assert [(one.scene, one.versions, one.moves) for one in done] == [
        ("bridge", 1, 1),
        ("tower", 4, 7),
    ]
    assert say(other) == say(full)
    assert other.fetch("tower@2") == capsule(seed=1)
    assert other.verify() == []


def test_an_imported_history_is_rolled_back_further(full: Registry, other: Registry) -> None:
    """Rollbacks that were taken before count here too."""
    import_scenes(other, RegistrySource(full))
    expected = full.rollback("tower", override=True).number
    assert other.rollback("tower", override=True).number == expected == 1
    with pytest.raises(NotFound, match="no earlier version"):
        other.rollback("tower", override=True)


def test_a_copy_is_carried_forward(full: Registry, other: Registry) -> None:
    """Only what is new is sent; a second copy of the same changes nothing."""
    import_scenes(other, RegistrySource(full))
    again = import_scenes(other, RegistrySource(full))
    assert again == [Transfer("bridge", 0, 0, 0), Transfer("tower", 0, 0, 0)]
    full.publish(capsule(seed=5), override=True)
    (done,) = import_scenes(other, RegistrySource(full, ["tower"]), override=True)
    assert done == Transfer("tower", 1, 1, len(capsule(seed=5)))
    assert say(other) == say(full)


def test_a_protected_alias_is_carried_forward_by_override_only(
    full: Registry, other: Registry
) -> None:
    """The guard of the registry that takes counts, and what moves no guarded alias passes it."""
    import_scenes(other, RegistrySource(full, ["bridge"]))
    other.protect("bridge")
    full.publish(capsule("bridge", seed=10), alias="candidate")
    assert import_scenes(other, RegistrySource(full, ["bridge"]))[0].moves == 1
    full.promote("bridge@candidate")
    with pytest.raises(Protected, match="'live' of 'bridge' is protected: move it with --override"):
        import_scenes(other, RegistrySource(full, ["bridge"]))
    assert other.resolve("bridge").number == 1
    assert import_scenes(other, RegistrySource(full, ["bridge"]), override=True)[0].moves == 1
    assert other.resolve("bridge").number == 2
    with pytest.raises(Protected):
        other.rollback("bridge")


class Breaking:
    """A source that fails after some capsules."""

    def __init__(self, source: Source, count: int) -> None:
        self.place = source.place
        self.scenes: Callable[[], Sequence[SceneEntry]] = source.scenes
        self.signature = source.signature
        self._source = source
        self._left = count

    def read(self, digest: str) -> bytes:
        """Another capsule, while there are any left."""
        if self._left == 0:
            raise ConnectionError("the line broke")
        self._left -= 1
        return self._source.read(digest)


def test_an_interrupted_copy_is_resumed(full: Registry, other: Registry) -> None:
    """Nothing of the scene shows before all is there, and no capsule is sent twice."""
    source = RegistrySource(full, ["tower"])
    with pytest.raises(ConnectionError):
        import_scenes(other, Breaking(source, 3))
    assert other.scenes() == []
    (done,) = import_scenes(other, Breaking(source, 1))
    assert (done.versions, done.sent_bytes) == (4, len(capsule(seed=3)))
    assert say(other) == say(full)[1:]


def test_scenes_that_parted_are_not_mixed(full: Registry, other: Registry) -> None:
    """Another version 1, or an alias moved elsewhere: refused, unless under another name."""
    other.publish(capsule(seed=77))
    with pytest.raises(Conflict, match="version 1 is another one there"):
        import_scenes(other, RegistrySource(full, ["tower"]))
    (done,) = import_scenes(other, RegistrySource(full, ["tower"]), rename="tower-2")
    assert (done.scene, other.resolve("tower-2").digest) == (
        "tower-2",
        full.resolve("tower").digest,
    )
    other.promote("tower-2@1", override=True)
    full.publish(capsule(seed=6), override=True)
    with pytest.raises(Conflict, match="an alias was moved elsewhere there"):
        import_scenes(other, RegistrySource(full, ["tower"]), rename="tower-2")


@pytest.mark.parametrize(
    ("name", "sentence"), [(None, "'bridge' was erased"), ("spire", "were erased")]
)
def test_what_was_erased_is_not_brought_back(
    full: Registry, other: Registry, name: str | None, sentence: str
) -> None:
    """Neither under its name nor under another: no row, and no bytes."""
    import_scenes(other, RegistrySource(full))
    (digest,) = other.erase("bridge", reason="asked").removed
    with pytest.raises(Conflict, match=sentence):
        import_scenes(other, RegistrySource(full, ["bridge"]), rename=name)
    assert [scene.name for scene in other.scenes()] == ["tower"]
    assert digest not in other.blobs.digests()


class Erasing(Breaking):
    """A source while whose only new capsule is read someone erases the target's scene."""

    def __init__(self, source: Source, target: Registry) -> None:
        super().__init__(source, 1)
        self._target = target

    def read(self, digest: str) -> bytes:
        """The capsule, then the erasure."""
        data = super().read(digest)
        self._target.erase("tower", reason="asked")
        return data


@pytest.mark.parametrize(
    ("name", "sentence"), [(None, "'tower' was erased"), ("spire", "were erased")]
)
def test_what_is_erased_meanwhile_is_not_brought_back(
    full: Registry, other: Registry, name: str | None, sentence: str
) -> None:
    """Scene and bytes are looked at again when their rows are held."""
    import_scenes(other, RegistrySource(full, ["tower"]))
    full.publish(capsule(seed=5), override=True)
    with pytest.raises(Conflict, match=sentence):
        import_scenes(other, Erasing(RegistrySource(full, ["tower"]), other), rename=name)
    assert other.scenes() == []


def test_swept_versions_leave_their_numbers(full: Registry, other: Registry) -> None:
    """Their bytes cannot come along; nobody else gets the number."""
    full.sweep(grace=timedelta(0))
    full.sweep(grace=timedelta(0))
    (done,) = import_scenes(other, RegistrySource(full, ["tower"]))
    assert done.versions == 3
    assert other.scene("tower").latest == 4
    assert other.publish(capsule(seed=8), override=True).number == 5
    assert other.verify() == []


def test_an_import_is_on_record(full: Registry, other: Registry) -> None:
    """The audit keeps who imported, beside the events as they were."""
    import_scenes(other, RegistrySource(full, ["bridge"]), by="eve")
    from registry.events import read_events

    events = read_events(other)
    assert [event.kind for event in events] == [
        "version.published",
        "alias.moved",
        "scene.imported",
    ]
    assert (events[0].data["by"], events[-1].data["by"]) == ("cid", "eve")


def test_an_unknown_scene_is_named(full: Registry, other: Registry, tmp_path: Path) -> None:
    """Before anything is written."""
    with pytest.raises(NotFound, match="no scene 'bride'"):
        export_scenes(full, tmp_path / "out", ["bride"])
    assert not (tmp_path / "out").exists()
    export_scenes(full, tmp_path / "out")
    with pytest.raises(InvalidReference, match="holds no scene 'bride'"):
        import_scenes(other, open_export(tmp_path / "out"), ["bride"])
    with pytest.raises(InvalidReference, match="cannot stand for 2 scenes"):
        import_scenes(other, open_export(tmp_path / "out"), rename="one")


def test_an_export_does_not_overwrite_another(full: Registry, tmp_path: Path) -> None:
    """A finished export stays; an interrupted one is continued."""
    export_scenes(full, tmp_path / "out")
    with pytest.raises(Conflict, match="holds an export already"):
        export_scenes(full, tmp_path / "out")
    (tmp_path / "out" / MANIFEST).unlink()
    damaged = tmp_path / "out" / blob_key(full.resolve("tower@1").digest)
    damaged.write_bytes(b"half")
    bridge, tower = export_scenes(full, tmp_path / "out")
    assert (bridge.sent_bytes, tower.sent_bytes) == (0, len(capsule(seed=0)))
    assert sorted((tmp_path / "out").rglob("*.part")) == []


def test_equal_exports_have_equal_tars(full: Registry, tmp_path: Path) -> None:
    """But for the moment of the export in the manifest."""
    for name in ("one.tar", "two.tar"):
        export_scenes(full, tmp_path / name)
    with tarfile.open(tmp_path / "one.tar") as one, tarfile.open(tmp_path / "two.tar") as two:
        assert one.getnames() == two.getnames()
        assert {member.mtime for member in one.getmembers()} == {0}
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def calls_to_read(file: Path, count: int) -> int:
    """How many calls of functions it takes to read a tar of so many capsules without signatures."""
    blobs = [str(k).encode() for k in range(count)]
    digests = [hashlib.sha256(blob).hexdigest() for blob in blobs]
    with tar_writer(file) as write:
        for blob, digest in zip(blobs, digests, strict=True):
            write(blob_key(digest), partial(bytes, blob))
    source, profile = TarExport(file), cProfile.Profile()
    profile.enable()
    read = [(source.read(digest), source.signature(digest)) for digest in digests]
    profile.disable()
    assert read == [(blob, None) for blob in blobs]
    return sum(entry.callcount for entry in profile.getstats())


def test_a_tar_of_many_versions_is_read_in_proportion(tmp_path: Path) -> None:
    """Four times as many take four times the work: it is not searched again for each."""
    few, many = (calls_to_read(tmp_path / f"{count}.tar", count) for count in (20, 80))
    assert many < 5 * few


def edit(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change a manifest by hand."""
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def test_an_altered_manifest_is_refused(full: Registry, other: Registry, tmp_path: Path) -> None:
    """Its own digest tells."""
    export_scenes(full, tmp_path / "out")
    edit(tmp_path / "out", lambda content: content["scenes"][0].update(latest=7))  # type: ignore[index, union-attr]
    with pytest.raises(InvalidUpload, match="was altered"):
        import_scenes(other, open_export(tmp_path / "out"))


@pytest.mark.parametrize("name", ["out", "out.tar"])
def test_what_is_no_export_is_refused(other: Registry, tmp_path: Path, name: str) -> None:
    """An empty directory, an empty tar, a picture."""
    if name == "out":
        (tmp_path / name).mkdir()
    else:
        tarfile.open(tmp_path / name, "w").close()
    with pytest.raises(InvalidUpload, match=f"holds no {MANIFEST}"):
        import_scenes(other, open_export(tmp_path / name))
    (tmp_path / "photo.tar").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))
    with pytest.raises(InvalidUpload, match="no readable tar file"):
        import_scenes(other, open_export(tmp_path / "photo.tar"))


def test_damaged_capsules_are_named(full: Registry, other: Registry, tmp_path: Path) -> None:
    """A flipped byte and a missing file; nothing of the scene is imported."""
    export_scenes(full, tmp_path / "out", ["bridge"])
    digest = full.resolve("bridge").digest
    file = tmp_path / "out" / blob_key(digest)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptObject, match=f"{digest} in .* were altered"):
        import_scenes(other, open_export(tmp_path / "out"))
    file.unlink()
    with pytest.raises(CorruptObject, match="are missing from"):
        import_scenes(other, open_export(tmp_path / "out"))
    assert other.scenes() == []
