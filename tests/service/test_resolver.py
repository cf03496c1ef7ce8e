"""A moved alias counts at once; a registry that is slow or away stops nothing that was served."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from realfill.base import Base
from registry import NotFound, Registry, StorageUnavailable, Version
from service.resolver import Resolver
from tests.tiny import tiny_capsule


class Trouble:
    """A registry that can be slow, or away."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.asked = 0
        self.away = False
        self.go = threading.Event()
        self.go.set()

    def resolve(self, reference: str) -> Version:
        """As the registry, if it is there and quick."""
        self.asked += 1
        assert self.go.wait(30)
        if self.away:
            raise StorageUnavailable("The registry's database does not answer: try again.")
        return self.registry.resolve(reference)


@pytest.fixture
def trouble(base: Base, tmp_path: Path) -> Trouble:
    """Over a registry with two versions of a scene, the first of them live."""
    registry = Registry.open(tmp_path / "registry")
    for seed in (1, 2):
        registry.publish(tiny_capsule(base, "tower", seed))
    registry.set_alias("tower", "live", 1)
    return Trouble(registry)


def resolver(trouble: Any, patience_s: float = 0.1) -> Resolver:
    return Resolver(trouble, patience_s=patience_s)


def test_a_moved_alias_counts_at_once(trouble: Trouble) -> None:
    """Nothing is remembered while the registry answers."""
    resolve = resolver(trouble, 10.0).resolve
    assert [resolve("tower")[0].number, resolve("tower")[1]] == [1, False]
    trouble.registry.set_alias("tower", "live", 2)
    assert resolve("tower")[0].number == 2


def test_a_registry_that_is_away_stops_nothing_that_was_served(trouble: Trouble) -> None:
    """What is known is served and said to be stale; what is not is refused; then all is fresh."""
    ours = resolver(trouble, 10.0)
    ours.resolve("tower")
    trouble.away = True
    assert (ours.resolve("tower")[0].number, ours.resolve("tower")[1]) == (1, True)
    assert ours.stale == 2
    with pytest.raises(StorageUnavailable, match="does not answer"):
        ours.resolve("tower@2")
    trouble.away = False
    trouble.registry.set_alias("tower", "live", 2)
    version, stale = ours.resolve("tower")
    assert (version.number, stale) == (2, False)


def test_a_slow_registry_is_waited_for_once(trouble: Trouble) -> None:
    """The first request is patient, the next are not, and the late answer counts for the last."""
    ours = resolver(trouble, 0.3)
    ours.resolve("tower")
    trouble.registry.set_alias("tower", "live", 2)
    trouble.go.clear()
    began = time.monotonic()
    assert ours.resolve("tower")[1]
    first_s = time.monotonic() - began
    for _ in range(5):
        assert ours.resolve("tower")[1]
    rest_s = time.monotonic() - began - first_s
    assert first_s >= 0.3
    assert rest_s < 0.3
    assert trouble.asked == 2
    with pytest.raises(StorageUnavailable, match=r"did not say within 0\.3 s what 'tower@2' is"):
        ours.resolve("tower@2")
    trouble.go.set()
    ends = time.monotonic() + 30
    while ours.resolve("tower")[0].number == 1 and time.monotonic() < ends:
        time.sleep(0.01)
    assert ours.resolve("tower")[0].number == 2


def test_what_is_gone_is_not_served_from_memory(trouble: Trouble) -> None:
    """Once the registry has said that a reference means nothing, it is forgotten."""
    ours = resolver(trouble, 10.0)
    ours.resolve("tower@2")
    trouble.registry.retire("tower", 2)
    with pytest.raises(NotFound):
        ours.resolve("tower@2")
    trouble.away = True
    with pytest.raises(StorageUnavailable):
        ours.resolve("tower@2")


def test_those_who_come_together_are_all_told_what_is_true_now(trouble: Trouble) -> None:
    """Many requests share two questions; none of them takes the old answer while it is asked."""
    ours = resolver(trouble, 10.0)
    assert ours.resolve("tower")[0].number == 1
    trouble.registry.set_alias("tower", "live", 2)
    trouble.go.clear()
    with ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(ours.resolve, "tower") for _ in range(8)]
        time.sleep(0.1)
        assert not any(future.done() for future in futures)
        trouble.go.set()
        answers = [future.result(30) for future in futures]
    assert {(version.number, stale) for version, stale in answers} == {(2, False)}
    # The first one's, and one for all who came while it was under way.
    assert trouble.asked == 3


def test_who_comes_after_a_move_is_not_told_what_was_read_before(
    trouble: Trouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question under way has read the old version already; it answers only who asked it."""
    ours = resolver(trouble, 10.0)
    read, go, resolve = threading.Event(), threading.Event(), trouble.registry.resolve

    def resolve_and_wait(reference: str) -> Version:
        version = resolve(reference)
        read.set()
        assert go.wait(30)
        return version

    monkeypatch.setattr(trouble.registry, "resolve", resolve_and_wait)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(ours.resolve, "tower")
        assert read.wait(30)
        trouble.registry.set_alias("tower", "live", 2)
        second = threads.submit(ours.resolve, "tower")
        time.sleep(0.1)
        go.set()
        assert first.result(30)[0].number == 1
        assert second.result(30)[0].number == 2
