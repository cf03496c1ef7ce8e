"""Tests of publishing, resolving, fetching, retiring and paging."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import select, text

from registry import Registry
from registry.database import Database
from registry.errors import (
    AlreadyExists,
    Conflict,
    CorruptObject,
    InvalidReference,
    InvalidUpload,
    NotFound,
    StorageUnavailable,
)
from registry.schema import metadata
from tests.registry.capsules import FINGERPRINT, FullObjects, MemoryObjects, capsule

ROOT = Path(__file__).parents[2]


def blob_files(registry: Path) -> list[Path]:
    """Every file in the blob directory."""
    return [path for path in (registry / "blobs").rglob("*") if path.is_file()]


def test_published_capsule_is_fetched_byte_for_byte(registry: Registry) -> None:
    """All four kinds of reference lead to the same bytes."""
    data = capsule()
    version = registry.publish(data)
    for reference in ("tower", "tower@live", "tower@1", f"sha256:{version.digest}"):
        assert registry.resolve(reference) == version
        assert registry.fetch(reference) == data


def test_version_holds_what_the_header_says(tmp_path: Path) -> None:
    """Base, rank, metadata, time and person are in the record."""
    database = Database(f"sqlite:///{tmp_path}/registry.db")
    database.prepare()
    moment = datetime(2026, 5, 4, 12, tzinfo=UTC)
    registry = Registry(database, MemoryObjects(), clock=lambda: moment)
    version = registry.publish(capsule(), by="ada")
    assert (version.scene, version.number, version.rank) == ("tower", 1, 2)
    assert (version.base, version.base_fingerprint) == ("nano", FINGERPRINT)
    assert (version.created, version.created_by, version.aliases) == (moment, "ada", ("live",))
    assert version.metadata["realfill.training"]["steps"] == 10
    assert version.reference == "tower@1"


def test_versions_count_up_and_live_follows(registry: Registry) -> None:
    """Each publish gives the next number of its own scene."""
    assert [registry.publish(capsule(seed=seed)).number for seed in range(3)] == [1, 2, 3]
    assert registry.publish(capsule(scene="bridge")).number == 1
    assert registry.resolve("tower").number == 3


def test_same_bytes_again_are_the_same_version(registry: Registry) -> None:
    """Publishing is idempotent: a repeated training job makes no second version."""
    first = registry.publish(capsule())
    assert registry.publish(capsule()) == first
    assert registry.scene("tower").latest == 1


def test_same_bytes_again_may_move_the_alias(registry: Registry) -> None:
    """The alias of a repeated publish points to the version that was there."""
    registry.publish(capsule(seed=0))
    registry.publish(capsule(seed=1))
    assert registry.publish(capsule(seed=0), alias="candidate").aliases == ("candidate",)
    assert registry.resolve("tower").number == 2


def test_same_bytes_in_two_scenes_share_one_blob(registry: Registry, tmp_path: Path) -> None:
    """The digest names the older of the two versions."""
    registry.publish(capsule())
    other = registry.publish(capsule(), scene="bridge")
    assert (other.scene, other.number) == ("bridge", 1)
    assert registry.resolve(f"sha256:{other.digest}").scene == "tower"
    assert len(blob_files(tmp_path / "registry")) == 1


def test_publishing_without_alias_moves_none(registry: Registry) -> None:
    """A version can be there without being served."""
    assert registry.publish(capsule(), alias=None).aliases == ()
    with pytest.raises(NotFound, match="'tower' has no alias 'live'; its aliases: none"):
        registry.resolve("tower")


def test_invalid_capsule_stores_nothing(registry: Registry, tmp_path: Path) -> None:
    """A torn upload leaves neither bytes nor rows."""
    with pytest.raises(InvalidUpload):
        registry.publish(capsule()[:-1])
    assert registry.scenes() == []
    assert not (tmp_path / "registry" / "blobs").exists()


def test_capsule_with_an_impossible_name_is_published_under_another(registry: Registry) -> None:
    """It is refused under its own, with the remedy, and verified and sent on under the other."""
    data = capsule(scene="Old Tower")
    with pytest.raises(InvalidUpload, match=r"'Old Tower' is not allowed.*--scene"):
        registry.publish(data)
    assert registry.publish(data, scene="old-tower").metadata["realfill.scene"] == "Old Tower"
    assert registry.fetch("old-tower@live") == data
    assert list(registry.verify()) == []


@pytest.mark.parametrize(("scene", "alias"), [("Old Tower", "live"), ("tower", "3"), ("a/b", "x")])
def test_bad_names_store_nothing(
    registry: Registry, tmp_path: Path, scene: str, alias: str
) -> None:
    """Names are checked before any byte is stored."""
    with pytest.raises(InvalidReference):
        registry.publish(capsule(), scene=scene, alias=alias)
    assert not (tmp_path / "registry" / "blobs").exists()


def test_unknown_references_say_what_there_is(registry: Registry) -> None:
    """The message of a miss leads to the right name."""
    registry.publish(capsule())
    with pytest.raises(NotFound, match="no scene 'bridge'"):
        registry.resolve("bridge")
    with pytest.raises(NotFound, match=r"no alias 'candidate'; its aliases: live \(1\)"):
        registry.resolve("tower@candidate")
    with pytest.raises(NotFound, match="no version 7; its latest is 1"):
        registry.resolve("tower@7")
    with pytest.raises(NotFound, match="No version has the digest"):
        registry.resolve(f"sha256:{'0' * 64}")
    for call in (registry.scene, registry.versions, registry.history, registry.rollback):
        with pytest.raises(NotFound, match="no scene 'bridge'"):
            call("bridge")


def test_full_store_publishes_nothing(tmp_path: Path) -> None:
    """When the bytes find no room, no row is written."""
    database = Database(f"sqlite:///{tmp_path}/registry.db")
    database.prepare()
    registry = Registry(database, FullObjects())
    with pytest.raises(StorageUnavailable, match="disk is full"):
        registry.publish(capsule())
    assert registry.scenes() == []


FULL_DISK = """
import resource, sys
from registry import Registry, StorageUnavailable
from tests.registry.capsules import capsule
registry = Registry.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    registry.publish(capsule(seed=2, prompt="x" * 500_000))
except StorageUnavailable as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("limit_bytes", "part"), [(200_000, "blobs/sha256"), (520_000, "database")]
)
def test_full_disk_leaves_the_registry_as_it_was(
    registry: Registry, tmp_path: Path, limit_bytes: int, part: str
) -> None:
    """The system refuses to let the blob, or the database after it, grow: nothing is visible."""
    before = registry.publish(capsule())
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "registry"), str(limit_bytes)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    assert part in done.stdout
    assert "nothing was changed" in done.stdout
    assert registry.versions("tower") == [before]
    assert registry.resolve("tower") == before
    assert registry.verify() == []
    assert registry.publish(capsule(seed=2, prompt="x" * 500_000)).number == 2


