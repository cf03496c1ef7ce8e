"""Statistics of a run, and the files and the table that keep them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, get_args

from rich.table import Table

from benchmarks import surroundings
from benchmarks.load.driver import Outcome, Sample, is_loopback

PERCENTS = (50, 90, 95, 99)
# Shown in the table; the report has them all.
LONGEST_STAGES = 5


@dataclass(frozen=True)
class Conditions:
    """What a run was: all that is needed to repeat it."""

    url: str
    rate_per_s: float
    duration_s: float
    zipf_s: float
    seed: int
    warmup: int
    timeout_s: float
    slo_s: float
    scenes: tuple[str, ...]
    payload_bytes: Mapping[str, int]
    fields: Mapping[str, str]


def samples_needed(percent: int) -> int:
    """Fewest samples that leave about ten beyond the percentile: 20 for p50, 1000 for p99."""
    return -(-1000 // (100 - percent))


def percentile(values: Sequence[float], percent: int) -> float | None:
    """Nearest-rank percentile, or None where the samples are too few to tell it."""
    if len(values) < samples_needed(percent):
        return None
    rank = -(-len(values) * percent // 100)
    return sorted(values)[rank - 1]


def summarize(samples: Sequence[Sample], conditions: Conditions, *, cpu_s: float) -> dict[str, Any]:
    """Sum a run up.

    Rates are per second of wall time, from the start to the last answer, or the planned duration
    where that is longer. Latency is that of the answers with status 2xx; every other request counts
    as not good, and so does an answer from which a deadline took candidates.

    Args:
        samples: One per request.
        conditions: Of the run.
        cpu_s: Processor time that the generator itself used.
    """
    wall_s = max([conditions.duration_s, *(sample.finished_s for sample in samples)])
    answers = [sample for sample in samples if sample.outcome == "ok"]
    answered = [sample.latency_s for sample in answers]
    whole = [sample.latency_s for sample in answers if not sample.partial]
    good = sum(latency <= conditions.slo_s for latency in whole)
    lags = [sample.lag_s for sample in samples]
    counts = Counter(sample.outcome for sample in samples)
    throttled = [sample for sample in samples if sample.outcome == "throttled"]
    return {
        "requests": len(samples),
        "wall_s": wall_s,
        "offered_per_s": len(samples) / conditions.duration_s,
        "achieved_per_s": len(answered) / wall_s,
        "goodput_per_s": good / wall_s,
        "good_share": good / len(samples) if samples else None,
        "outcomes": {outcome: counts[outcome] for outcome in get_args(Outcome)},
        "partial": len(answers) - len(whole),
        "first_error": next((s.error for s in samples if s.error is not None), None),
        "throttled_without_retry_after": sum(s.retry_after is None for s in throttled),
        "latency_s": _latency(answered),
        "stages_ms": _stages([s.timings for s in answers if s.timings]),
        "scenes": {
            scene: _latency([s.latency_s for s in samples if s.scene == scene if s.outcome == "ok"])
            for scene in conditions.scenes
        },
        "generator": {
            "cpu_share": cpu_s / wall_s,
            "lag_max_s": max(lags, default=None),
            "lag_p50_s": percentile(lags, 50),
            "same_machine": is_loopback(conditions.url),
        },
        "conditions": {"arrivals": "poisson", "popularity": "zipf", **asdict(conditions)},
        "machine": surroundings.machine(),
        "versions": surroundings.versions(),
        "commit": surroundings.commit(),
        "command": surroundings.command(),
    }


def _latency(values: Sequence[float]) -> dict[str, float | None]:
    percentiles = {f"p{percent}": percentile(values, percent) for percent in PERCENTS}
    return {"n": len(values), **percentiles, "max": max(values, default=None)}


def _stages(timings: Sequence[str]) -> dict[str, float]:
    """Median milliseconds of each stage that answers tell of; see ``Sample``."""
    found: dict[str, list[float]] = {}
    for said in timings:
        for stage, _, ms in (part.strip().partition(";dur=") for part in said.split(",")):
            found.setdefault(stage, []).append(float(ms))
    return {stage: median(values) for stage, values in found.items()}


def write(folder: Path, samples: Sequence[Sample], summary: Mapping[str, Any]) -> None:
    """Keep the raw samples beside the report, so that every figure can be found again."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({**asdict(s), "latency_s": s.latency_s, "lag_s": s.lag_s}) for s in samples]
    (folder / "samples.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "report.json").write_text(json.dumps(summary, indent=2) + "\n")


def table(summary: Mapping[str, Any]) -> Table:
    """The report for a person's eyes."""
    outcomes, latency = summary["outcomes"], summary["latency_s"]
    slo_s = summary["conditions"]["slo_s"]
    lines = Table(title="Open-loop load", title_justify="left", show_header=False)
    lines.add_column("what")
    lines.add_column("figure", justify="right")
    lines.add_row("offered", f"{summary['offered_per_s']:.2f} /s ({summary['requests']} requests)")
    lines.add_row("achieved", f"{summary['achieved_per_s']:.2f} /s")
    share = summary["good_share"]
    within = "" if share is None else f" ({share:.0%})"
    lines.add_row(f"goodput within {slo_s:g} s", f"{summary['goodput_per_s']:.2f} /s{within}")
    for percent in PERCENTS:
        value = latency[f"p{percent}"]
        needed = f"needs {samples_needed(percent)} answers, has {latency['n']}"
        lines.add_row(f"latency p{percent}", needed if value is None else f"{value:.3f} s")
    if latency["max"] is not None:
        lines.add_row("latency max", f"{latency['max']:.3f} s")
    stages = sorted(summary["stages_ms"].items(), key=lambda stage: -stage[1])
    for stage, ms in stages[:LONGEST_STAGES]:
        lines.add_row(f"stage {stage}, median", f"{ms:.0f} ms")
    for outcome, count in outcomes.items():
        if count or outcome != "rejected":
            lines.add_row(outcome.replace("_", " "), str(count))
    if summary["partial"]:
        lines.add_row("of the ok, partial", str(summary["partial"]))
    if summary["first_error"] is not None:
        lines.add_row("first error", summary["first_error"])
    generator = summary["generator"]
    if generator["lag_max_s"] is not None:
        lines.add_row("generator lag, max", f"{generator['lag_max_s'] * 1000:.1f} ms")
    lines.add_row("generator CPU", f"{generator['cpu_share']:.0%} of a core")
    return lines
