"""Tests of `Registry.verify`: whatever was altered behind its back is named."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from registry import CorruptObject, Registry
from registry.records import Fault
from tests.registry.capsules import capsule


@pytest.fixture
def filled(registry: Registry) -> Registry:
    """Three versions of tower, one of them retired, and one of bridge."""
    for seed in range(3):
        registry.publish(capsule(seed=seed))
    registry.retire("tower", 1)
    registry.publish(capsule(scene="bridge"))
    return registry


def edit(tmp_path: Path, statement: str) -> None:
    """Change the database by hand, foreign keys off."""
    connection = sqlite3.connect(tmp_path / "registry" / "registry.db")
    with connection:
        connection.execute(statement)
    connection.close()


def found(registry: Registry) -> list[tuple[str, str]]:
    """Code and thing of every fault."""
    return [(fault.code, fault.thing) for fault in registry.verify()]


def test_sound_registry_has_no_faults(filled: Registry) -> None:
    """Every version is read, retired ones too."""
    seen: list[str] = []
    assert filled.verify(lambda version: seen.append(version.reference)) == []
    assert seen == ["bridge@1", "tower@3", "tower@2", "tower@1"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "swap"])
def test_damaged_blob_is_named(filled: Registry, tmp_path: Path, damage: str) -> None:
    """A flipped byte, a short file, a missing and a swapped one are each found."""
    blobs = tmp_path / "registry" / "blobs" / "sha256"
    digest = filled.resolve("tower@2").digest
    file = blobs / digest[:2] / digest
    data = file.read_bytes()
    match damage:
        case "flip":
            file.write_bytes(data[:-5] + bytes([data[-5] ^ 4]) + data[-4:])
        case "truncate":
            file.write_bytes(data[: len(data) // 2])
        case "remove":
            file.unlink()
        case "swap":
            file.write_bytes(filled.fetch("tower@3"))
    assert found(filled) == [("corrupt_object", "tower@2")]


@pytest.mark.parametrize(
    "change",
    ["base = 'sd2'", f"base_fingerprint = '{'0' * 64}'", "rank = 8", "metadata = '{}'"],
)
def test_edited_row_is_named(filled: Registry, tmp_path: Path, change: str) -> None:
    """A row that says other things than its capsule is found, and the column named."""
    edit(tmp_path, f"UPDATE versions SET {change} WHERE number = 3")
    (fault,) = filled.verify()
    assert (fault.code, fault.thing) == ("altered_row", "tower@3")
    assert change.partition(" ")[0] in fault.message


def test_edited_digest_is_named(filled: Registry, tmp_path: Path) -> None:
    """A digest that no blob has is a corrupt object, listed all the same."""
    edit(tmp_path, f"UPDATE versions SET digest = '{'0' * 64}' WHERE number = 3")
    assert found(filled) == [("corrupt_object", "tower@3")]
    assert len(filled.versions("tower")) == 2


def test_edited_counter_is_named(filled: Registry, tmp_path: Path) -> None:
    """A counter below the highest number would give a number twice."""
    edit(tmp_path, "UPDATE scenes SET last_number = 1 WHERE name = 'tower'")
    assert found(filled) == [("altered_row", "tower")]


def test_edited_alias_is_named(filled: Registry, tmp_path: Path) -> None:
    """An alias that points elsewhere than its last move went is found, and not followed."""
    edit(tmp_path, "UPDATE aliases SET number = 2 WHERE number = 3")
    assert found(filled) == [("altered_row", "tower@live")]
    with pytest.raises(CorruptObject, match="points to version 2 and its last move went to 3"):
        filled.resolve("tower")


def test_alias_to_no_version_is_named(filled: Registry, tmp_path: Path) -> None:
    """An alias whose version is gone is found."""
    edit(tmp_path, "UPDATE aliases SET number = 9 WHERE number = 3")
    assert found(filled) == [("dangling_alias", "tower@live")]


def test_fault_has_a_remedy(filled: Registry, tmp_path: Path) -> None:
    """The message says what to do."""
    edit(tmp_path, "UPDATE versions SET rank = 8 WHERE number = 3")
    assert filled.verify() == [
        Fault(
            "altered_row",
            "tower@3",
            "The database's row of tower@3 differs from its capsule in rank: it was edited. "
            "Restore the database from a backup.",
        )
    ]
