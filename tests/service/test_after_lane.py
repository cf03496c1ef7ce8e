"""What comes after the lane is expected to take what it took lately."""

from __future__ import annotations

import pytest

from service.after_lane import AfterLane


def test_nothing_is_expected_before_there_was_anything() -> None:
    """The first completion has nothing to go by."""
    assert AfterLane().expected_s(4) == 0.0


def test_means_move_and_are_of_as_many_candidates() -> None:
    """A fifth of the way with each, and deviations with them; other numbers lie between."""
    after = AfterLane()
    after.learn(4, 0.2)
    assert after.expected_s(1) == after.expected_s(4) == after.expected_s(16) == 0.2
    after.learn(16, 0.5)
    after.learn(4, 0.3)
    # 0.22 and twice a deviation of 0.02.
    assert after.expected_s(4) == pytest.approx(0.26)
    assert after.expected_s(3) == pytest.approx(0.26)
    assert after.expected_s(10) == pytest.approx(0.38)
    assert after.expected_s(16) == after.expected_s(64) == 0.5
