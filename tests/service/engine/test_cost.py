"""Promises rest on what was measured, interpolated, and on how far reality was from it."""

from __future__ import annotations

import pytest

from service.engine.cost import CostModel


def calibrated() -> CostModel:
    """One sample in 1 s, four in 2 s, sixteen in 8 s; decoding takes a quarter of a second."""
    model = CostModel()
    seconds = {1: 0.1, 4: 0.2, 16: 0.8}
    model.calibrate([1, 4, 16], lambda size: seconds[size], lambda: 0.25)
    return model


def test_nothing_is_promised_before_the_calibration() -> None:
    """An uncalibrated model says None, whatever it is asked."""
    model = CostModel()
    assert model.per_s is None
    assert model.step_s(4) is None
    assert model.seconds_for(10) is None
    assert model.alone_s(1, 2, 16) is None


def test_steps_between_measured_sizes_are_interpolated() -> None:
    """Two of three from 1 to 4, and beyond the largest in proportion."""
    model = calibrated()
    assert model.step_s(4) == pytest.approx(0.2)
    assert model.step_s(3) == pytest.approx(0.1 + 0.1 * 2 / 3)
    assert model.step_s(32) == pytest.approx(1.6)
    assert model.per_s == pytest.approx(20.0)


def test_a_job_alone_takes_its_batches_and_its_decoding() -> None:
    """Twenty samples of five steps at sixteen a time: 5 x (0.8 + 0.2) s, and 20 x 0.25 s."""
    assert calibrated().alone_s(20, 5, 16) == pytest.approx(5 * 1.0 + 5.0)
    assert calibrated().seconds_for(40, samples=2) == pytest.approx(2.0 + 0.5)


def test_drift_follows_what_steps_really_take() -> None:
    """A machine that got twice as slow is noticed within a few steps, and one outlier hardly is."""
    model = calibrated()
    model.observe(0.2, 60.0)
    # Three hundred times as long counts as four times.
    assert model.drift == pytest.approx(1 + 0.2 * 3)
    for _ in range(40):
        model.observe(0.2, 0.4)
    assert model.drift == pytest.approx(2.0, abs=0.01)
    assert model.step_s(4) == pytest.approx(0.4, rel=0.01)
    assert model.step_s(4, corrected=False) == pytest.approx(0.2)
    model.observe(0.0, 5.0)
    assert model.drift == pytest.approx(2.0, abs=0.01)


def test_sizes_whose_step_takes_too_long_are_not_tried() -> None:
    """On a slow machine the calibration ends early and larger batches are extrapolated."""
    model = CostModel()
    tried = []

    def step_s(size: int) -> float:
        tried.append(size)
        return 3.0 * size

    model.calibrate([1, 2, 4, 8], step_s, lambda: 0.0)
    assert tried == [1]
    assert model.step_s(8) == pytest.approx(24.0)
