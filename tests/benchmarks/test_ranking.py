"""The ranking's benchmark measures what it says, and refuses what would mean nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import surroundings
from benchmarks.ranking import peer
from benchmarks.ranking.__main__ import bench_speed, bench_truth, main, prepared, ranker
from benchmarks.ranking.memory import peak_bytes
from benchmarks.ranking.pictures import pictures
from benchmarks.record import read_rows
from realfill.rank import load_matcher

pytestmark = pytest.mark.weights
CPU = torch.device("cpu")


def test_candidates_go_from_true_to_another_place() -> None:
    """They are alike outside the hole, and fall in score inside it."""
    seen = pictures(128, 4)
    assert seen.candidates.shape == (4, 1, 128, 128)
    known = seen.mask <= 0
    assert all(torch.equal(c[0][known], seen.candidates[0, 0][known]) for c in seen.candidates)
    assert float(seen.mask.mean()) == 0.25
    assert not torch.equal(seen.candidates[0], seen.candidates[3])


def test_the_peer_counts_what_the_ranking_counts(tmp_path: Path) -> None:
    """Naive pairs of plain kornia and the ranking give one table, with something in it."""
    bench = prepared("nano", "cpu", candidates=2, repeats=1, rows=tmp_path / "rows")
    truth = peer.counts(peer.naive_kornia(bench.torch_matcher), bench.seen)
    assert truth[0, 0] > 50
    for matcher in (bench.torch_matcher, bench.onnx_matcher):
        assert torch.equal(ranker(bench, matcher)().per_reference, truth)


def test_unequal_counts_are_not_timed(tmp_path: Path) -> None:
    """A matcher that counts otherwise is refused before the clock starts; so is a useless one."""
    bench = prepared("nano", "cpu", candidates=1, repeats=1, rows=tmp_path / "rows")
    with pytest.raises(RuntimeError, match=r"sift counts .*mend the matcher"):
        bench_speed(replace(bench, onnx_matcher=load_matcher("sift")))
    bench.torch_matcher.threshold = 0.999
    with pytest.raises(RuntimeError, match="60 are needed"):
        bench_truth(replace(bench, matcher=bench.torch_matcher))
    assert not (tmp_path / "rows").exists()


def test_truth_names_the_device_that_matched(tmp_path: Path) -> None:
    """Its rows have one name for all devices, since precision is a matter of weights."""

    @dataclass(frozen=True)
    class OnCuda:
        device = torch.device("cuda")

    bench = prepared("nano", "cpu", candidates=1, repeats=1, rows=tmp_path / "rows")
    assert {row.device for row in bench_truth(bench)} == {"cpu"}
    elsewhere = replace(bench, torch_matcher=OnCuda())  # type: ignore[arg-type]
    found = {row.name: row.device for row in bench_truth(elsewhere)}
    assert set(found) == {"rank.motorcycle_precision", "rank.motorcycle_matches"}
    assert set(found.values()) == {surroundings.device(cuda=True)}


def test_the_peak_is_that_of_the_call() -> None:
    """Memory that a call takes and gives back is seen, and what was there before is not."""
    before = torch.ones(2**22)
    peak = peak_bytes(lambda: torch.ones(2**24).sum(), CPU)
    assert before.numel() == 2**22
    assert 2**26 <= peak < 2**27


def test_the_command_records_its_rows(tmp_path: Path) -> None:
    """Every part, from the command line, with one candidate."""
    rows = tmp_path / "rows"
    words = ["--candidates", "1", "--repeats", "1", "--rows", str(rows)]
    answer = CliRunner().invoke(main, words, catch_exceptions=False)
    assert answer.exit_code == 0
    found = {row.name: row for row in read_rows(rows)}
    assert found["rank.ratio_kornia"].ratio == found["rank.ratio_kornia"].value
    assert found["rank.1x3_ms"].peer_value is not None
    assert found["rank.onnx_ratio"].value > 0
    assert 2**20 < found["rank.peak_bytes"].value < 2**28
    assert found["rank.motorcycle_precision"].value >= 0.7
    assert found["rank.motorcycle_matches"].value >= 60