def test_failure_in_the_transaction_leaves_every_table_as_it_was(
    registry: Registry, tmp_path: Path
) -> None:
    """Version, alias, history, audit and outbox come together or not at all."""
    registry.publish(capsule())
    database = Database(f"sqlite:///{tmp_path}/registry/registry.db")

    def rows() -> dict[str, object]:
        with database.reading() as connection:
            return {
                name: connection.execute(select(table)).all()
                for name, table in metadata.tables.items()
            }

    with database.writing() as connection:
        connection.execute(
            text(
                "CREATE TRIGGER full BEFORE INSERT ON outbox WHEN NEW.event = 'alias.moved' "
                "BEGIN SELECT RAISE(ABORT, 'no room'); END"
            )
        )
    before = rows()
    for change in (
        lambda: registry.publish(capsule(seed=1)),
        lambda: registry.publish(capsule(scene="bridge", seed=3)),
        lambda: registry.set_alias("tower", "candidate", 1),
    ):
        with pytest.raises(StorageUnavailable, match="no room"):
            change()
        assert rows() == before


def test_every_change_is_audited_and_announced(registry: Registry, tmp_path: Path) -> None:
    """One audit row and one outbox row for each thing that changed, none for what did not."""
    registry.publish(capsule(seed=0), by="ada")
    registry.publish(capsule(seed=0), by="ada")
    registry.publish(capsule(seed=1), by="bob", alias=None)
    registry.retire("tower", 2, by="cleo")
    registry.retire("tower", 2, by="cleo")
    registry.restore("tower", 2, by="dan")
    database = Database(f"sqlite:///{tmp_path}/registry/registry.db")
    audit, outbox = metadata.tables["audit"], metadata.tables["outbox"]
    with database.reading() as connection:
        rows = connection.execute(select(audit.c.action, audit.c.by).order_by(audit.c.id)).all()
        bodies = connection.execute(select(outbox.c.body).order_by(outbox.c.id)).scalars().all()
    assert rows == [
        ("version.published", "ada"),
        ("alias.moved", "ada"),
        ("version.published", "bob"),
        ("version.retired", "cleo"),
        ("version.restored", "dan"),
    ]
    assert [(body["event"], body["by"]) for body in bodies] == rows
    assert bodies[1] | {"at": ""} == {
        "event": "alias.moved", "at": "", "by": "ada", "scene": "tower", "alias": "live",
        "number": 1, "action": "publish",
    }  # fmt: skip


