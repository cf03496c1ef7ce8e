"""A capsule is fetched once, a slow one holds up nobody else, and bytes bound how many are kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest

from registry import StorageUnavailable, Version
from service.capsules import Capsules, Loaded


class Claims:
    """Remembers which capsules are claimed."""

    def __init__(self) -> None:
        self.held: set[str] = set()

    def take(self, digest: str) -> None:
        self.held.add(digest)

    def note(self, digest: str) -> None:
        assert digest in self.held

    def give_up(self, digest: str, unless: Callable[[], bool]) -> None:
        if not unless():
            self.held.discard(digest)


def version(digest: str, size_bytes: int = 10) -> Version:
    return Version(
        scene="tower", number=1, digest=digest, tensor_digest="", size_bytes=size_bytes, base="",
        base_fingerprint="", rank=1, created=datetime(2026, 1, 1, tzinfo=UTC), created_by="",
        metadata={}, aliases=(),
    )  # fmt: skip


def capsules(load: Callable[[Version], Any], budget_bytes: int = 25) -> tuple[Capsules, Claims]:
    claims = Claims()
    leases: Any = claims
    return Capsules(load, leases, budget_bytes=budget_bytes), claims


def test_those_who_come_at_once_share_one_fetch() -> None:
    """Six threads ask for one scene: it is fetched once, and all get the same."""
    fetched: list[str] = []
    go = threading.Event()

    def load(asked: Version) -> object:
        fetched.append(asked.digest)
        assert go.wait(30)
        return object()

    store, claims = capsules(load)
    with ThreadPoolExecutor(6) as threads:
        futures = [threads.submit(store.get, version("a")) for _ in range(6)]
        go.set()
        got = [future.result(30) for future in futures]
    assert fetched == ["a"]
    assert len(set(map(id, got))) == 1
    assert claims.held == {"a"}


def test_a_slow_fetch_holds_up_nobody_else() -> None:
    """While one scene is on its way, another is loaded, and a third comes from memory."""
    go = threading.Event()

    def load(asked: Version) -> object:
        if asked.digest == "slow":
            assert go.wait(30)
        return asked.digest

    store, _ = capsules(load)
    store.get(version("known"))
    with ThreadPoolExecutor(1) as thread:
        slow = thread.submit(store.get, version("slow"))
        assert store.get(version("known")) == "known"
        assert store.get(version("quick")) == "quick"
        assert not slow.done()
        go.set()
        assert slow.result(30) == "slow"


def test_bytes_bound_what_is_kept_and_its_claims() -> None:
    """Of three capsules of ten bytes a budget of 25 keeps the two used last."""
    store, claims = capsules(lambda asked: asked.digest)
    for digest in ("a", "b", "a", "c"):
        store.get(version(digest))
    assert store.digests == ["a", "c"]
    assert claims.held == {"a", "c"}
    assert store.drop("a")
    assert not store.drop("a")
    assert claims.held == {"c"}
    assert store.metrics().held_bytes == 10


def test_who_comes_back_while_its_claim_is_given_up_keeps_one() -> None:
    """It made room for another, whose thread gives up the claim late: it is in memory again."""
    store, claims = capsules(lambda asked: asked.digest, budget_bytes=10)
    store.get(version("a"))
    give_up = claims.give_up

    def late(digest: str, unless: Callable[[], bool]) -> None:
        claims.give_up = give_up  # type: ignore[method-assign]
        with ThreadPoolExecutor(1) as thread:
            thread.submit(store.get, version("a")).result(30)
        give_up(digest, unless)

    claims.give_up = late  # type: ignore[method-assign]
    store.get(version("b"))
    assert store.digests == ["a"]
    assert claims.held == {"a"}


def test_what_finds_no_room_is_not_claimed() -> None:
    """While another is on its way nothing can make room: it is used, but not kept."""
    arrived, go = threading.Event(), threading.Event()
    store, claims = capsules(lambda asked: asked.digest, budget_bytes=10)
    take = store._tier.take

    def slow(digest: str, size_bytes: int, make: Callable[[], Any], **how: Any) -> Any:
        def made() -> Any:
            arrived.set()
            assert go.wait(30)
            return make()

        return take(digest, size_bytes, made if digest == "slow" else make, **how)

    store._tier.take = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(store.get, version("slow"))
        assert arrived.wait(30)
        assert store.get(version("quick")) == "quick"
        assert claims.held == {"slow"}
        go.set()
        coming.result(30)
    assert store.digests == ["slow"]
    assert claims.held == {"slow"}


def test_a_fetch_that_fails_is_tried_again() -> None:
    """Nothing of the failure stays; the next request fetches."""
    answers: list[Loaded | Exception] = [StorageUnavailable("away"), "there"]  # type: ignore[list-item]

    def load(_: Version) -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    store, claims = capsules(load)
    with pytest.raises(StorageUnavailable):
        store.get(version("a"))
    assert claims.held == set()
    assert store.get(version("a")) == "there"
