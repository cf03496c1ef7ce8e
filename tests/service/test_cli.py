"""The commands, where they refuse; test_process.py runs them whole."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from service.cli import _kill, complete, environment_of, serve
from service.client import Client
from service.errors import ServiceUnreachable
from service.settings import load_settings
from tests.fakes import encoded, hole, photo


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    image.write_bytes(encoded(photo()))
    mask.write_bytes(encoded(hole()))
    return [str(image), str(mask)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--host", "0.0.0.0"], "no authentication yet"),
        (["--port", "99999"], "REALFILL_PORT is 99999"),
        (["--registry", "/proc/none"], "/proc/none"),
    ],
)
def test_serve_refuses_bad_settings_in_one_sentence(options: list[str], sentence: str) -> None:
    """Exit status 2, before any process starts."""
    ended = CliRunner().invoke(serve, options)
    assert ended.exit_code == 2
    assert sentence in ended.output
    assert ended.output.startswith("Error: ")
    assert ended.output.count("\n") == 1


def test_serve_refuses_a_port_that_is_taken(tmp_path: Path) -> None:
    """By whatever it is, before any process starts."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = CliRunner().invoke(
            serve, ["--port", str(port), "--registry", str(tmp_path / "registry")]
        )
    assert ended.exit_code == 2
    assert ended.output == f"Error: Port {port} is in use: choose another with --port.\n"


def test_serve_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong here while it starts there."""
    started: list[int] = []

    def fail(client: Client, server: subprocess.Popen[bytes]) -> bool:
        started.append(server.pid)
        raise ServiceUnreachable("No answer.")

    monkeypatch.setattr("service.cli._wait_until_ready", fail)
    options = ["--port", "0", "--registry", str(tmp_path / "registry")]
    ended = CliRunner().invoke(serve, options)
    assert (ended.exit_code, ended.output) == (2, "Error: No answer.\n")
    with pytest.raises(ProcessLookupError):
        os.killpg(started[0], 0)


def test_a_supervisor_that_is_killed_takes_its_worker_along() -> None:
    """The worker has a session of its own, so that no signal to a group reaches it."""
    worker = "import time; print('here', flush=True); time.sleep(60)"
    supervisor = (
        "import subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {worker!r}], start_new_session=True)"
    )
    with subprocess.Popen([sys.executable, "-c", supervisor], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"here\n"
        began = time.monotonic()
        _kill(server)
        # Its end comes when nobody is left who might write.
        assert server.stdout.read() == b""
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("name", "given", "absolute"),
    [
        ("REGISTRY", "shop", "{}/shop"),
        ("REGISTRY", "file://shop", "{}/shop"),
        ("REGISTRY", "s3://bucket/shop", "s3://bucket/shop"),
        ("REGISTRY_DATABASE", "sqlite:///other.db", "sqlite:///{}/other.db"),
        (
            "REGISTRY_DATABASE",
            "sqlite+pysqlite:///o.db?timeout=9",
            "sqlite+pysqlite:///{}/o.db?timeout=9",
        ),
        ("REGISTRY_DATABASE", "sqlite:////srv/other.db", "sqlite:////srv/other.db"),
        ("REGISTRY_DATABASE", "sqlite:///:memory:", "sqlite:///:memory:"),
        ("REGISTRY_DATABASE", "postgresql:///other", "postgresql:///other"),
        (
            "REGISTRY_KEYS",
            os.pathsep.join(["a.pem", "/b.pem"]),
            os.pathsep.join(["{}/a.pem", "/b.pem"]),
        ),
        ("REGISTRY_CACHE", "near", "{}/near"),
        ("BASE", "here", "{}/here"),
        ("BASE", "owner/name", "owner/name"),
        ("MATCHER", "here", "{}/here"),
        ("MATCHER", "torch:here", "torch:{}/here"),
        ("MATCHER", "onnx:outdoor", "onnx:outdoor"),
        ("MATCHER", "efficientloftr:here", "efficientloftr:{}/here"),
        ("EFFICIENTLOFTR", "here", "{}/here"),
    ],
)
def test_relative_paths_mean_the_folder_of_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, given: str, absolute: str
) -> None:
    """The service runs in another."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setenv(f"REALFILL_{name}", given)
    assert environment_of(load_settings())[f"REALFILL_{name}"] == absolute.format(tmp_path)


def test_a_folder_with_the_name_of_a_base_is_not_the_base(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`nano` stays what it is, whatever lies beside."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    found = environment_of(load_settings(base="nano", matcher="torch:nano"))
    assert (found["REALFILL_BASE"], found["REALFILL_MATCHER"]) == ("nano", "torch:nano")


def test_complete_without_a_service_says_how_to_start_one(pictures: list[str]) -> None:
    """Port 1 of this machine has no listener."""
    ended = CliRunner().invoke(complete, ["tower", *pictures, "--url", "http://127.0.0.1:1"])
    assert ended.exit_code == 2
    assert "start it with `realfill serve`" in ended.output


def test_complete_waits_as_long_as_it_is_told_to(pictures: list[str]) -> None:
    """Here a second for one that never answers; how to wait longer is said."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        ended = CliRunner().invoke(complete, ["tower", *pictures, "--url", url, "--timeout", "1"])
    assert ended.exit_code == 2
    assert "gave no answer within 1 s: wait longer with --timeout" in ended.output


@pytest.mark.parametrize("out", ["nowhere/best.png", "image.png/best.png"])
def test_complete_refuses_a_place_that_cannot_be_written(
    pictures: list[str], tmp_path: Path, out: str
) -> None:
    """Before anything is asked of a service: there is none here."""
    place = tmp_path / out
    ended = CliRunner().invoke(
        complete, ["tower", *pictures, "--out", str(place), "--url", "http://127.0.0.1:1"]
    )
    assert ended.exit_code == 2
    assert f"{place} cannot be written" in ended.output


def test_complete_refuses_a_name_without_a_known_ending(pictures: list[str]) -> None:
    """Before anything is sampled."""
    ended = CliRunner().invoke(complete, ["tower", *pictures, "--out", "best.gif"])
    assert ended.exit_code == 2
    assert "--out is best.gif" in ended.output
