"""The paper's tables, from end to end on a tiny base of random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from benchmarks.quality import evaluation, tables
from benchmarks.quality.chart import chart
from benchmarks.quality.evaluation import (
    SCORES,
    Bench,
    Judgement,
    Place,
    places_of,
    short,
    within,
)
from benchmarks.quality.metric import metrics_of
from benchmarks.quality.selection import FILTER_RATES
from benchmarks.quality.summary import (
    Entry,
    correlations,
    markdown_table,
    table_one,
    table_two,
)
from benchmarks.record import read_rows
from realfill.config import PRESETS, preset
from realfill.nano.demo import write_scene
from realfill.rank import rank_candidates
from tests.benchmarks.scenes import noise
from tests.fakes import LightMatcher
from tests.tiny import save_tiny_base

QUICK = preset("demo", steps=2, batch=2, rank=2, pool=4, probe_every=0)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench over a tiny base, with a matcher that sees light."""
    save_tiny_base(tmp_path / "base")
    monkeypatch.setattr(evaluation, "loftr", lambda *_: LightMatcher())
    folders = {"capsules": tmp_path / "capsules", "samples": tmp_path / "samples"}
    return Bench(str(tmp_path / "base"), "cpu", "light", **folders, steps=2)


def judged(quality: list[float], score: list[float]) -> Judgement:
    """A scene of which both metrics and all scores are given."""
    q, s = (torch.tensor(x, dtype=torch.float64) for x in (quality, score))
    order = tuple(s.argsort(descending=True, stable=True).tolist())
    return Judgement({"psnr_db": q, "ssim": q / 100}, dict.fromkeys(SCORES, s), order)


def entries() -> list[Entry]:
    """Two scenes: a score that knows the quality, and one that has it upside down."""
    place = Place(noise("good"), QUICK, "folder")
    other = Place(noise("bad"), QUICK, "folder")
    base = judged([10, 10, 10, 10], [0, 0, 0, 0]).qualities
    return [
        Entry(place, base, judged([11, 12, 13, 16], [1, 2, 3, 4])),
        Entry(other, base, judged([20, 22, 24, 26], [4, 3, 2, 1])),
    ]


def test_tables_by_hand() -> None:
    """Means of 13 and 23; the top quarter keeps 16 and 20."""
    metrics = metrics_of([])
    one = table_one(entries(), metrics)
    assert one["base"]["psnr_db"] == 10
    assert one["adapted"]["psnr_db"] == (13 + 23) / 2
    two = table_two(entries(), metrics)
    assert set(two) == set(SCORES)
    kept = two["count"]["kept"]["psnr_db"]
    assert kept == [18, (41 / 3 + 22) / 2, (14.5 + 21) / 2, (16 + 20) / 2]
    assert two["count"]["top25_gain"]["psnr_db"]["mean"] == pytest.approx(0)
    rho = correlations(entries(), metrics)["count"]["psnr_db"]
    assert rho["scenes"] == pytest.approx({"good": 1, "bad": -1})
    assert rho["mean"] == pytest.approx(0)
    assert rho["pooled"] == pytest.approx(0)


def test_candidates_are_sampled_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call reads 8-bit pictures; other seeds, samplers and adapters are others."""
    place = Place(noise(), QUICK, "folder")
    capsule = bench.capsule(place)
    first = bench.candidates(place, range(3), capsule=capsule)
    assert torch.equal((first * 255).round() / 255, first)
    variants: list[dict[str, Any]] = [{"sampler": "ddpm"}, {"steps": 3}, {"capsule": None}]
    for variant in variants:
        other = bench.candidates(place, range(3), **{"capsule": capsule, **variant})
        assert not torch.equal(other, first)
    monkeypatch.setattr(evaluation, "candidates", lambda *_, **__: pytest.fail("sampled again"))
    assert torch.equal(bench.candidates(place, range(3), capsule=capsule), first)


def test_scores_look_where_they_say(bench: Bench) -> None:
    """The rim holds the hole's matches and more, the whole picture those of the rim and more."""
    place = Place(noise(), QUICK, "folder")
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scores = bench.judged(place, images, metrics_of([])).scores
    assert bool((scores["count"] <= scores["rim"]).all())
    assert bool((scores["rim"] <= scores["whole"]).all())
    assert float(scores["whole"].sum()) > float(scores["count"].sum())


def test_matches_within_a_mask_are_those_that_ranking_counts() -> None:
    """Counted from a ranking of whole pictures, or by ranking with the mask: the same."""
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(32, 32)
    mask[8:24, 8:32] = 1
    references = noise().references
    whole = rank_candidates(LightMatcher(), images, torch.ones(32, 32), references)
    direct = rank_candidates(LightMatcher(), images, mask, references)
    count, confidence = within(whole, mask)
    assert count.tolist() == direct.scores.tolist()
    assert confidence.tolist() == pytest.approx(direct.confidence.tolist(), rel=1e-5)


