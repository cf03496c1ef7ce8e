"""The report of a soak: figures, rows, files, and the command on a real server."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.record import findings as findings_of
from benchmarks.record import read_rows
from benchmarks.soak.__main__ import main
from benchmarks.soak.memory import MemorySample
from benchmarks.soak.outcomes import Outcome
from benchmarks.soak.plot import RED, plot
from benchmarks.soak.report import keep, summarize, telling, write
from benchmarks.soak.run import Findings, Soak, rechecks
from benchmarks.soak.verdict import Ending
from tests.benchmarks.soak.test_verdict import sound
from tests.tiny import save_tiny_base

METRICS = """# HELP realfill_arena_bytes Bytes.
realfill_arena_bytes 4096.0
realfill_stage_seconds_bucket{le="1.0",stage="swap"} 3.0
realfill_stage_seconds_created{stage="swap"} 1.0
realfill_stage_seconds_count{stage="swap"} 3.0
realfill_samples_total 9.0
"""


def findings() -> Findings:
    return Findings(sound(), Ending(status=0), METRICS, stop_s=1.5)


def test_the_summary_holds_what_the_record_saw() -> None:
    """Latency is that of answers under load only."""
    summary = summarize(Soak("nano", 60.0), findings())
    assert summary["violations"] == []
    assert summary["outcomes"]["answer"] == 3
    assert summary["latency_s"]["max"] == 3.0
    assert summary["pictures"] == {
        "kinds": 2, "repeated": 1, "within_one_level": 1, "differing": 0, "rechecked_alone": 1,
    }  # fmt: skip
    assert summary["memory"]["growth_pct"] == 0
    assert summary["conditions"]["scenes"] == 50


def test_only_metrics_of_memory_and_swaps_are_shown() -> None:
    """Without buckets and times of creation."""
    assert telling(METRICS) == {
        "realfill_arena_bytes": 4096.0,
        'realfill_stage_seconds_count{stage="swap"}': 3.0,
    }


def test_rows_and_files_are_kept(tmp_path: Path) -> None:
    """p95 has no row where three answers cannot tell it."""
    summary = summarize(Soak("nano", 60.0), findings())
    keep(summary, tmp_path / "rows")
    rows = {row.name: row for row in read_rows(tmp_path / "rows")}
    assert {name: row.value for name, row in rows.items()} == {
        "soak.minutes": 1.0,
        "soak.answers": 3.0,
        "soak.wrong_digests": 0.0,
        "soak.differing_pictures": 0.0,
        "soak.rss_growth_pct": 0.0,
        "soak.lost": 0.0,
        "soak.violations": 0.0,
    }
    assert (rows["soak.rss_growth_pct"].target, rows["soak.rss_growth_pct"].better) == (2, "lower")
    write(tmp_path / "out", findings(), summary)
    outcomes = (tmp_path / "out/outcomes.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in outcomes].count("answer") == 3
    assert json.loads((tmp_path / "out/report.json").read_text())["alias_moves"] == 1
    assert (tmp_path / "out/soak.png").stat().st_size > 1000


def test_a_failed_soak_misses_its_targets(tmp_path: Path) -> None:
    """What was lost and what was broken are rows, whatever the other figures are."""
    seen = sound()
    seen.sent += [5, 6]
    seen.outcomes += [
        Outcome(5, "scene1", "hung", 1.0, 9.0, detail="no answer within 8 s"),
        Outcome(6, "scene1", "server_error", 1.0, 2.0, detail="500: oh"),
    ]
    failed = Findings(seen, Ending(status=None), METRICS, stop_s=1.5)
    rows = {row.name: row for row in keep(summarize(Soak("nano", 60.0), failed), tmp_path / "rows")}
    assert (rows["soak.lost"].value, rows["soak.violations"].value) == (2, 2)
    missed = {finding.name for finding in findings_of(rows.values()) if finding.value is not None}
    assert missed == {"soak.lost", "soak.violations"}


def test_the_plot_draws_memory_where_it_was() -> None:
    """Flat memory is a level line near the top, rising memory a slope."""
    flat = np.asarray(plot([MemorySample(float(k), 100 << 20) for k in range(100)], [(5.0, 1.0)]))
    rows, _ = np.where((flat == RED).all(-1))
    assert np.ptp(rows) <= 2
    rising = plot([MemorySample(float(k), (k + 1) << 20) for k in range(100)], [])
    rows, _ = np.where((np.asarray(rising) == RED).all(-1))
    assert np.ptp(rows) > 100


def test_rechecks_ask_for_seen_pictures_by_digest() -> None:
    """Each alone, numbered after the load's requests, the same ones for the same seed."""
    record = sound()
    chosen = rechecks(record, Soak("nano", 60.0, rechecks=1))
    assert chosen == rechecks(record, Soak("nano", 60.0, rechecks=1))
    assert len(rechecks(record, Soak("nano", 60.0))) == 2
    [ask] = chosen
    assert (ask.index, ask.scene, ask.steps, ask.seeds) == (5, "scene1", 2, (0,))
    assert ask.digest in ("a", "b")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "MAX_CAPSULES=1"], "no setting of the server"),
        (["--field", "steps"], "not of the form NAME=VALUE"),
    ],
)
def test_a_wrong_option_is_explained(words: list[str], message: str, tmp_path: Path) -> None:
    """Status 2 and the form that is wanted."""
    answer = CliRunner().invoke(main, [*words, "--rows", str(tmp_path / "rows")])
    assert answer.exit_code == 2
    assert message in answer.output


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_minute_on_the_real_server_keeps_every_promise(tmp_path: Path) -> None:
    """Six scenes with room for two; a minute is no time to judge memory by."""
    words = ["--base", str(save_tiny_base(tmp_path / "base")), "--minutes", "1", "--scenes", "6"]
    words += ["--set", "REALFILL_HOST_BYTES=100000", "--max-growth", "50", "--move-every", "0.5"]
    words += ["--rows", str(tmp_path / "rows"), "--out", str(tmp_path / "out"), "--json"]
    answer = CliRunner().invoke(main, words, catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    summary = json.loads((tmp_path / "out/report.json").read_text())
    assert summary["violations"] == []
    assert summary["outcomes"]["answer"] > 50
    assert summary["outcomes"]["cancelled"] > 0
    assert summary["pictures"]["repeated"] > 50
    assert summary["alias_moves"] > 50
    assert len((tmp_path / "out/memory.jsonl").read_text().splitlines()) > 40
