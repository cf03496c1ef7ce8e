"""A publisher is killed at every step; the registry must look as if it had never come, or was done.

A step is a line of the registry's own code between the check of the capsule and the answer. Each
publisher is a fork of a process that has imported everything and opened nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from sqlalchemy import func, select

import registry as package
from registry import NotFound, Registry
from registry.schema import audit, outbox
from tests.registry.capsules import capsule
from tests.registry.conftest import PLAIN, Backend

SOURCES = str(Path(package.__file__).parent)
# Reading the capsule comes before anything is stored, and loops over its tensors.
PASSED_OVER = f"{SOURCES}/upload.py"
ENVIRONMENT = ("AWS_", "REALFILL_")


class Steps:
    """A tracer that counts lines of the registry, and kills its own process at one of them."""

    def __init__(self, fatal: int) -> None:
        self.fatal = fatal
        self.count = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Called by Python at each call and at each line."""
        name = frame.f_code.co_filename
        if not name.startswith(SOURCES) or name == PASSED_OVER:
            return None
        if event == "line":
            self.take()
        return self

    def take(self) -> None:
        """One step more, perhaps the last."""
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def publish(
    place: str, database: str | None, environment: dict[str, str], scene: str, fatal: int
) -> None:
    """Publish in a process of its own, and die at the fatal step; write the count at the end."""
    os.environ.update(environment)
    registry = Registry.open(place, database=database)
    steps = Steps(fatal)
    if fatal >= 0:
        sys.settrace(steps)
    registry.publish(capsule(scene), tags={"site": "north"}, by="ada")
    sys.settrace(None)
    # The transaction has ended, and nobody was told.
    steps.take()
    Path(f"{scene}.steps").write_text(str(steps.count))


def start(
    context: ForkServerContext,
    backend: Backend,
    scene: str,
    fatal: int,
    after_s: float | None = None,
) -> ForkServerProcess:
    """Start a publisher, kill it after a while if so told, and wait for its end."""
    given = {name: text for name, text in os.environ.items() if name.startswith(ENVIRONMENT)}
    arguments = (Path.cwd(), backend.place, backend.database, given, scene, fatal)
    process = context.Process(target=publish_there, args=arguments)
    process.start()
    if after_s is not None:
        process.join(after_s)
        process.kill()
    process.join(120)
    return process


def publish_there(folder: Path, *arguments: Any) -> None:
    """Publish from the test's folder."""
    os.chdir(folder)
    publish(*arguments)


def is_whole(registry: Registry, scene: str) -> bool:
    """Whether the version is there with all that belongs to it; else nothing of it may be."""
    rows = {}
    with registry.database.reading() as connection:
        for table, of_scene in (
            (audit, audit.c.scene == scene),
            (outbox, outbox.c.body["scene"].as_string() == scene),
        ):
            count = select(func.count()).select_from(table).where(of_scene)
            rows[table.name] = connection.execute(count).scalar_one()
    try:
        version = registry.resolve(scene)
    except NotFound:
        with pytest.raises(NotFound, match="There is no scene"):
            registry.scene(scene)
        assert rows == {"audit": 0, "outbox": 0}
        return False
    assert (version.number, version.aliases, version.tags) == (1, ("live",), {"site": "north"})
    assert registry.fetch(scene) == capsule(scene)
    assert len(registry.history(scene)) == 1
    # Published, tagged, and the alias moved.
    assert rows == {"audit": 3, "outbox": 3}
    return True


class Harness:
    """Kills publishers of one registry, one scene each, and looks at what they leave."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.registry = backend.open()
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.registry.test_crash"])
        assert start(self.context, backend, "whole", 0).exitcode == 0
        self.steps = int(Path("whole.steps").read_text())
        self.done = {False: 0, True: 0}

    def kill_at(self, step: int) -> None:
        """Kill a publisher at a step."""
        process = start(self.context, self.backend, f"step-{step}", step)
        assert process.exitcode == -signal.SIGKILL
        self.look(f"step-{step}")

    def kill_after(self, after_s: float, scene: str) -> None:
        """Kill a publisher at any moment, in the middle of a line too."""
        start(self.context, self.backend, scene, -1, after_s)
        self.look(scene)

    def look(self, scene: str) -> None:
        """All is there or nothing, and the next publisher succeeds."""
        self.done[is_whole(self.registry, scene)] += 1
        data = capsule(scene)
        assert self.registry.publish(data, tags={"site": "north"}, by="ada").number == 1
        assert is_whole(self.registry, scene)

    def close(self, report: Callable[[str], None]) -> None:
        """Look at everything once more, before and after a sweep."""
        assert self.registry.verify() == []
        self.registry.sweep(grace=timedelta(0))
        assert self.registry.verify() == []
        self.registry.close()
        done = f"{self.done[True]} whole and {self.done[False]} absent afterwards"
        report(f"\n{self.backend.name}: {sum(self.done.values())} publishers killed, {done}")


@pytest.mark.parametrize("backend", [PLAIN], indirect=True)
def test_publisher_killed_now_and_then_leaves_nothing_or_all(
    backend: Backend, report: Callable[[str], None]
) -> None:
    """A few steps from the first to the last, every time."""
    harness = Harness(backend)
    for step in (1, harness.steps // 3, harness.steps // 2, harness.steps - 1, harness.steps):
        harness.kill_at(step)
    harness.close(report)
    assert harness.done == {False: 4, True: 1}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", [PLAIN, "postgresql+s3"], indirect=True)
def test_publisher_killed_at_every_step_leaves_nothing_or_all(
    backend: Backend, report: Callable[[str], None]
) -> None:
    """Each line in turn, at least a hundred on each of two back ends."""
    harness = Harness(backend)
    for step in range(1, harness.steps + 1):
        harness.kill_at(step)
    harness.close(report)
    assert harness.steps >= 100
    assert harness.done == {False: harness.steps - 1, True: 1}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", [PLAIN, "postgresql+s3"], indirect=True)
def test_publisher_killed_at_any_moment_leaves_nothing_or_all(
    backend: Backend, report: Callable[[str], None]
) -> None:
    """Sixty moments, from before the registry is opened until after the answer."""
    harness = Harness(backend)
    began = time.monotonic()
    start(harness.context, backend, "timed", -1)
    whole_s = time.monotonic() - began
    for turn in range(60):
        harness.kill_after(whole_s * turn / 50, f"moment-{turn}")
    harness.close(report)
    assert sum(harness.done.values()) == 60