def test_flipped_byte_is_never_served(registry: Registry, tmp_path: Path) -> None:
    """The bytes are checked on every read, and the message names them."""
    version = registry.publish(capsule())
    (blob,) = blob_files(tmp_path / "registry")
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(CorruptObject, match=f"sha256:{version.digest} were altered"):
        registry.fetch("tower")


def test_retired_version_is_hidden_but_kept(registry: Registry) -> None:
    """Lists and names pass it over; its digest still leads to its bytes."""
    data = capsule(seed=0)
    digest = registry.publish(data).digest
    registry.publish(capsule(seed=1))
    assert registry.retire("tower", 1).retired is not None
    assert [version.number for version in registry.versions("tower")] == [2]
    assert [version.number for version in registry.versions("tower", retired=True)] == [2, 1]
    assert registry.scene("tower").versions == 1
    with pytest.raises(NotFound, match=r"tower@1 is retired.*registry restore tower@1"):
        registry.resolve("tower@1")
    with pytest.raises(NotFound, match="tower@1 is retired"):
        registry.set_alias("tower", "live", 1)
    assert registry.fetch(f"sha256:{digest}") == data


def test_version_with_an_alias_is_not_retired(registry: Registry) -> None:
    """What is served cannot vanish; the message names the aliases."""
    registry.publish(capsule())
    registry.set_alias("tower", "candidate", 1)
    with pytest.raises(Conflict, match="aliases point to it: candidate, live"):
        registry.retire("tower", 1)


def test_restored_version_is_back(registry: Registry) -> None:
    """Retiring can be undone."""
    registry.publish(capsule(), alias=None)
    registry.retire("tower", 1)
    assert registry.restore("tower", 1).retired is None
    assert registry.resolve("tower@1").number == 1


def test_publishing_retired_bytes_is_refused(registry: Registry) -> None:
    """A repeated job does not bring back what someone withdrew, nor make it live."""
    registry.publish(capsule(), alias=None)
    registry.retire("tower", 1)
    with pytest.raises(AlreadyExists, match="registry restore tower@1"):
        registry.publish(capsule())


