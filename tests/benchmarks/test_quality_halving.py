"""The regret of halving is that of the scores that were seen, and the steps are those made."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.quality.evaluation import Bench, places_of
from benchmarks.quality.halving import main, regret_of
from benchmarks.record import read_rows
from realfill.config import preset
from tests.tiny import save_tiny_base, tiny_capsule


@pytest.mark.parametrize(
    ("steps", "share", "looks"),
    [(None, (8 * 8 + 4 * 6 + 2 * 6) / 160, 2), (2, (8 * 1 + 4 * 1) / 16, 1)],
)
def test_steps_are_counted_and_the_first_is_among_all(
    tmp_path: Path, steps: int | None, share: float, looks: int
) -> None:
    """Of the base's twenty steps there are looks after 8 and 14, of two after the first."""
    base = str(save_tiny_base(tmp_path / "base"))
    bench = Bench(base, "cpu", "nano", capsules=tmp_path, samples=tmp_path)
    [place] = places_of(None, demo=False, synthetic=1, config=preset("demo"))
    capsule = tiny_capsule(bench.runner.base, "tower", seed=1)
    regret = regret_of(bench, place, capsule, range(8), steps=steps)
    assert regret.share == pytest.approx(share)
    assert len(regret.spearman) == looks
    assert regret.same == (regret.first_db == regret.halved_db)
    assert 0 < regret.mean_db < 40


def test_the_command_needs_scenes(tmp_path: Path) -> None:
    """Without any it says what to give, and records nothing."""
    rows = tmp_path / "rows.jsonl"
    words = ["--no-demo", "--synthetic", "0", "--scenes", str(tmp_path)]
    words += ["--rows", str(rows), "--out", str(tmp_path)]
    answer = CliRunner().invoke(main, words)
    assert answer.exit_code == 1
    assert "has no scene with target/gt" in answer.output
    assert not rows.exists() or not read_rows(rows)
