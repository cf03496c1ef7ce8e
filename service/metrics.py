"""Counters and histograms in Prometheus' text form, labelled by route template, never by path."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

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
