"""Tests of the `registry` commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from registry.cli import cli
from registry.schema import REVISION
from tests.registry.capsules import capsule
from tests.registry.test_signing import write_keys


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
    late = run("rollback", "tower", "--expect", "1")
    assert (late.exit_code, "you expected version 1" in late.stderr) == (2, True)
    assert run_json("rollback", "tower", "--expect", "2")["number"] == 1
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
    assert run_json("upgrade") == {"revision": REVISION}


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
        (["deliver", "http://[::1/x"], "is no address"),
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


def test_search_conditions_find_versions(files: list[str]) -> None:
    """By tag, metric, text, rank, time and alias, over all scenes; pages go on."""
    run_json("publish", files[1], "--tag", "light=dusk", "--metric", "psnr=21.5", "--parent", "1")
    (found,) = run_json("list", "--tag", "light=dusk", "--metric", "psnr>=20", "--alias", "live")[
        "versions"
    ]
    assert (found["number"], found["parent"], found["tags"]) == (2, 1, {"light": "dusk"})
    assert run_json("list", "--tag", "light", "--since", "2100-01-01")["versions"] == []
    page = run_json("list", "--rank", "2", "--limit", "1")
    rest = run_json("list", "--rank", "2", "--limit", "1", "--after", page["after"])
    assert [page["versions"][0]["number"], rest["versions"][0]["number"]] == [2, 1]
    assert "There are more: --after" in run("list", "--text", "sks", "--limit", "1").output


def test_labels_guards_and_removal(files: list[str]) -> None:
    """Tag, protect, unprotect, sweep, erase."""
    labelled = run_json("tag", "tower@1", "light=dawn", "--metric", "psnr=20")
    assert (labelled["tags"], labelled["metrics"]["psnr"]) == ({"light": "dawn"}, 20.0)
    assert run_json("tag", "tower@1", "--remove", "light")["tags"] == {}
    assert run_json("protect", "tower")["protected"] is True
    done = run("publish", files[1])
    assert (done.exit_code, "is protected" in done.stderr) == (2, True)
    assert run_json("publish", files[1], "--override")["aliases"] == ["live"]
    assert run_json("unprotect", "tower") == {"scene": "tower", "alias": "live", "protected": False}
    run_json("retire", "tower@1")
    assert len(run_json("sweep", "--grace-days", "0", "--dry-run")["removed"]) == 1
    assert run("sweep").output.startswith("Marked 1, spared 0 and removed 0 capsules")
    assert run("erase", "tower", "--reason", "asked for").exit_code == 1
    assert len(run_json("erase", "tower", "--reason", "asked for", "--yes")["removed"]) == 2
    assert "was erased on" in run("show", "tower").stderr


@pytest.mark.parametrize(
    ("metric", "sentence"), [("psnr=abc", "is no number"), ("psnr=inf", "only finite numbers")]
)
def test_labels_are_set_together_or_not_at_all(
    files: list[str], metric: str, sentence: str
) -> None:
    """A metric that is refused takes the tags before it along."""
    done = run("tag", "tower@1", "light=dawn", "--metric", metric)
    assert (done.exit_code, sentence in done.stderr) == (2, True)
    assert run_json("show", "tower@1")["tags"] == {}


def test_scenes_travel(files: list[str], tmp_path: Path) -> None:
    """Export, import under another name, copy."""
    assert run_json("export", "out.tar")[0]["versions"] == 1
    assert run_json("import", "out.tar", "--as", "spire")[0]["scene"] == "spire"
    assert "2 scenes to other." in run("copy", "other").output
    assert [scene["name"] for scene in run_json("--registry", "other", "list")] == [
        "spire",
        "tower",
    ]
    done = run("copy", "s3://bucket")
    assert (done.exit_code, "--target-database" in done.stderr) == (2, True)


def test_copies_go_to_places_with_odd_characters(files: list[str], tmp_path: Path) -> None:
    """The path is not read as an address: rows and bytes lie in one folder."""
    for name in ("a?b", "a%20b", "c#d"):
        assert run_json("copy", name)[0]["versions"] == 1
        assert (tmp_path / name / "registry.db").is_file()
        assert run_json("--registry", name, "verify") == {"versions": 1, "faults": []}
    assert not (tmp_path / "a").exists()


def test_guarded_aliases_travel_by_override(files: list[str]) -> None:
    """Copying and importing ask for it, as promoting does."""
    run("copy", "other")
    run("--registry", "other", "protect", "tower")
    for change, words in (
        (["publish", files[1]], ["copy", "other"]),
        (["rollback", "tower"], ["--registry", "other", "import", "out"]),
    ):
        assert run(*change).exit_code == 0
        run("export", "out")
        done = run(*words)
        assert (done.exit_code, "is protected" in done.stderr) == (2, True)
        assert run_json(*words, "--override")[0]["moves"] == 1
        shutil.rmtree("out")


def test_watch_prints_events(files: list[str]) -> None:
    """A line each, or a JSON object each."""
    lines = run("watch", "--since", "0", "--once").output.splitlines()
    assert [line.split()[3] for line in lines] == ["version.published", "alias.moved"]
    printed = run("watch", "--since", "1", "--once", "--json").output.splitlines()
    assert [json.loads(line)["type"] for line in printed] == ["alias.moved"]
    assert run("watch", "--once").output == ""


def test_deliver_needs_a_secret_and_tells_of_failures(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens on the port: the events are kept for later."""
    url = "http://127.0.0.1:9/hook"
    assert "REALFILL_WEBHOOK_SECRET" in run("deliver", url, "--once").stderr
    monkeypatch.setenv("REALFILL_WEBHOOK_SECRET", "whsec_" + "QUJD" * 11)
    done = run("deliver", url, "--once", "--from-start")
    assert done.stderr == f"{url} is new: it gets events from the first event on.\n"
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert "version.published again at" in lines[0]
    assert run("deliver", url, "--once", "--again").stderr == "0 events will be sent again.\n"


