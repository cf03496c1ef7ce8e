"""Rows are complete, appended whole, and held against the targets by their latest value."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import surroundings
from benchmarks.record import Row, findings, main, read_rows, record
from benchmarks.targets import TARGETS, on_cuda

FIELDS = {
    "name", "value", "unit", "better", "target", "peer", "peer_value", "ratio",
    "command", "machine", "device", "versions", "commit", "time",
}  # fmt: skip


def row(name: str, value: float, **changes: object) -> Row:
    """A hand-made row; only what a test is about is given."""
    fields: dict[str, object] = {
        "name": name,
        "value": value,
        "unit": "s",
        "better": "lower",
        "target": None,
        "peer": None,
        "peer_value": None,
        "ratio": None,
        "command": "make bench",
        "machine": "two cores",
        "device": "cpu",
        "versions": {},
        "commit": "0" * 40,
        "time": "2026-01-01T00:00:00+00:00",
    }
    return Row(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of rows that does not exist yet, in a folder that does not either."""
    return tmp_path / "results" / "rows.jsonl"


def write(path: Path, *lines: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(line)) + "\n" for line in lines))


def test_recorded_row_holds_every_field(rows: Path) -> None:
    """A row says what was measured, on what, at which commit, when and by which command."""
    record("demo.train_s", 100.5, "s", command="make demo", path=rows)
    kept = json.loads(rows.read_text())
    assert set(kept) == FIELDS
    assert (kept["value"], kept["unit"], kept["command"]) == (100.5, "s", "make demo")
    assert (kept["target"], kept["better"]) == (120, "lower")
    assert kept["device"] == "cpu"
    assert "cores" in kept["machine"]
    assert kept["versions"]["torch"]
    assert datetime.fromisoformat(kept["time"]).tzinfo is not None


def test_ratio_above_one_means_better_than_the_peer(rows: Path) -> None:
    """The ratio follows from both values, in the direction that is better."""
    faster = record("extra.speed", 30, "/s", peer="eager", peer_value=10, path=rows)
    shorter = record("extra.time_s", 2, "s", better="lower", peer="eager", peer_value=10, path=rows)
    assert (faster.ratio, shorter.ratio) == (3, 5)


def test_record_appends_and_keeps_what_was_there(rows: Path) -> None:
    """A second measurement of a name does not replace the first."""
    record("demo.train_s", 130, "s", path=rows)
    record("demo.train_s", 110, "s", path=rows)
    assert [row.value for row in read_rows(rows)] == [130, 110]


def test_parallel_writers_keep_every_line_whole(rows: Path) -> None:
    """Forty rows from eight threads are forty readable lines."""

    def five(writer: int) -> None:
        for k in range(5):
            record(f"extra.w{writer}", k, "s", command="x" * 5000, path=rows)

    threads = [threading.Thread(target=five, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_rows(rows)) == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "demo.train_s", "value": math.nan, "unit": "s"}, "value is nan"),
        ({"name": "Demo train", "value": 1, "unit": "s"}, "Row name 'Demo train'"),
        ({"name": "demo.train_s", "value": 1, "unit": "ms"}, "unit is 'ms'"),
        ({"name": "demo.train_s", "value": 1, "unit": "s", "better": "higher"}, "better is"),
        ({"name": "demo.train_s", "value": 1, "unit": "s", "target": 900}, "bound is 900"),
    ],
)
def test_record_refuses_what_cannot_be_judged(
    rows: Path, arguments: dict[str, object], message: str
) -> None:
    """A number that is none, a malformed name or a contradiction of the table writes nothing."""
    with pytest.raises(ValueError, match=message):
        record(**arguments, path=rows)  # type: ignore[arg-type]
    assert not rows.exists()


def test_findings_judge_the_latest_row_of_each_name() -> None:
    """A miss that was mended later is no finding, a success that was lost is one."""
    mended = [row("demo.train_s", 130), row("demo.train_s", 110)]
    lost = [row("demo.main_s", 300), row("demo.main_s", 400)]
    found = {finding.name: finding.value for finding in findings([*mended, *lost])}
    assert "demo.train_s" not in found
    assert found["demo.main_s"] == 400
    assert found["swap.p99_ms.cuda"] is None
    assert len(found) == len(TARGETS) - 1


def test_bound_itself_is_met_from_both_sides() -> None:
    """Exactly 2.5 dB of gain and exactly 0 graph captures are enough."""
    found = findings(
        [
            row("adapt.psnr_gain_db", 2.5, unit="dB", better="higher"),
            row("engine.captures_after_warmup.cuda", 0, unit="captures"),
        ]
    )
    assert {"adapt.psnr_gain_db", "engine.captures_after_warmup.cuda"}.isdisjoint(
        finding.name for finding in found
    )


def test_row_with_its_own_target_is_held_to_it() -> None:
    """A name that the table lacks is judged by the target in the row, or not at all."""
    found = findings([row("extra.time_s", 9, target=5.0), row("extra.other_s", 9)])
    names = [finding.name for finding in found]
    assert "extra.time_s" in names
    assert "extra.other_s" not in names


def test_targets_prints_misses_and_gaps_and_succeeds(rows: Path) -> None:
    """The command tells both kinds apart and ends with status 0."""
    write(rows, row("demo.train_s", 130), row("demo.main_s", 300))
    outcome = CliRunner().invoke(main, ["targets", "--rows", str(rows)])
    assert outcome.exit_code == 0
    assert "130 s" in outcome.output
    assert "demo.main_s" not in outcome.output
    assert f"1 missed, {len(TARGETS) - 2} without a row." in outcome.output


