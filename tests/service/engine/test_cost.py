"""The estimate of a sample-step's time follows what was measured."""

from __future__ import annotations

import pytest

from service.engine.cost import SampleStepRate


def test_estimate_is_unknown_before_the_first_job() -> None:
    """Nothing is promised that was never measured."""
    rate = SampleStepRate()
    assert rate.seconds_for(10) is None
    assert rate.per_s is None


def test_estimate_starts_at_the_first_job_and_moves_towards_later_ones() -> None:
    """One job gives its own rate; after many others the estimate is theirs."""
    rate = SampleStepRate()
    rate.observe(100, 2.0)
    assert rate.seconds_for(50) == pytest.approx(1.0)
    assert rate.per_s == pytest.approx(50.0)
    rate.observe(100, 3.0)
    assert rate.seconds_for(100) == pytest.approx(2.2)
    for _ in range(50):
        rate.observe(10, 1.0)
    assert rate.per_s == pytest.approx(10.0, rel=1e-3)