def test_deliver_tells_how_far_each_endpoint_came(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that nobody listens at, one that is new, and none after they were forgotten."""
    monkeypatch.setenv("REALFILL_WEBHOOK_SECRET", "whsec_" + "QUJD" * 11)
    assert run("deliver", "--status").output.startswith("No endpoints yet")
    dead, new = "http://127.0.0.1:9/dead", "http://127.0.0.1:9/new"
    line = json.loads(
        run("deliver", dead, "--once", "--from-start", "--json").stdout.splitlines()[0]
    )
    failure = "ConnectError: [Errno 111] Connection refused"
    assert line == {"id": 1, "endpoint": dead, "failure": failure}
    assert "gets events from now on" in run("deliver", new, "--once").stderr
    zero = {"delivered": 0, "waiting": 0, "given_up": 0, "failure": None}
    first = zero | {"endpoint": dead, "waiting": 2, "failure": failure}
    assert run_json("deliver", "--status") == [first, zero | {"endpoint": new}]
    assert run_json("deliver", "--status", f"{dead}?token=x") == [first]
    assert "waiting" in run("deliver", "--status").output
    assert "no URL to forget" in run("deliver", "--forget").stderr
    assert run("deliver", "--forget", dead, new).output.endswith("waited for them.\n")
    assert run_json("deliver", "--status") == []
    assert "There is no endpoint" in run("deliver", "--forget", dead).stderr


def test_signatures_are_made_and_asked_for(files: list[str], tmp_path: Path) -> None:
    """Sign, verify and fetch under a policy."""
    private, public = write_keys(tmp_path, "ada")
    asked = ["--verify", "require", "--key", str(public)]
    assert "is not signed" in run("fetch", "tower", "out", *asked).stderr
    assert run("verify", *asked).exit_code == 1
    warned = run("fetch", "tower", "out", "--verify", "warn", "--key", str(public))
    assert (warned.exit_code, "Warning: The version tower@1" in warned.stderr) == (0, True)
    assert run_json("sign", "tower", "--key", str(private))["number"] == 1
    assert run("fetch", "tower", "out", *asked).exit_code == 0
    assert run("verify", *asked).exit_code == 0


def test_docs_list_every_command_and_option(root: Path) -> None:
    """docs/registry.md has a heading for each command and names each of its own options."""
    text = (root / "docs" / "registry.md").read_text()
    for name, command in cli.commands.items():
        assert f"\n### `registry {name}`\n" in text, name
        section = text.split(f"\n### `registry {name}`\n")[1].split("\n### ")[0]
        for option in command.params:
            if isinstance(option, click.Option) and option.name not in ("as_json", "by"):
                assert f"`{option.opts[0]}" in section, (name, option.opts[0])


def test_the_shell_completes_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/registry.md says, by click's own script."""
    words = {"_REGISTRY_COMPLETE": "bash_complete", "COMP_WORDS": "registry ro", "COMP_CWORD": "1"}
    done = CliRunner().invoke(cli, [], prog_name="registry", env=words)
    assert done.output == "plain,rollback\n"
