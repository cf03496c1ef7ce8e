"""Several processes do everything to one registry at once, sweeps without grace included."""

from __future__ import annotations

import multiprocessing
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta

import pytest

from registry import AlreadyExists, Conflict, LeaseLost, NotFound, Query, Registry
from tests.registry.capsules import capsule
from tests.registry.conftest import OTHERS, PLAIN, Backend

SCENES = ("tower", "bridge", "mill")
REFUSALS = (AlreadyExists, Conflict, LeaseLost, NotFound)
# How often each is done: as many sweeps and retirements as it takes to make races likely.
STEPS = {
    "publish": 6,
    "set_alias": 3,
    "promote": 3,
    "rollback": 2,
    "retire": 4,
    "restore": 1,
    "resolve": 6,
    "search": 1,
    "hold": 2,
    "sweep": 2,
}


@dataclass
class Worker:
    """One process's share: what it did, what was refused, and the versions it was given."""

    registry: Registry
    number: int
    random: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    published: list[tuple[str, int, str]] = field(default_factory=list)

    def work(self, count: int) -> None:
        """Take that many steps at random; any error but a typed refusal ends the test."""
        for turn in range(count):
            (step,) = self.random.choices(list(STEPS), list(STEPS.values()))
            try:
                self.take("publish" if turn == 0 else step, self.random.choice(SCENES), turn)
                self.counts[step] += 1
            except REFUSALS as error:
                self.counts[f"{step}: {error.code}"] += 1

    def take(self, step: str, scene: str, turn: int) -> None:
        """One step on one scene."""
        registry, alias = self.registry, self.random.choice(["live", "next"])
        match step:
            case "publish":
                # Half of the capsules are published by all, who race for one version of each.
                seed = turn if turn % 2 else 100_000 * (self.number + 1) + turn
                version = registry.publish(capsule(scene, seed), alias=None)
                self.published.append((scene, version.number, version.digest))
            case "set_alias":
                now = registry.scene(scene)
                expect = now.aliases.get(alias, 0)
                registry.set_alias(scene, alias, self.pick(scene), expect=expect)
            case "promote":
                registry.promote(f"{scene}@{self.pick(scene)}", to=alias)
            case "rollback":
                registry.rollback(scene, alias)
            case "retire" | "restore":
                getattr(registry, step)(scene, self.pick(scene))
            case "resolve":
                registry.fetch(f"sha256:{registry.resolve(f'{scene}@{alias}').digest}")
            case "search":
                registry.search(Query(alias=alias))
            case "hold":
                digest = registry.resolve(f"{scene}@{self.pick(scene)}").digest
                registry.hold([digest], f"lane-{self.number}", lasting=timedelta(seconds=1))
            case "sweep":
                registry.sweep(grace=timedelta(0))

    def pick(self, scene: str) -> int:
        """A number of the scene, more often a late one."""
        latest = self.registry.scene(scene).latest
        return max(1, latest - int(self.random.expovariate(0.2)))


def work(
    place: str, database: str | None, number: int, count: int
) -> tuple[Counter[str], list[tuple[str, int, str]]]:
    """What one process does."""
    registry = Registry.open(place, database=database)
    worker = Worker(registry, number, random.Random(number))
    worker.work(count)
    registry.close()
    return worker.counts, worker.published


def check(registry: Registry, published: set[tuple[str, int, str]]) -> None:
    """Nothing is lost, doubled or dangling, and every move follows the one before it."""
    for scene in registry.scenes():
        versions = registry.versions(scene.name, limit=100_000, retired=True)
        assert [version.number for version in versions] == list(range(scene.latest, 0, -1))
        assert len({version.digest for version in versions}) == len(versions)
        given = {(number, digest) for name, number, digest in published if name == scene.name}
        assert given == {(version.number, version.digest) for version in versions}
        for alias, number in scene.aliases.items():
            moves = registry.history(scene.name, alias)
            before = [None, *(move.number for move in moves[:-1])]
            assert [move.previous for move in moves] == before
            assert registry.resolve(f"{scene.name}@{alias}").number == moves[-1].number == number
            registry.fetch(f"{scene.name}@{alias}")
    assert registry.verify() == []


def stress(backend: Backend, processes: int, count: int, report: Callable[[str], None]) -> None:
    """Let the processes work side by side, then check what they left."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        tasks = [
            pool.submit(work, backend.place, backend.database, number, count)
            for number in range(processes)
        ]
        done = [task.result(timeout=3000) for task in tasks]
    counts = sum((counts for counts, _ in done), Counter[str]())
    report(f"\n{backend.name}: {processes} processes, {count} steps each")
    for outcome, times in sorted(counts.items()):
        report(f"  {times:5}  {outcome}")
    assert counts.total() == processes * count
    registry = backend.open()
    check(registry, {version for _, published in done for version in published})
    # A last sweep and a last look: what is swept now was needed by nobody.
    registry.sweep(grace=timedelta(0))
    assert registry.verify() == []
    registry.close()


@pytest.mark.parametrize("backend", [PLAIN], indirect=True)
def test_processes_lose_and_duplicate_nothing(
    backend: Backend, report: Callable[[str], None]
) -> None:
    """Three processes of sixty steps, every time."""
    stress(backend, 3, 60, report)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", [PLAIN, *OTHERS], indirect=True)
def test_many_processes_lose_and_duplicate_nothing(
    backend: Backend, report: Callable[[str], None]
) -> None:
    """Eight processes of five hundred steps on every database and store."""
    stress(backend, 8, 500, report)
