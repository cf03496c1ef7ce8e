"""The whole thing: the command starts the real server process, which answers and ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from service.cli import complete
from service.client import Client, image_of
from service.errors import RequestRefused
from tests.fakes import decoded, encoded, hole, photo
from tests.tiny import save_tiny_base, tiny_base, tiny_capsule

STARTED_WITHIN_S = 150.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Read by every Python on whose path it lies: ends the thread of the lane as soon as told to.
SPOILER = """
import ctypes, pathlib, threading, time

def spoil():
    while not pathlib.Path(__file__).with_name("now").exists():
        time.sleep(0.02)
    for thread in threading.enumerate():
        if thread.name == "lane":
            end = ctypes.py_object(SystemExit)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), end)

threading.Thread(target=spoil, daemon=True).start()
"""


def _start(folder: Path, base: Path, port: int, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from service.cli import serve; serve()"]
    command += ["--registry", str(folder / "registry"), "--base", str(base), "--matcher", "none"]
    environment = {**os.environ, "REALFILL_STEPS": "2", "REALFILL_CANDIDATES": "2", **variables}
    log = (folder / "log").open("w")
    with log:
        return subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )


def _supervisor(command: subprocess.Popen[str]) -> int | None:
    """The process that the command has started, once it runs BentoML."""
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    named = (pid for pid in children if b"bentoml" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return next(map(int, named), None)


def _end(server: subprocess.Popen[str]) -> int:
    server.send_signal(signal.SIGINT)
    try:
        return server.wait(30)
    except subprocess.TimeoutExpired:
        # A second request does not wait, and takes the supervisor and its worker along.
        server.send_signal(signal.SIGINT)
        server.wait(30)
        raise


@contextmanager
def _serving(folder: Path, **variables: str) -> Iterator[Client]:
    port = _free_port()
    server = _start(folder, save_tiny_base(folder / "base"), port, **variables)
    ended = None
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            until = time.monotonic() + STARTED_WITHIN_S
            while not client.ready():
                said = (folder / "log").read_text()
                assert server.poll() is None, said
                assert time.monotonic() < until, said
                time.sleep(0.2)
            yield client
    finally:
        ended = _end(server)
    # Ctrl-C is how it is meant to end.
    assert ended == 0


def _complete_on_and_on(client: Client) -> None:
    for _ in range(100):
        client.complete("tower", encoded(photo()), encoded(hole()), candidates=1)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Client]]:
    folder = tmp_path_factory.mktemp("service")
    with _serving(folder) as client:
        yield folder, client


@pytest.mark.timeout(240)
def test_each_scene_is_answered_with_its_own_adapter(service: tuple[Path, Client]) -> None:
    """Two scenes in turn on one base: each answer is its own, every time, byte for byte."""
    _, client = service
    base = tiny_base()
    published = {
        name: client.publish(name, tiny_capsule(base, name, seed)).digest
        for seed, name in enumerate(("tower", "bridge"))
    }
    answers: dict[str, list[bytes]] = {name: [] for name in published}
    for name in ("tower", "bridge", "tower", "bridge"):
        answer = client.complete(name, encoded(photo()), encoded(hole()), seed=3, candidates=1)
        assert (answer.scene, answer.digest) == (name, published[name])
        answers[name].append(image_of(answer.candidates[0].image))
    assert answers["tower"][0] == answers["tower"][1]
    assert answers["bridge"][0] == answers["bridge"][1]
    assert answers["tower"][0] != answers["bridge"][0]
    known = hole() == 0
    known[4:36, 8:40] = False
    for filled, *_ in answers.values():
        assert np.array_equal(decoded(filled)[known], photo()[known])


@pytest.mark.timeout(240)
def test_the_command_completes_and_prints_the_evidence(
    service: tuple[Path, Client], tmp_path: Path
) -> None:
    """`complete` writes the best candidate and, on request, JSON for programs."""
    _, client = service
    client.publish("cli", tiny_capsule(tiny_base(), "cli", 7))
    image, mask, out = (tmp_path / name for name in ("image.png", "mask.png", "best.webp"))
    image.write_bytes(encoded(photo()))
    mask.write_bytes(encoded(hole()))
    ended = CliRunner().invoke(
        complete,
        ["cli", str(image), str(mask), "--out", str(out), "--json", "--url", client.url],
    )
    assert ended.exit_code == 0, ended.output
    evidence = json.loads(ended.output)
    assert (evidence["scene"], evidence["version"], evidence["format"]) == ("cli", 1, "webp")
    assert decoded(out.read_bytes()).shape == (40, 48, 3)


@pytest.mark.timeout(240)
def test_our_routes_win_over_the_shells(service: tuple[Path, Client]) -> None:
    """Errors of unknown routes and our metrics come through BentoML's mount; logs reach stderr."""
    import httpx

    folder, client = service
    lost = httpx.get(f"{client.url}/nope", headers={"X-Request-Id": "lost-1"})
    assert lost.status_code == 404
    assert lost.json()["error"]["code"] == "route_not_found"
    assert httpx.get(f"{client.url}/healthz").status_code == 200
    assert 'route="unmatched",status="404"' in httpx.get(f"{client.url}/metrics").text
    lines = [line for line in (folder / "log").read_text().splitlines() if "lost-1" in line]
    assert json.loads(lines[0])["status"] == 404


