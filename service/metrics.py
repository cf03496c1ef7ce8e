"""Counters and histograms in Prometheus' text form, labelled by route template, never by path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.engine import EngineMetrics
from service.engine.arena import TierMetrics

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


class Metrics:
    """The metrics of one app; each app has its own, so that two can live in one process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "realfill_requests",
            "Requests answered.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._request_s = Histogram(
            "realfill_request_seconds",
            "From the first byte in to the last byte out.",
            ("method", "route"),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._stage_s = Histogram(
            "realfill_stage_seconds",
            "Stages of a completion.",
            ("stage",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._samples = Counter(
            "realfill_samples", "Candidates sampled and ranked.", registry=self._registry
        )

    def watch(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """Expose a gauge whose value is read at each scrape."""
        Gauge(name, documentation, registry=self._registry).set_function(read)

    def watch_total(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """Expose a counter whose value is read at each scrape, as ``<name>_total``."""
        self._registry.register(_Total(name, documentation, read))

    def watch_engine(
        self,
        read: Callable[[], EngineMetrics | None],
        tiers: Callable[[], Mapping[str, TierMetrics]],
    ) -> None:
        """Expose an engine and the tiers of its adapters, read at each scrape."""
        self._registry.register(EngineCollector(read, tiers))

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answered request; an unknown method becomes OTHER."""
        known = method if method in _METHODS else "OTHER"
        self._requests.labels(known, route, str(status)).inc()
        self._request_s.labels(known, route).observe(seconds)

    def count_completion(self, samples: int, stages_s: Mapping[str, float]) -> None:
        """Count one completion and the time of its stages."""
        self._samples.inc(samples)
        for stage, seconds in stages_s.items():
            self._stage_s.labels(stage).observe(seconds)

    def exposition(self) -> bytes:
        """Everything, as a scraper reads it."""
        return generate_latest(self._registry)


@dataclass(frozen=True)
class _Total(Collector):
    """A number that only grows, and is counted elsewhere."""

    name: str
    documentation: str
    read: Callable[[], float]

    def describe(self) -> list[Metric]:
        """Nothing beforehand, so that nothing is read before the first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read it once."""
        yield CounterMetricFamily(self.name, self.documentation, self.read())


_JOBS = ("completed", "partial", "cancelled", "failed", "refused")
_LANE = {
    "waiting": "Jobs that have not begun.",
    "running": "Jobs that share the lane.",
    "pending_sample_steps": "Sample-steps that all jobs still need.",
    "sample_steps_per_s": "Of full batches; 0 before the calibration.",
    "cost_drift": "Actual over calibrated seconds of recent steps.",
}
_DONE = {
    "sample_steps": "Sample-steps of answered jobs.",
    "steps": "U-Net batches.",
    "swaps": "Compositions of adapters that the U-Net was given.",
    "programs": "Programs traced and graphs captured; constant after the start.",
}
_HELD = {
    "budget_bytes": "What a tier of adapters may hold.",
    "held_bytes": "What a tier of adapters holds.",
    "entries": "Adapters in a tier.",
    "pinned": "Adapters that jobs need now.",
}
_PASSED = {
    "hits": "Adapters that a job found in a tier.",
    "misses": "Adapters that had to be brought into a tier.",
    "evictions": "Adapters that left a tier to make room.",
}


class EngineCollector(Collector):
    """An engine's metrics in Prometheus' terms: what only grows as counters, the rest as gauges."""

    def __init__(
        self,
        read: Callable[[], EngineMetrics | None],
        tiers: Callable[[], Mapping[str, TierMetrics]],
    ) -> None:
        self._read = read
        self._tiers = tiers

    def describe(self) -> list[Metric]:
        """Nothing beforehand, so that nothing is read before the first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read both once."""
        tiers = dict(self._tiers())
        engine = self._read()
        if engine is not None:
            tiers.update(engine.tiers)
            for name, says in _LANE.items():
                yield GaugeMetricFamily(f"realfill_lane_{name}", says, getattr(engine, name) or 0)
            for name, says in _DONE.items():
                yield CounterMetricFamily(f"realfill_lane_{name}", says, getattr(engine, name))
            jobs = CounterMetricFamily("realfill_jobs", "Jobs that ended.", labels=["outcome"])
            for name in _JOBS:
                jobs.add_metric([name], getattr(engine, name))
            yield jobs
        for families, kind in ((_HELD, GaugeMetricFamily), (_PASSED, CounterMetricFamily)):
            for name, says in families.items():
                family = kind(f"realfill_adapters_{name}", says, labels=["tier"])
                for tier, metrics in tiers.items():
                    family.add_metric([tier], getattr(metrics, name))
                yield family
