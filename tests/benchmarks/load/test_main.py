"""The two commands, against real servers: one that runs already and one that is started."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.load import __main__, local
from tests.benchmarks.load.serving import Seen, served

SERVE = f"{shlex.quote(sys.executable)} -m tests.benchmarks.load.serving"


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A folder as the demo leaves it."""
    for scene in ("bridge", "tower"):
        folder = tmp_path / "demo-out" / scene / "target"
        folder.mkdir(parents=True)
        (folder / "target.png").write_bytes(b"target")
        (folder / "mask.png").write_bytes(b"mask")
    (tmp_path / "demo-out" / "registry").mkdir()
    return tmp_path / "demo-out"


def test_command_writes_report_and_samples(demo: Path, tmp_path: Path) -> None:
    """A run of one second against a running server leaves both files and a table."""
    seen = Seen()
    scene = f"tower={demo}/tower/target/target.png,{demo}/tower/target/mask.png"
    with served(seen) as url:
        outcome = CliRunner().invoke(
            __main__.main,
            ["--url", url, "--rate", "30", "--duration", "1", "--scene", scene]
            + ["--field", "steps=4", "--seed", "1", "--out", str(tmp_path / "out")],
        )
    assert outcome.exit_code == 0, outcome.output
    assert "goodput within 3 s" in outcome.output
    summary = json.loads((tmp_path / "out/report.json").read_text())
    assert summary["outcomes"]["ok"] == summary["requests"] == len(seen.requests) - 1
    assert summary["conditions"]["payload_bytes"] == {"tower": 10}
    assert seen.requests[0]["steps"] == "4"


def test_command_refuses_another_machine(demo: Path) -> None:
    """Without --allow-remote the command ends with status 2 and one sentence with the remedy."""
    scene = f"tower={demo}/tower/target/target.png,{demo}/tower/target/mask.png"
    outcome = CliRunner().invoke(
        __main__.main, ["--url", "http://192.0.2.1:3000", "--rate", "1", "--scene", scene]
    )
    assert outcome.exit_code == 2
    assert "--allow-remote" in outcome.output


@pytest.mark.parametrize(
    ("scene", "message"),
    [("tower", "name=target.png,mask.png"), ("tower=a.png,b.png", "there is no file a.png")],
)
def test_command_explains_a_wrong_scene(scene: str, message: str) -> None:
    """The scene's form and its missing file are named."""
    outcome = CliRunner().invoke(
        __main__.main, ["--url", "http://127.0.0.1:1", "--rate", "1", "--scene", scene]
    )
    assert outcome.exit_code == 2
    assert message in outcome.output


def local_run(demo: Path, serve: str, *words: str) -> tuple[int, str]:
    out = demo.parent / "out"
    outcome = CliRunner().invoke(
        local.main,
        ["--demo", str(demo), "--serve-command", serve, "--rate", "20", "--duration", "1"]
        + ["--out", str(out), "--start-timeout", "60", *words],
    )
    return outcome.exit_code, outcome.output


def test_local_run_starts_and_stops_its_own_server(demo: Path) -> None:
    """The server is a process of its own, driven over both scenes and gone afterwards."""
    status, output = local_run(demo, SERVE)
    assert status == 0, output
    summary = json.loads((demo.parent / "out/report.json").read_text())
    assert summary["requests"] == summary["outcomes"]["ok"] > 5
    assert summary["conditions"]["scenes"] == ["bridge", "tower"]
    assert summary["conditions"]["fields"] == {"candidates": "1"}
    log = (demo.parent / "out/server.log").read_text()
    assert "Application shutdown complete" in log


def test_local_run_makes_the_demo_first_if_it_is_absent(demo: Path, tmp_path: Path) -> None:
    """An absent folder is made by the demo's command before the server starts."""
    kept = tmp_path / "kept"
    demo.rename(kept)
    move = f"mv {shlex.quote(str(kept))} {shlex.quote(str(demo))}"
    status, output = local_run(demo, SERVE, "--demo-command", move)
    assert status == 0, output
    assert "is absent: running mv" in output


def test_local_run_names_the_log_of_a_server_that_ends(demo: Path) -> None:
    """A server that cannot start is one sentence that points at its log."""
    status, output = local_run(demo, "false")
    assert status == 1
    assert "ended with status 1 before it was ready; see" in output
    assert "server.log" in output


def test_local_run_names_a_folder_without_scenes(demo: Path) -> None:
    """A torn demo folder is told with its remedy."""
    (demo / "bridge/target/mask.png").unlink()
    (demo / "tower/target/mask.png").unlink()
    status, output = local_run(demo, SERVE)
    assert status == 1
    assert "run the demo again" in output
