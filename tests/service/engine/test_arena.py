"""A tier keeps what jobs need, and of the rest what was used last, within its bytes."""

from __future__ import annotations

import threading

import pytest

from service.engine.arena import Tier


def filled(budget_bytes: int, *digests: str) -> Tier[str]:
    """A tier into which values of 10 bytes were brought, in this order."""
    tier: Tier[str] = Tier(budget_bytes)
    for digest in digests:
        tier.take(digest, 10, digest.upper, pin=False)
    return tier


def test_the_least_recently_used_leaves() -> None:
    """Bringing and taking count as use, looking does not."""
    tier = filled(30, "a", "b", "c")
    assert tier["a"] == "A"
    assert tier.take("b", 10, lambda: "never") == "B"
    tier.take("d", 10, lambda: "D", pin=False)
    assert tier.digests() == ["c", "b", "d"]
    metrics = tier.metrics()
    assert (metrics.hits, metrics.misses, metrics.evictions) == (1, 4, 1)
    assert (metrics.held_bytes, metrics.entries, metrics.pinned) == (30, 3, 1)


def test_what_is_pinned_stays() -> None:
    """While all that could leave is pinned nothing comes in; given back, it makes room."""
    tier: Tier[str] = Tier(20)
    assert tier.take("a", 10, lambda: "A") == "A"
    assert tier.take("a", 10, lambda: "never") == "A"
    assert tier.take("b", 10, lambda: "B") == "B"
    assert tier.take("c", 10, lambda: "never") is None
    tier.give_back("a")
    assert tier.take("c", 10, lambda: "never") is None
    tier.give_back("a")
    assert tier.take("c", 10, lambda: "C") == "C"
    assert tier.digests() == ["b", "c"]
    with pytest.raises(ValueError, match="a is not pinned"):
        filled(20, "a").give_back("a")


def test_one_entry_may_exceed_the_budget() -> None:
    """A scene is served however small the budget; it leaves for the next one."""
    tier = filled(5, "a")
    assert tier.digests() == ["a"]
    assert tier.take("b", 10, lambda: "B") == "B"
    assert tier.digests() == ["b"]


def test_dropping_waits_for_jobs_and_expelling_does_not() -> None:
    """drop says whether the value is gone; expel takes it from under a pin, harmlessly."""
    gone: list[str] = []
    tier: Tier[str] = Tier(30, gone.append)
    tier.take("a", 10, lambda: "A")
    assert not tier.drop("a")
    assert tier.drop("unknown")
    tier.expel("a")
    assert gone == ["A"]
    # It came back for another, who gives back later.
    tier.take("a", 10, lambda: "A")
    tier.give_back("a")
    assert tier.metrics().pinned == 1
    tier.give_back("a")
    assert tier.drop("a")
    assert tier.metrics().held_bytes == 0


def test_what_is_spared_does_not_make_room() -> None:
    """For this one: it leaves for the next one that spares nothing."""
    tier = filled(20, "a", "b")
    assert tier.take("c", 10, lambda: "never", pin=False, spare={"a", "b"}) is None
    assert tier.take("c", 10, lambda: "C", pin=False, spare={"a"}) == "C"
    assert tier.digests() == ["a", "c"]
    assert tier.take("d", 10, lambda: "D") == "D"
    assert tier.digests() == ["c", "d"]


def test_what_is_found_counts_as_used() -> None:
    """And what is not there is not made."""
    tier = filled(20, "a", "b")
    assert (tier.find("a"), tier.find("c")) == ("A", None)
    assert tier.digests() == ["b", "a"]
    assert tier.metrics().hits == 1


def test_what_is_being_made_is_not_gone() -> None:
    """Whoever drops it then has to come again."""
    tier: Tier[str] = Tier(30)
    dropped: list[bool] = []

    def make() -> str:
        dropped.append(tier.drop("a"))
        return "A"

    tier.take("a", 10, make, pin=False)
    assert dropped == [False]
    assert tier.drop("a")


def test_a_value_that_cannot_be_made_leaves_no_trace() -> None:
    """The error comes through, and the next try makes it."""
    tier: Tier[str] = Tier(30)

    def fail() -> str:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        tier.take("a", 10, fail)
    assert "a" not in tier
    assert tier.take("a", 10, lambda: "A") == "A"


def test_threads_make_a_value_once() -> None:
    """Eight threads that ask for the same scene at once share one value."""
    tier: Tier[object] = Tier(100)
    made: list[object] = []
    found: list[object] = []
    start = threading.Barrier(8)

    def make() -> object:
        made.append(object())
        return made[-1]

    def ask() -> None:
        start.wait()
        found.append(tier.take("a", 10, make))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert found == made * 8
    assert tier.metrics().pinned == 1


def test_the_tier_stays_open_while_a_value_is_made() -> None:
    """Others find what is there; who does not want to wait for the new value is told so."""
    tier = filled(30, "a")
    go, entered = threading.Event(), threading.Event()

    def slow() -> str:
        entered.set()
        assert go.wait(30)
        return "B"

    maker = threading.Thread(target=lambda: tier.take("b", 10, slow, pin=False))
    maker.start()
    assert entered.wait(30)
    assert tier.take("a", 10, lambda: "never") == "A"
    assert tier.take("b", 10, lambda: "never", wait=False) is None
    # Its room is taken already.
    assert tier.metrics().held_bytes == 20
    go.set()
    assert tier.take("b", 10, lambda: "never") == "B"
    maker.join()


def test_a_maker_that_fails_gives_its_room_back() -> None:
    """And those who waited for it try themselves."""
    tier: Tier[str] = Tier(10)
    go = threading.Event()

    def fail() -> str:
        assert go.wait(30)
        raise OSError("disk")

    def try_it() -> None:
        with pytest.raises(OSError, match="disk"):
            tier.take("a", 10, fail)

    maker = threading.Thread(target=try_it)
    maker.start()
    go.set()
    maker.join()
    assert tier.metrics().held_bytes == 0
    assert tier.take("a", 10, lambda: "A") == "A"
