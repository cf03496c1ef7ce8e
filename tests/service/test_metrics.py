"""Metrics of one app."""

from __future__ import annotations

from service.metrics import Metrics


def test_two_apps_count_apart() -> None:
    """Each has a registry of its own."""
    one, two = Metrics(), Metrics()
    one.count_request("GET", "/livez", 200, 0.01)
    assert b'route="/livez"' in one.exposition()
    assert b'route="/livez"' not in two.exposition()


def test_an_unknown_method_is_other() -> None:
    """A client cannot make series by inventing methods."""
    metrics = Metrics()
    metrics.count_request("BREW", "/v1/scenes", 405, 0.01)
    assert b'method="OTHER"' in metrics.exposition()
    assert b"BREW" not in metrics.exposition()


def test_a_completion_counts_samples_and_stages() -> None:
    """Stages are labels of one histogram."""
    metrics = Metrics()
    metrics.count_completion(4, {"swap": 0.001, "sample": 0.5})
    text = metrics.exposition().decode()
    assert "realfill_samples_total 4.0" in text
    assert 'realfill_stage_seconds_sum{stage="sample"} 0.5' in text


def test_a_watched_gauge_is_read_at_each_scrape() -> None:
    """It shows the present value."""
    values = iter([1.0, 2.0])
    metrics = Metrics()
    metrics.watch("realfill_lane_jobs", "Jobs.", lambda: next(values))
    assert "realfill_lane_jobs 1.0" in metrics.exposition().decode()
    assert "realfill_lane_jobs 2.0" in metrics.exposition().decode()
