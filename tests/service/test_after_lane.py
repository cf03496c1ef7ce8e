"""What comes after the lane is expected to take what it took lately."""

from __future__ import annotations

import time

import pytest

from service.after_lane import FRESH_S, AfterLane


def test_nothing_is_expected_before_there_was_anything() -> None:
    """The first completion has nothing to go by."""
    assert AfterLane().expected_s(4) == 0.0


def test_means_move_and_are_of_as_many_candidates() -> None:
    """A fifth of the way with each, and deviations with them; other numbers lie between."""
    after = AfterLane()
    after.learn(4, 0.2)
    assert after.expected_s(1) == 0.05
    assert after.expected_s(4) == 0.2
    assert after.expected_s(16) == pytest.approx(0.8)
    after.learn(16, 0.5)
    after.learn(4, 0.3)
    # 0.22 and twice a deviation of 0.02.
    assert after.expected_s(4) == pytest.approx(0.26)
    assert after.expected_s(3) == pytest.approx(0.195)
    assert after.expected_s(10) == pytest.approx(0.38)
    assert after.expected_s(16) == 0.5
    assert after.expected_s(64) == 2.0


def test_a_stall_is_no_trend() -> None:
    """One ranking of a minute among quick ones does not make the next one late."""
    after = AfterLane()
    for _ in range(5):
        after.learn(4, 0.2)
    after.learn(4, 60.0)
    assert after.expected_s(4) < 0.7
    assert after.least_s(4) < 0.35


def test_what_lasts_is_learned() -> None:
    """Ten times as long, again and again."""
    after = AfterLane()
    for seconds in (0.1, *[1.0] * 10):
        after.learn(4, seconds)
    assert after.expected_s(4) > 1.0


def test_nobody_is_refused_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first completion that stalled is all that is known, until it is old or others are there."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    after = AfterLane()
    after.learn(4, 60.0)
    assert after.least_s(4) == 60.0
    now = FRESH_S + 1
    assert after.least_s(1) == 0.0
    assert after.expected_s(4) == 60.0
    after.learn(1, 0.1)
    assert after.expected_s(4) == pytest.approx(0.4)


def test_what_is_forgotten_is_reckoned_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones after a time of small ones are not expected to be as quick, nor the reverse."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    after = AfterLane()
    after.learn(16, 2.0)
    now = FRESH_S + 1
    after.learn(1, 0.125)
    assert after.expected_s(16) == pytest.approx(2.0)
    now = 2 * FRESH_S + 3
    after.learn(16, 2.0)
    assert after.least_s(1) == pytest.approx(0.125)


def test_one_that_had_nothing_to_do_does_not_count_for_ever() -> None:
    """As a completion without ranking; and a stall does not raise what is possible by itself."""
    after = AfterLane()
    for seconds in (0.01, *[1.0] * 40):
        after.learn(4, seconds)
    assert after.least_s(4) == pytest.approx(1.0, rel=0.05)
    after.learn(4, 60.0)
    after.learn(4, 1.0)
    assert after.least_s(4) == pytest.approx(1.0, rel=0.05)
