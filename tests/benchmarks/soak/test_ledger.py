"""Where an alias may have been: exact spans, and both versions while a move is under way."""

from __future__ import annotations

import pytest

from benchmarks.soak.ledger import AliasLedger

DIGESTS = {"tower": ("a", "b", "c"), "bridge": ("d",)}


def test_an_alias_begins_at_the_latest_version() -> None:
    """As publishing leaves it."""
    ledger = AliasLedger(DIGESTS)
    assert ledger.allowed("tower", 0, 1) == {"c"}
    assert ledger.allowed("bridge", 0, 1) == {"d"}


@pytest.mark.parametrize(
    ("began_s", "ended_s", "allowed"),
    [
        (0.0, 9.9, {"c"}),
        (0.0, 10.0, {"a", "c"}),
        (10.4, 10.6, {"a", "c"}),
        (11.1, 12.0, {"a"}),
        (0.0, 30.0, {"a", "b", "c"}),
        (21.1, 22.0, {"b"}),
    ],
)
def test_a_move_allows_both_versions_from_its_beginning_to_its_end(
    began_s: float, ended_s: float, allowed: set[str]
) -> None:
    """From c to a between 10 and 11 s, to b between 20 and 21 s."""
    ledger = AliasLedger(DIGESTS)
    for number, at_s in ((1, 10.0), (2, 20.0)):
        ledger.begin_move("tower", number, at_s)
        ledger.end_move("tower", at_s + 1)
    assert ledger.allowed("tower", began_s, ended_s) == allowed


def test_a_move_without_an_end_leaves_both_versions_right() -> None:
    """Nobody knows whether a move that failed took effect."""
    ledger = AliasLedger(DIGESTS)
    ledger.begin_move("tower", 1, 10.0)
    assert ledger.allowed("tower", 500, 501) == {"a", "c"}


def test_turns_go_round_the_versions() -> None:
    """From the third, one further is the first."""
    ledger = AliasLedger(DIGESTS)
    assert [ledger.after("tower", turn) for turn in (1, 2)] == [1, 2]
    ledger.begin_move("tower", 2, 0.0)
    assert [ledger.after("tower", turn) for turn in (1, 2)] == [3, 1]