def test_scenes_come_from_everywhere(tmp_path: Path) -> None:
    """The demo's, the folder's with truth, synthetic ones; the last are trained for shorter."""
    write_scene(noise("with"), tmp_path / "with")
    write_scene(replace(noise(), truth=None), tmp_path / "without")
    found = places_of(tmp_path, demo=True, synthetic=1, config=PRESETS["demo"])
    assert [place.origin for place in found] == ["demo", "demo", "folder", "synthetic"]
    assert found[2].scene.name == "with"
    assert [place.config.steps for place in found] == [210, 210, 210, 100]
    assert short(QUICK) == QUICK
    with pytest.raises(ValueError, match="--synthetic 10"):
        places_of(tmp_path / "nowhere", demo=False, synthetic=0, config=QUICK)


def test_the_command_writes_report_tables_sheets_and_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two scenes of a folder; a second run trains and samples nothing, and reports the same."""
    save_tiny_base(tmp_path / "base")
    for k in range(2):
        write_scene(noise(f"noise{k}", k), tmp_path / "scenes" / f"noise{k}")
    monkeypatch.setattr(evaluation, "loftr", lambda *_: LightMatcher())
    monkeypatch.setitem(PRESETS, "demo", QUICK)
    out = tmp_path / "out"
    arguments = ["--base", str(tmp_path / "base"), "--scenes", str(tmp_path / "scenes")]
    arguments += ["--no-demo", "--synthetic", "0", "--seeds", "4", "--steps", "2", "--json"]
    arguments += ["--out", str(out), "--capsules", str(tmp_path / "capsules")]
    arguments += ["--rows", str(tmp_path / "rows.jsonl")]
    first = CliRunner().invoke(tables.main, arguments)
    assert first.exit_code == 0, first.output
    report = json.loads((out / "tables.json").read_text())
    assert report["scenes"] == 2
    assert report["table_2"]["count"]["rates"] == list(FILTER_RATES)
    assert len(report["by_scene"][0]["adapted"]["scores"]["whole"]) == 4
    text = (out / "tables.md").read_text()
    assert "| ranking, 75% filtered |" in text
    assert {path.name for path in out.glob("*.png")} == {
        "noise0.png",
        "noise1.png",
        "filter_psnr_db.png",
        "filter_ssim.png",
        "candidates.png",
    }
    rows = {row.name: row for row in read_rows(tmp_path / "rows.jsonl")}
    gain = report["table_2"]["ranking"]["top25_gain"]
    assert rows["rank.top25_psnr_gain_db"].value == gain["psnr_db"]["low"]
    assert rows["rank.top25_ssim_gain"].target == 0
    monkeypatch.setattr(evaluation, "trained", lambda path, *_: path.read_bytes())
    monkeypatch.setattr(evaluation, "candidates", lambda *_, **__: pytest.fail("sampled again"))
    second = CliRunner().invoke(tables.main, arguments)
    assert second.exit_code == 0, second.output
    assert json.loads((out / "tables.json").read_text()) == report


def test_a_metric_without_weights_stops_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, no traceback."""
    monkeypatch.delenv("REALFILL_LPIPS", raising=False)
    words = ["--metric", "lpips", "--synthetic", "1", "--no-demo"]
    words += ["--rows", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]
    run = CliRunner().invoke(tables.main, words)
    assert run.exit_code == 1
    assert "set REALFILL_LPIPS" in run.output
    assert "Traceback" not in run.output


def test_markdown_aligns_numbers() -> None:
    """Text to the left, numbers to the right."""
    lines = markdown_table(["scene", "dB"], [["a", "1.0"]]).splitlines()
    assert lines == ["| scene | dB |", "| --- | ---: |", "| a | 1.0 |"]


def test_a_chart_puts_points_where_they_belong() -> None:
    """The larger of two values is drawn further up and to the right, in the series' colour."""
    picture = chart({"one": [(0, 0), (1, 1)]}, title="t", x_label="x", y_label="y", lines=False)
    assert isinstance(picture, Image.Image)
    blue = [
        (x, y) for x in range(720) for y in range(480) if picture.getpixel((x, y)) == (0, 114, 178)
    ]
    left, right = min(blue), max(blue)
    assert left[1] > right[1] + 200
    assert right[0] > left[0] + 400
    with pytest.raises(ValueError, match="all finite"):
        chart({"one": [(0.0, float("nan"))]}, title="t", x_label="x", y_label="y", lines=True)