def test_targets_json_is_a_list_of_findings(rows: Path) -> None:
    """The machine-readable form holds the same names."""
    write(rows, row("demo.train_s", 130))
    outcome = CliRunner().invoke(main, ["targets", "--json", "--rows", str(rows)])
    found = json.loads(outcome.output)
    assert outcome.exit_code == 0
    assert len(found) == len(TARGETS)
    assert [f["value"] for f in found if f["name"] == "demo.train_s"] == [130]


def test_targets_names_the_line_that_is_no_row(rows: Path) -> None:
    """A torn line is an error with file and line, not a silent gap."""
    write(rows, row("demo.train_s", 130))
    with rows.open("a") as file:
        file.write('{"name": "demo')
    outcome = CliRunner().invoke(main, ["targets", "--rows", str(rows)])
    assert outcome.exit_code == 1
    assert "rows.jsonl:2 is not a row" in outcome.output


def test_add_appends_all_rows_or_none(rows: Path, tmp_path: Path) -> None:
    """A file with one bad line adds nothing; mended, it adds every line under its command."""
    file = tmp_path / "measured.jsonl"
    good = '{"name": "demo.train_s", "value": 100, "unit": "s"}\n'
    file.write_text(good + '{"name": "demo.main_s", "value": "fast", "unit": "s"}\n')
    words = ["add", str(file), "--command", "make demo", "--rows", str(rows)]
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 1
    assert "measured.jsonl:2 cannot be added" in refused.output
    assert not rows.exists()
    file.write_text(good)
    assert CliRunner().invoke(main, words).exit_code == 0
    assert [(kept.value, kept.command) for kept in read_rows(rows)] == [(100, "make demo")]


def test_cuda_is_a_part_of_the_name() -> None:
    """The part may stand anywhere, but must stand alone."""
    assert on_cuda("swap.p99_ms.cuda")
    assert not on_cuda("swap.cudagraph_ms")


@pytest.mark.parametrize(
    ("flags", "processor"),
    [
        ("fma avx avx2", "AMD EPYC (AVX2)"),
        ("avx2 avx512f avx512_bf16", "AMD EPYC (AVX-512 with bf16)"),
        ("sse2", "AMD EPYC"),
    ],
)
def test_a_machine_is_told_from_another_of_its_name(
    flags: str, processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two generations of one name differ by a factor of four."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu {flags}\n\n" * 2)
    monkeypatch.setattr(surroundings, "CPUINFO", cpuinfo)
    assert surroundings.machine().startswith(f"{processor}, ")


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A repository with one file and one commit, by git's words."""
    monkeypatch.delenv("REALFILL_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def run(*words: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    run("init")
    (tmp_path / "file").write_text("1")
    run("add", ".")
    run("commit", "-m", "first")
    return run


def test_commit_tells_a_changed_tree(git: Callable[..., None], tmp_path: Path) -> None:
    """New rows leave the commit clean; any other change marks it dirty, new files too."""
    clean = surroundings.commit(tmp_path)
    assert len(clean) == 40
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "rows.jsonl").write_text("{}\n")
    assert surroundings.commit(tmp_path) == clean
    (tmp_path / "new").write_text("1")
    assert surroundings.commit(tmp_path) == f"{clean}-dirty"
    (tmp_path / "new").unlink()
    (tmp_path / "file").write_text("2")
    assert surroundings.commit(tmp_path) == f"{clean}-dirty"


def test_commit_is_that_of_the_start(git: Callable[..., None], tmp_path: Path) -> None:
    """What is committed meanwhile is not what ran; only rows may be."""
    began = surroundings.commit(tmp_path)
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "rows.jsonl").write_text("{}\n")
    git("add", ".")
    git("commit", "-m", "rows")
    assert surroundings.commit(tmp_path) == began
    (tmp_path / "file").write_text("2")
    git("commit", "-am", "second")
    assert surroundings.commit(tmp_path) == f"{began}-dirty"


def test_a_tree_that_was_dirty_at_the_start_stays_so(
    git: Callable[..., None], tmp_path: Path
) -> None:
    """Though what ran was put away since."""
    (tmp_path / "file").write_text("2")
    began = surroundings.commit(tmp_path)
    assert began.endswith("-dirty")
    git("checkout", "file")
    assert surroundings.commit(tmp_path) == began


def test_commit_of_another_repository_is_none_of_ours(
    git: Callable[..., None], tmp_path: Path
) -> None:
    """As where the package is installed in an environment that lies in one; nor is there any."""
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert surroundings.commit(inside) == "unknown"
    assert surroundings.commit(tmp_path.parent) == "unknown"


def test_the_commit_is_read_when_the_module_is(root: Path) -> None:
    """Before anything is measured."""
    program = (
        "import subprocess; asked = []; run = subprocess.run;"
        "subprocess.run = lambda words, **k: (asked.append(words[0]), run(words, **k))[1];"
        "import benchmarks.record; print(set(asked))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, check=True, capture_output=True, text=True
    )
    assert done.stdout == "{'git'}\n"


def test_targets_marks_rows_of_a_changed_tree(rows: Path) -> None:
    """Those that miss in the table, those that meet their target by name below it."""
    dirty = f"{'0' * 40}-dirty"
    write(
        rows,
        row("demo.main_s", 400, commit=dirty),
        row("demo.train_s", 100, commit=dirty),
        row("demo.complete4_s", 1),
    )
    outcome = CliRunner().invoke(main, ["targets", "--rows", str(rows)], terminal_width=200)
    assert "0000000000-dirty" in outcome.output
    assert "1 met by a tree with changes that no commit has: demo.train_s." in outcome.output
