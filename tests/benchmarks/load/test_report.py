"""Statistics of a run, held against values worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.load.driver import Outcome, Sample
from benchmarks.load.report import (
    Conditions,
    percentile,
    samples_needed,
    summarize,
    table,
    write,
)


def sample(
    scheduled_s: float,
    finished_s: float,
    outcome: Outcome = "ok",
    *,
    scene: str = "tower",
    sent_s: float | None = None,
    retry_after: str | None = None,
) -> Sample:
    return Sample(
        index=0,
        scene=scene,
        scheduled_s=scheduled_s,
        sent_s=scheduled_s if sent_s is None else sent_s,
        finished_s=finished_s,
        status=None,
        outcome=outcome,
        retry_after=retry_after,
        timings=None,
        partial=False,
        error=None if outcome == "ok" else "it failed",
    )


def conditions(**changes: object) -> Conditions:
    fields: dict[str, object] = {
        "url": "http://127.0.0.1:3000",
        "rate_per_s": 1.0,
        "duration_s": 4.0,
        "zipf_s": 1.0,
        "seed": 0,
        "warmup": 1,
        "timeout_s": 60.0,
        "slo_s": 1.0,
        "scenes": ("tower", "bridge"),
        "payload_bytes": {"tower": 10, "bridge": 20},
        "fields": {},
    }
    return Conditions(**(fields | changes))  # type: ignore[arg-type]


# Two good answers, a late one, a refusal, a timeout and a broken connection.
SIX = (
    sample(0.0, 0.5),
    sample(1.0, 2.0, scene="bridge"),
    sample(1.5, 8.0, sent_s=1.75),
    sample(2.0, 2.1, "throttled", retry_after="3"),
    sample(3.0, 7.0, "timeout"),
    sample(3.5, 3.5, "connection"),
)


def test_percentile_is_the_nearest_rank() -> None:
    """Of 1 to 1000, shuffled, the percentiles are 500, 900, 950 and 990."""
    values = [float((k * 7919) % 1000 + 1) for k in range(1000)]
    assert [percentile(values, p) for p in (50, 90, 95, 99)] == [500, 900, 950, 990]


@pytest.mark.parametrize(("percent", "needed"), [(50, 20), (90, 100), (95, 200), (99, 1000)])
def test_percentile_needs_ten_samples_beyond_it(percent: int, needed: int) -> None:
    """One sample short gives none, the full number gives one."""
    assert samples_needed(percent) == needed
    assert percentile([1.0] * (needed - 1), percent) is None
    assert percentile([1.0] * needed, percent) == 1.0


def test_rates_count_requests_answers_and_good_answers() -> None:
    """Six due in 4 s, three answered by 8 s, two of them within a second."""
    summary = summarize(SIX, conditions(), cpu_s=0.4)
    assert summary["wall_s"] == 8.0
    assert summary["offered_per_s"] == 6 / 4
    assert summary["achieved_per_s"] == 3 / 8
    assert summary["goodput_per_s"] == 2 / 8
    assert summary["good_share"] == pytest.approx(2 / 6)


def test_outcomes_are_counted_each_for_itself() -> None:
    """No failure hides in another's count, and a refusal without Retry-After is told."""
    bare = sample(3.9, 4.0, "throttled")
    summary = summarize([*SIX, bare], conditions(), cpu_s=0)
    assert summary["outcomes"] == {
        "ok": 3, "throttled": 2, "rejected": 0, "server_error": 0, "timeout": 1, "connection": 1,
    }  # fmt: skip
    assert summary["throttled_without_retry_after"] == 1
    assert summary["first_error"] == "it failed"


def test_latency_counts_from_when_the_request_was_due() -> None:
    """A request due at 1.5 s, sent at 1.75 s and answered at 8 s took 6.5 s, 0.25 s of it lag."""
    summary = summarize(SIX, conditions(), cpu_s=0.4)
    assert summary["latency_s"]["max"] == 6.5
    assert summary["generator"]["lag_max_s"] == 0.25
    assert summary["generator"]["cpu_share"] == pytest.approx(0.05)
    assert summary["scenes"]["bridge"]["max"] == 1.0
    assert summary["scenes"]["tower"]["n"] == 2


def test_stages_are_medians_of_what_answers_say() -> None:
    """In ms; an answer that says nothing is left out, and so is what failed."""
    said = ("queue;dur=1.0, rank;dur=30", "queue;dur=5, rank;dur=10", "queue;dur=3.5, rank;dur=20")
    answers = [replace(sample(0, 1), timings=timings) for timings in (*said, None)]
    failed = replace(sample(0, 1, "server_error"), timings="queue;dur=900")
    summary = summarize([*answers, failed], conditions(), cpu_s=0)
    assert summary["stages_ms"] == {"queue": 3.5, "rank": 20.0}
    console = Console(record=True, width=100)
    console.print(table(summary))
    assert "stage rank, median" in console.export_text()


def test_a_partial_answer_is_none_that_is_good() -> None:
    """It counts as an answer, with its latency, and by itself."""
    samples = [sample(0, 0.5), replace(sample(0, 0.5), partial=True)]
    summary = summarize(samples, conditions(), cpu_s=0)
    assert summary["outcomes"]["ok"] == summary["latency_s"]["n"] == 2
    assert summary["partial"] == 1
    assert summary["good_share"] == 0.5
    console = Console(record=True, width=100)
    console.print(table(summary))
    assert "of the ok, partial" in console.export_text()


def test_run_without_a_request_has_a_report() -> None:
    """A duration too short for an arrival gives zeros and gaps, not a crash."""
    summary = summarize([], conditions(), cpu_s=0)
    assert summary["requests"] == 0
    assert summary["goodput_per_s"] == 0
    assert summary["good_share"] is None
    Console(quiet=True).print(table(summary))


def test_written_samples_give_the_report_again(tmp_path: Path) -> None:
    """The raw lines hold what the figures were made of, beside report.json."""
    summary = summarize(SIX, conditions(), cpu_s=0.4)
    write(tmp_path / "out", SIX, summary)
    lines = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert max(line["latency_s"] for line in lines if line["outcome"] == "ok") == 6.5
    kept = json.loads((tmp_path / "out/report.json").read_text())
    assert kept["conditions"]["seed"] == 0
    assert kept["conditions"]["arrivals"] == "poisson"
    assert {"machine", "versions", "commit", "command"} <= set(kept)


def test_table_says_how_many_answers_a_percentile_lacks() -> None:
    """A reader sees why p95 is missing."""
    console = Console(width=100, record=True, quiet=True)
    with console.capture() as shown:
        console.quiet = False
        console.print(table(summarize(SIX, conditions(), cpu_s=0.4)))
    assert "needs 200 answers, has 3" in shown.get()
    assert "0.25 /s (33%)" in shown.get()