@pytest.mark.timeout(240)
def test_a_lane_that_ended_is_told_by_every_probe(tmp_path: Path) -> None:
    """By /healthz as well, which is BentoML's; by ours in our shape, before and after."""
    import httpx

    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    (tmp_path / "sitecustomize.py").write_text(SPOILER)
    with _serving(tmp_path, PYTHONPATH=paths) as client:
        assert httpx.get(f"{client.url}/livez").json() == {"status": "alive"}
        assert httpx.get(f"{client.url}/readyz").json() == {"status": "ready"}
        client.publish("tower", tiny_capsule(tiny_base(), "tower", 1))
        (tmp_path / "now").touch()
        with pytest.raises(RequestRefused) as caught:
            _complete_on_and_on(client)
        assert (caught.value.status, caught.value.refusal) == (503, "engine_closed")
        for probe in ("/livez", "/readyz"):
            answer = httpx.get(f"{client.url}{probe}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_closed")
        assert httpx.get(f"{client.url}/healthz").status_code == 503


@pytest.mark.timeout(240)
def test_a_terminal_that_closes_ends_the_service(tmp_path: Path) -> None:
    """SIGHUP is sent to the command alone; what it started ends with it."""
    port = _free_port()
    command = _start(tmp_path, tmp_path / "nowhere", port)
    try:
        until = time.monotonic() + STARTED_WITHIN_S
        while (supervisor := _supervisor(command)) is None:
            assert time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.01)
        command.send_signal(signal.SIGHUP)
        assert command.wait(30) == 0
        with pytest.raises(ProcessLookupError):
            os.killpg(supervisor, 0)
    finally:
        if command.poll() is None:
            _end(command)


@pytest.mark.timeout(240)
def test_a_supervisor_that_is_killed_takes_the_service_along(tmp_path: Path) -> None:
    """As one is that takes too much memory: its worker does not go on, and gives the port back."""
    port = _free_port()
    command = _start(tmp_path, save_tiny_base(tmp_path / "base"), port)
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            until = time.monotonic() + STARTED_WITHIN_S
            while not client.ready():
                assert time.monotonic() < until, (tmp_path / "log").read_text()
                time.sleep(0.2)
            supervisor = _supervisor(command)
            assert supervisor is not None
            os.kill(supervisor, signal.SIGKILL)
            assert command.wait(30) == 2
            until = time.monotonic() + 30
            while client.ready():
                assert time.monotonic() < until
                time.sleep(0.1)
    finally:
        if command.poll() is None:
            _end(command)


@pytest.mark.timeout(240)
def test_a_missing_base_ends_the_service_with_one_sentence(tmp_path: Path) -> None:
    """It does not respawn workers for ever."""
    server = _start(tmp_path, tmp_path / "nowhere", 0)
    try:
        assert server.wait(STARTED_WITHIN_S) == 2
    finally:
        if server.poll() is None:
            _end(server)
    said = (tmp_path / "log").read_text()
    [sentence] = {line for line in said.splitlines() if line.startswith("Error: ")}
    assert "nowhere" in sentence
    assert "Traceback" not in said
