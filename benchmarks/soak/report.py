"""A soak's figures: summary, table, rows, and a picture of memory and latency over time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from rich.table import Table

from benchmarks import surroundings
from benchmarks.load.report import PERCENTS, percentile
from benchmarks.record import Row, record
from benchmarks.soak.memory import growth_pct
from benchmarks.soak.outcomes import OutcomeKind
from benchmarks.soak.plot import plot
from benchmarks.soak.run import Findings, Soak
from benchmarks.soak.verdict import LOST, violations, wrong_digests

# Of the server's own metrics, those that tell of memory tiers and swaps.
TELLING = ("arena", "capsule", "evict", "host", "swap", "tier")


def summarize(plan: Soak, findings: Findings) -> dict[str, Any]:
    """Sum a soak up; ``violations`` is empty where every promise was kept."""
    seen, gallery = findings.record, findings.record.gallery
    counts = Counter(outcome.kind for outcome in seen.outcomes)
    # Requests of the quiet at the end, which ask for a digest, would flatter the latency.
    answered = [
        outcome.latency_s
        for outcome in seen.outcomes
        if outcome.kind == "answer" and outcome.asked_digest is None
    ]
    memory = [sample.rss_bytes for sample in seen.memory]
    return {
        "violations": violations(
            seen,
            findings.ending,
            max_growth_pct=plan.max_growth_pct,
            moving=plan.move_every_s < plan.duration_s,
        ),
        "requests": len(seen.sent),
        "outcomes": {kind: counts[kind] for kind in get_args(OutcomeKind)},
        "wrong_digests": len(wrong_digests(seen)),
        "pictures": {
            "kinds": len(gallery),
            "repeated": gallery.repeated,
            "within_one_level": gallery.near,
            "differing": len(gallery.far),
            "rechecked_alone": sum(o.asked_digest is not None for o in seen.outcomes),
        },
        "alias_moves": seen.moves,
        "probes": {"asked": seen.probes, "failed": len(seen.probe_failures)},
        "latency_s": {
            **{f"p{percent}": percentile(answered, percent) for percent in PERCENTS},
            "max": max(answered, default=None),
        },
        "memory": {
            "growth_pct": growth_pct(seen.memory),
            "first_bytes": memory[0] if memory else None,
            "last_bytes": memory[-1] if memory else None,
            "max_bytes": max(memory, default=None),
        },
        "stop_s": findings.stop_s,
        "server_metrics": telling(findings.metrics),
        "conditions": asdict(plan),
        "machine": surroundings.machine(),
        "versions": surroundings.versions(),
        "commit": surroundings.commit(),
        "command": surroundings.command(),
    }


def telling(metrics: str) -> dict[str, float]:
    """The server's metrics of memory tiers and swaps, histograms' buckets left out."""
    found = {}
    for line in metrics.splitlines():
        name, _, value = line.rpartition(" ")
        if line.startswith("#") or "_bucket" in name or "_created" in name:
            continue
        if any(word in name for word in TELLING):
            found[name] = float(value)
    return found


def write(folder: Path, findings: Findings, summary: Mapping[str, Any]) -> None:
    """Keep the summary, every outcome, the memory and the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    seen = findings.record
    (folder / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
    _write_lines(folder / "outcomes.jsonl", [asdict(outcome) for outcome in seen.outcomes])
    _write_lines(folder / "memory.jsonl", [asdict(sample) for sample in seen.memory])
    (folder / "metrics.txt").write_text(findings.metrics)
    answers = [(o.ended_s, o.latency_s) for o in seen.outcomes if o.kind == "answer"]
    plot(seen.memory, answers).save(folder / "soak.png")


def _write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(one)}\n" for one in records))


def keep(summary: Mapping[str, Any], rows: Path) -> list[Row]:
    """Record the rows; p95 only where there were answers enough to tell it."""
    kept = [
        record("soak.minutes", summary["conditions"]["duration_s"] / 60, "min", path=rows),
        record("soak.answers", summary["outcomes"]["answer"], "answers", path=rows),
    ]
    lower = {
        "soak.lost": (sum(summary["outcomes"][kind] for kind in LOST), "requests"),
        "soak.violations": (len(summary["violations"]), "promises"),
        "soak.wrong_digests": (summary["wrong_digests"], "answers"),
        "soak.differing_pictures": (summary["pictures"]["differing"], "pictures"),
        "soak.rss_growth_pct": (summary["memory"]["growth_pct"], "%"),
        "soak.p95_s": (summary["latency_s"]["p95"], "s"),
    }
    kept += [
        record(name, value, unit, better="lower", path=rows)
        for name, (value, unit) in lower.items()
        if value is not None
    ]
    return kept


def table(summary: Mapping[str, Any]) -> Table:
    """The report for a person's eyes."""
    lines = Table(title="Soak", title_justify="left", show_header=False)
    lines.add_column("what")
    lines.add_column("figure", justify="right")
    pictures, memory, latency = summary["pictures"], summary["memory"], summary["latency_s"]
    for kind, count in summary["outcomes"].items():
        if count or kind in ("answer", "throttled", "cancelled"):
            lines.add_row(kind.replace("_", " "), str(count))
    lines.add_row("answers by a wrong adapter", str(summary["wrong_digests"]))
    lines.add_row("kinds of pictures", str(pictures["kinds"]))
    lines.add_row(
        "repeated, of them alone", f"{pictures['repeated']}, {pictures['rechecked_alone']}"
    )
    lines.add_row("  differing by one level", str(pictures["within_one_level"]))
    lines.add_row("  differing by more", str(pictures["differing"]))
    lines.add_row("alias moves", str(summary["alias_moves"]))
    probes = summary["probes"]
    lines.add_row("probes, failed", f"{probes['asked']}, {probes['failed']}")
    for percent in PERCENTS:
        value = latency[f"p{percent}"]
        if value is not None:
            lines.add_row(f"latency p{percent}", f"{value:.3f} s")
    if memory["growth_pct"] is not None:
        lines.add_row("memory at the end", f"{memory['last_bytes'] / 2**20:.0f} MiB")
        lines.add_row("memory growth after warm-up", f"{memory['growth_pct']:+.2f} %")
    for name, value in summary["server_metrics"].items():
        lines.add_row(name, f"{value:g}")
    lines.add_row("stopped within", f"{summary['stop_s']:.1f} s")
    return lines
