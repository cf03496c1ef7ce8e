"""Tests of alias moves, their history and rollback."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from registry import Registry
from registry.aliases import ABSENT
from registry.database import Database
from registry.errors import InvalidReference, NotFound, PreconditionFailed
from tests.registry.capsules import MemoryObjects, capsule


def publish(registry: Registry, count: int) -> None:
    """Versions 1 to count of the scene tower, each made live."""
    for seed in range(count):
        registry.publish(capsule(seed=seed), by="ada")


def test_alias_moves_when_it_is_where_expected(registry: Registry) -> None:
    """Compare-and-set succeeds on the number it was told."""
    publish(registry, 3)
    assert registry.set_alias("tower", "live", 1, expect=3).aliases == ("live",)
    assert registry.resolve("tower").number == 1


def test_alias_that_moved_meanwhile_stays(registry: Registry) -> None:
    """Compare-and-set on a number that is past raises and changes nothing."""
    publish(registry, 3)
    with pytest.raises(PreconditionFailed, match="points to version 3 and you expected version 2"):
        registry.set_alias("tower", "live", 1, expect=2)
    assert registry.resolve("tower").number == 3


def test_alias_can_be_expected_to_be_absent(registry: Registry) -> None:
    """ABSENT lets exactly one of two creators win."""
    publish(registry, 2)
    registry.set_alias("tower", "candidate", 1, expect=ABSENT)
    with pytest.raises(
        PreconditionFailed, match="points to version 1 and you expected no such alias"
    ):
        registry.set_alias("tower", "candidate", 2, expect=ABSENT)
    with pytest.raises(PreconditionFailed, match="does not exist and you expected version 1"):
        registry.set_alias("tower", "other", 2, expect=1)


def test_alias_to_a_missing_version_is_refused(registry: Registry) -> None:
    """No alias ever dangles."""
    publish(registry, 1)
    with pytest.raises(NotFound, match="no version 2"):
        registry.set_alias("tower", "live", 2)
    with pytest.raises(InvalidReference, match="versions count from 1"):
        registry.set_alias("tower", "live", 2**70)


def test_history_tells_every_move(registry: Registry) -> None:
    """From, to, how and by whom, oldest first; a move to where it is leaves no trace."""
    publish(registry, 2)
    registry.set_alias("tower", "candidate", 1, by="bob")
    registry.promote("tower@candidate", by="bob")
    registry.promote("tower@candidate", by="bob")
    registry.rollback("tower", by="cleo")
    steps = [
        (move.alias, move.previous, move.number, move.action, move.moved_by)
        for move in registry.history("tower")
    ]
    assert steps == [
        ("live", None, 1, "publish", "ada"),
        ("live", 1, 2, "publish", "ada"),
        ("candidate", None, 1, "alias", "bob"),
        ("live", 2, 1, "promote", "bob"),
        ("live", 1, 2, "rollback", "cleo"),
    ]
    assert len(registry.history("tower", "candidate")) == 1


def test_digest_is_not_promoted(registry: Registry) -> None:
    """Bytes may belong to several scenes, so a digest names no alias to move."""
    publish(registry, 1)
    with pytest.raises(InvalidReference, match="names bytes and no scene"):
        registry.promote(f"sha256:{registry.resolve('tower').digest}")


def test_repeated_rollback_goes_further_back(registry: Registry) -> None:
    """Rollback is no toggle: each one takes back one more move, until none is left."""
    publish(registry, 3)
    assert [registry.rollback("tower").number for _ in range(2)] == [2, 1]
    with pytest.raises(NotFound, match="no earlier version to go back to"):
        registry.rollback("tower")
    assert registry.resolve("tower").number == 1


def test_rollback_goes_back_from_where_it_was_expected(registry: Registry) -> None:
    """Who comes late is told so, even where nothing is left to go back to."""
    publish(registry, 2)
    with pytest.raises(PreconditionFailed, match="points to version 2 and you expected version 1"):
        registry.rollback("tower", expect=1)
    assert registry.rollback("tower", expect=2).number == 1
    with pytest.raises(PreconditionFailed, match="points to version 1 and you expected version 2"):
        registry.rollback("tower", expect=2)
    with pytest.raises(NotFound, match="no earlier version"):
        registry.rollback("tower", expect=1)


def test_several_who_roll_back_the_same_version_go_back_once(registry: Registry) -> None:
    """One of eight at once moves the alias, one step; without the check it would go to 1."""
    publish(registry, 9)
    start = threading.Barrier(8)

    def roll_back(_: int) -> str:
        start.wait()
        try:
            return registry.rollback("tower", expect=9).reference
        except PreconditionFailed as error:
            return error.code

    with ThreadPoolExecutor(8) as pool:
        outcomes = Counter(pool.map(roll_back, range(8)))
    assert outcomes == {"tower@8": 1, "precondition_failed": 7}
    assert registry.resolve("tower").number == 8


def test_rollback_after_a_new_publish_returns_to_what_was_live(registry: Registry) -> None:
    """Moves that were taken back stay out of the way of later ones."""
    publish(registry, 3)
    registry.rollback("tower")
    registry.publish(capsule(seed=9))
    assert [registry.rollback("tower").number for _ in range(2)] == [2, 1]


def test_rollback_passes_over_retired_versions(registry: Registry) -> None:
    """A version withdrawn since is not made live again."""
    publish(registry, 3)
    registry.retire("tower", 2)
    assert registry.rollback("tower").number == 1


def test_rollback_never_stays_where_it_is(registry: Registry) -> None:
    """Behind a move away from a retired version lies one that leads to where the alias is."""
    publish(registry, 3)
    registry.set_alias("tower", "live", 2)
    registry.retire("tower", 3)
    assert registry.rollback("tower").number == 1
    with pytest.raises(NotFound, match="no earlier version to go back to"):
        registry.rollback("tower")


def memory_registry() -> Registry:
    """A registry without files, quick enough to make hundreds of."""
    database = Database("sqlite://")
    database.prepare()
    return Registry(database, MemoryObjects())


class AliasMachine(RuleBasedStateMachine):
    """Random moves and rollbacks of one alias, against a stack of numbers."""

    @initialize()
    def publish_three(self) -> None:
        """Three versions, of which the third is live."""
        self.registry = memory_registry()
        publish(self.registry, 3)
        self.stack = [1, 2, 3]

    @rule(number=st.integers(1, 3))
    def point(self, number: int) -> None:
        """Move the alias, where a move to the same place is none."""
        self.registry.set_alias("tower", "live", number)
        if number != self.stack[-1]:
            self.stack.append(number)

    @precondition(lambda self: len(self.stack) > 1)
    @rule()
    def rollback(self) -> None:
        """Take the last move back."""
        self.stack.pop()
        assert self.registry.rollback("tower").number == self.stack[-1]

    @precondition(lambda self: len(self.stack) == 1)
    @rule()
    def rollback_too_far(self) -> None:
        """There is nothing before the first version."""
        with pytest.raises(NotFound):
            self.registry.rollback("tower")

    @invariant()
    def alias_is_the_top(self) -> None:
        """The alias points to what the model says."""
        assert self.registry.resolve("tower").number == self.stack[-1]

    def teardown(self) -> None:
        """Close the database."""
        self.registry.close()


AliasMachine.TestCase.settings = settings(max_examples=6, stateful_step_count=15, deadline=None)
TestRollbackIsAStack = AliasMachine.TestCase
