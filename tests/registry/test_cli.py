"""Tests of the `registry` commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from registry.cli import cli
from tests.registry.capsules import capsule


def run(*words: str) -> Result:
    """One command; errors other than click's own are not swallowed."""
    return CliRunner().invoke(cli, list(words), catch_exceptions=False)


def run_json(*words: str) -> Any:
    """What a command prints with `--json`."""
    done = run(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture
def files(empty_registry: Path, tmp_path: Path) -> list[str]:
    """Two capsules of tower, the first published."""
    shutil.copytree(empty_registry, tmp_path / "realfill-registry")
    names = []
    for seed in range(2):
        file = tmp_path / f"{seed}.safetensors"
        file.write_bytes(capsule(seed=seed))
        names.append(str(file))
    run("publish", names[0], "--by", "ada")
    return names


def test_publish_says_what_it_did(files: list[str]) -> None:
    """One line names the version, its digest and its aliases."""
    done = run("publish", files[1])
    assert done.exit_code == 0
    assert done.output.startswith("Published tower@2 (sha256:")
    assert done.output.endswith(", aliases: live).\n")


def test_round_of_all_commands(files: list[str], tmp_path: Path) -> None:
    """Publish, alias, promote, rollback, retire, restore, fetch, history, verify, upgrade."""
    assert run_json("publish", files[1], "--no-alias")["aliases"] == []
    assert run_json("alias", "tower", "candidate", "2")["aliases"] == ["candidate"]
    assert run_json("promote", "tower@candidate")["aliases"] == ["candidate", "live"]
    assert run_json("rollback", "tower")["number"] == 1
    assert run_json("alias", "tower", "candidate", "1", "--expect", "2")["number"] == 1
    assert run_json("retire", "tower@2")["retired"] is not None
    assert len(run_json("list", "tower", "--retired")) == 2
    assert run_json("restore", "tower@2")["retired"] is None
    assert run_json("fetch", "tower", str(tmp_path / "out"))["number"] == 1
    assert (tmp_path / "out").read_bytes() == capsule(seed=0)
    assert [move["action"] for move in run_json("history", "tower", "--alias", "live")] == [
        "publish",
        "promote",
        "rollback",
    ]
    assert run_json("verify") == {"versions": 2, "faults": []}
    assert run_json("upgrade") == {"revision": "0001"}


def test_lists_are_tables_for_people(files: list[str]) -> None:
    """Scenes with their aliases, versions with base, rank and person."""
    assert "live 1" in run("list").output
    output = run("list", "tower").output
    for part in ("tower@1", "nano", "ada"):
        assert part in output


def test_lists_are_json_for_programs(files: list[str]) -> None:
    """The fields are those of the records."""
    (scene,) = run_json("list")
    assert (scene["name"], scene["latest"], scene["aliases"]) == ("tower", 1, {"live": 1})
    (version,) = run_json("list", "tower")
    assert (version["number"], version["rank"], version["created_by"]) == (1, 2, "ada")


def test_show_tells_everything(files: list[str]) -> None:
    """Fields and metadata of one version."""
    output = run("show", "tower").output
    for part in ("base_fingerprint", "realfill.prompt", "a photo of sks", "RAIL++-M"):
        assert part in output
    assert run_json("show", "tower@1")["metadata"]["realfill.training"]["steps"] == 10


def test_empty_lists_say_what_to_do(files: list[str]) -> None:
    """An empty table is replaced by a sentence."""
    assert run("list", "--after", "zzz").output.startswith("No scenes yet")
    assert run("history", "tower", "--alias", "none").output.startswith("No alias")


def test_verify_exits_1_on_faults(files: list[str], tmp_path: Path) -> None:
    """A damaged blob is named on standard output."""
    for blob in (tmp_path / "realfill-registry" / "blobs").rglob("*"):
        if blob.is_file():
            blob.write_bytes(b"damaged")
    done = run("verify")
    assert done.exit_code == 1
    assert "tower@1: The stored bytes" in done.stdout
    assert "found 1 faults" in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["show", "bridge"], "There is no scene 'bridge' in the registry"),
        (["show", "Bad Name"], "The scene name 'Bad Name' is not allowed"),
        (["retire", "tower@1"], "cannot be retired while aliases point to it"),
        (["retire", "tower"], "write the number, as in tower@3"),
        (["alias", "tower", "live", "9"], "has no version 9"),
        (["alias", "tower", "live", "1", "--expect", "7"], "you expected version 7"),
        (["rollback", "tower"], "no earlier version"),
        (["fetch", "tower", "missing/directory/file"], "cannot be written"),
        (["--registry", "typo", "list"], "There is no registry at typo"),
        (["--registry", "s3://bucket", "list"], "set REALFILL_REGISTRY_DATABASE"),
        (["publish", "missing.safetensors"], "does not exist"),
        (["alias", "tower", "live", "none"], "is not a valid integer"),
    ],
)
def test_error_is_one_sentence_and_status_2(
    files: list[str], words: list[str], sentence: str
) -> None:
    """Mistakes give exit status 2 and a remedy on standard error, no traceback."""
    done = run(*words)
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_publishing_a_picture_is_refused(tmp_path: Path) -> None:
    """A file that is no capsule gives one sentence, and no version."""
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))
    done = run("publish", "photo.png")
    assert done.exit_code == 2
    assert "This is no capsule" in done.stderr
    assert run_json("list") == []


def test_first_publish_creates_the_registry(tmp_path: Path) -> None:
    """Nothing has to be set up before."""
    (tmp_path / "tower.safetensors").write_bytes(capsule())
    assert run_json("publish", "tower.safetensors")["number"] == 1
    assert (tmp_path / "realfill-registry" / "registry.db").is_file()


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help_and_json(name: str) -> None:
    """Each command explains itself and can answer with JSON."""
    output = run(name, "--help").output
    assert "--json" in output
    assert cli.commands[name].help


def test_help_teaches_references() -> None:
    """The group's help shows each form of a reference and a first round."""
    output = run("--help").output
    for part in ("tower@candidate", "tower@3", "sha256:", "registry publish", "REALFILL_REGISTRY"):
        assert part in output