def test_numbers_of_retired_versions_are_not_used_again(registry: Registry) -> None:
    """A number means one version for ever."""
    registry.publish(capsule(seed=0), alias=None)
    registry.retire("tower", 1)
    assert registry.publish(capsule(seed=1)).number == 2


def test_pages_of_versions_meet(registry: Registry) -> None:
    """Turning pages by number shows every version once, newest first."""
    for seed in range(7):
        registry.publish(capsule(seed=seed))
    seen: list[int] = []
    before = None
    while page := registry.versions("tower", before=before, limit=3):
        seen += [version.number for version in page]
        before = seen[-1]
    assert seen == [7, 6, 5, 4, 3, 2, 1]


def test_pages_of_scenes_meet(registry: Registry) -> None:
    """Turning pages by name shows every scene once, with its aliases."""
    for name in ("c", "a", "b"):
        registry.publish(capsule(scene=name))
    first = registry.scenes(limit=2)
    rest = registry.scenes(after=first[-1].name, limit=2)
    assert [scene.name for scene in first + rest] == ["a", "b", "c"]
    assert rest[0].aliases == {"live": 1}


def test_directory_that_holds_no_registry_is_not_created_by_reading(tmp_path: Path) -> None:
    """A typing error in the address makes no empty registry."""
    with pytest.raises(NotFound, match="There is no registry at"):
        Registry.open(tmp_path / "typo", create=False)
    assert not (tmp_path / "typo").exists()


def test_default_place_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """REALFILL_REGISTRY and REALFILL_REGISTRY_DATABASE name the place; else it is here."""
    Registry.open().publish(capsule(seed=0))
    assert (tmp_path / "realfill-registry" / "registry.db").is_file()
    monkeypatch.setenv("REALFILL_REGISTRY", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("REALFILL_REGISTRY_DATABASE", f"sqlite:///{tmp_path}/rows.db")
    Registry.open().publish(capsule(seed=1))
    assert (tmp_path / "rows.db").is_file()
    assert len(blob_files(tmp_path / "elsewhere")) == 1


def test_path_with_odd_characters_works(tmp_path: Path) -> None:
    """Percent signs, question marks and spaces are part of a directory's name."""
    place = tmp_path / "100% of what? #1"
    Registry.open(place).publish(capsule())
    assert Registry.open(place).fetch("tower") == capsule()


def test_bucket_without_database_is_refused() -> None:
    """Only a directory can hold its own database."""
    with pytest.raises(StorageUnavailable, match="set REALFILL_REGISTRY_DATABASE"):
        Registry.open("s3://bucket")


def test_threads_share_one_registry(registry: Registry) -> None:
    """Readers and writers in sixteen threads see whole versions and lose none."""
    registry.publish(capsule(seed=0))

    def work(seed: int) -> int:
        number = registry.publish(capsule(seed=seed)).number
        assert len(registry.fetch("tower")) == len(capsule())
        return number

    with ThreadPoolExecutor(16) as pool:
        numbers = sorted(pool.map(work, range(1, 49)))
    assert numbers == list(range(2, 50))


@pytest.mark.parametrize("backend", ["sqlite+directory"], indirect=True)
def test_warm_resolve_takes_less_than_a_millisecond(registry: Registry) -> None:
    """The best of ten rounds counts, in processor time, so that a busy machine changes nothing."""
    registry.publish(capsule())
    rounds = []
    for _ in range(10):
        start = time.process_time()
        for _ in range(20):
            registry.resolve("tower")
        rounds.append((time.process_time() - start) / 20)
    assert min(rounds) < 1e-3


def test_registry_never_imports_torch_or_ours() -> None:
    """Importing every module of the registry brings in neither torch nor our other packages."""
    program = (
        "import pkgutil, sys, importlib, registry\n"
        "for module in pkgutil.iter_modules(registry.__path__, 'registry.'):\n"
        "    importlib.import_module(module.name)\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(names & {'torch', 'realfill', 'service', 'kernels', 'safetensors'}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
