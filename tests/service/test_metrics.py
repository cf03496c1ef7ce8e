"""Metrics of one app."""

from __future__ import annotations

import re
from pathlib import Path

from fastapi.testclient import TestClient

from service.engine import Engine, EngineMetrics
from service.engine.arena import TierMetrics
from service.http import create_app
from service.metrics import Metrics
from service.settings import Settings
from tests.fakes import road_of
from tests.tiny import tiny_base


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


def test_an_engine_and_its_tiers_are_exposed() -> None:
    """What only grows is a counter, the rest a gauge; tiers and outcomes are labels."""
    tier = TierMetrics(100, 80, 4, 1, hits=9, misses=5, evictions=1)
    engine = EngineMetrics(
        waiting=2, running=3, pending_sample_steps=40, completed=7, partial=1, cancelled=0,
        failed=0, refused=6, sample_steps=500, steps=60, sample_steps_per_s=70.0, cost_drift=1.25,
        swaps=12, programs=2, tiers={"device": tier},
    )  # fmt: skip
    metrics = Metrics()
    metrics.watch_engine(lambda: engine, lambda: {"host": TierMetrics(9, 8, 7, 6, 5, 4, 3)})
    text = metrics.exposition().decode()
    for line in (
        "realfill_lane_waiting 2.0",
        "realfill_lane_cost_drift 1.25",
        "realfill_lane_sample_steps_total 500.0",
        "realfill_lane_programs_total 2.0",
        'realfill_jobs_total{outcome="refused"} 6.0',
        'realfill_adapters_held_bytes{tier="device"} 80.0',
        'realfill_adapters_held_bytes{tier="host"} 8.0',
        'realfill_adapters_hits_total{tier="device"} 9.0',
    ):
        assert line in text


def test_docs_list_every_metric(root: Path, tmp_path: Path) -> None:
    """docs/engine.md names all that a scraper of the real engine sees, and nothing else."""
    base = tiny_base()
    app = create_app(road_of(base, tmp_path, Engine(base)), Settings())
    shown = TestClient(app).get("/metrics").text
    kinds = re.findall(r"^# TYPE (\w+) (\w+)$", shown, re.MULTILINE)
    # Client libraries add when a series began, a gauge beside each counter and histogram.
    names = {name for name, _ in kinds if not name.endswith("_created")}
    text = (root / "docs" / "engine.md").read_text()
    assert set(re.findall(r"^\| `(realfill_\w+)` \|", text, re.MULTILINE)) == names
