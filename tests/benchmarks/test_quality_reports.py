"""The two quality reports, from end to end on a tiny base of random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from benchmarks.quality import adapt_report, nano_report
from benchmarks.quality.adaptation import capsule_path, measure, sheet_rows, square_of, trained
from benchmarks.quality.sampling import candidates
from benchmarks.record import read_rows
from realfill.config import PRESETS, preset
from realfill.scene import Scene, load_scene
from service.engine import Runner
from tests.fakes import LightMatcher
from tests.tiny import save_tiny_base, tiny_base, tiny_capsule

QUICK = preset("demo", steps=2, batch=2, rank=2, pool=4, probe_every=0)


def scene(size: tuple[int, int] = (40, 60)) -> Scene:
    """Noise with a hole in the middle."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(size)
    mask[10:30, 20:40] = 1
    truth = torch.rand(3, *size, generator=generator)
    references = (torch.rand(3, 40, 40, generator=generator),)
    return Scene("noise", references, truth * (1 - mask), mask, truth, {})


def write(place: Scene, folder: Path) -> Path:
    """A scene as a folder in RealBench's layout."""
    for part in ("ref", "target"):
        (folder / part).mkdir(parents=True)
    assert place.truth is not None
    files = {"ref/0.png": place.references[0], "target/target.png": place.target}
    files |= {"target/gt.png": place.truth, "target/mask.png": place.mask.expand(3, -1, -1)}
    for name, pixels in files.items():
        rounded = (pixels * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
        Image.fromarray(rounded).save(folder / name)
    return folder


def test_the_square_counts_only_pixels_that_the_truth_has() -> None:
    """A window beyond a narrow image is missing there, but not measured there."""
    place = scene((20, 60))
    mask = torch.zeros(20, 60)
    mask[:, 5:55] = 1
    square = square_of(replace(place, mask=mask), 32)
    assert bool((square.hole <= square.mask).all())
    assert square.hole.sum() < square.mask.sum()
    assert square.hole[0].sum() == 0


def test_a_scene_without_truth_is_refused() -> None:
    """There would be nothing to measure against."""
    with pytest.raises(ValueError, match=r"add target/gt\.png"):
        square_of(replace(scene(), truth=None), 32)


def test_candidates_keep_the_known_region_and_change_with_the_capsule() -> None:
    """Beyond the feather a candidate is its target; the adapter shows inside the hole."""
    runner, square = Runner(tiny_base()), square_of(scene(), 32)
    capsule = tiny_capsule(runner.base)
    plain = candidates(runner, square.target, square.mask, (0, 1), steps=2)
    adapted = candidates(runner, square.target, square.mask, (0, 1), capsule=capsule, steps=2)
    assert torch.equal(plain[0, :, 0], square.target[:, 0])
    assert not torch.equal(plain, adapted)
    again = candidates(runner, square.target, square.mask, (1,), steps=2)
    assert torch.allclose(again[0], plain[1], atol=1e-3)


def test_an_outcome_ranks_and_reports_every_fill() -> None:
    """Means, order and matches agree with each other, and the report is plain JSON."""
    runner = Runner(tiny_base())
    capsule = tiny_capsule(runner.base)
    outcome = measure(runner, LightMatcher(), scene(), capsule, (0, 1, 2), steps=2)
    best = outcome.adapted.order[0]
    assert outcome.adapted.matches[best] == max(outcome.adapted.matches)
    report = json.loads(json.dumps(outcome.report()))
    assert set(report["fills"]) == {"base", "adapted", "ring mean", "biharmonic"}
    means = [report["fills"][side]["means"]["psnr_db"] for side in ("base", "adapted")]
    assert report["psnr_gain_db"] == pytest.approx(means[1] - means[0])
    assert [len(tiles) for _, tiles in sheet_rows(outcome, (0, 1, 2))] == [3, 5, 3]


def test_a_capsule_is_trained_once(tmp_path: Path) -> None:
    """The second call reads the file; another configuration or scene has another file."""
    base, place = tiny_base(), scene()
    path = capsule_path(tmp_path, base, place, QUICK)
    steps: list[int] = []
    first = trained(path, base, place, QUICK, lambda record: steps.append(record.step))
    assert steps == [1, 2]
    assert trained(path, base, place, QUICK, lambda record: steps.append(record.step)) == first
    assert steps == [1, 2]
    brighter = replace(place, target=place.target / 2)
    others = {
        capsule_path(tmp_path, base, place, replace(QUICK, seed=1)),
        capsule_path(tmp_path, base, brighter, QUICK),
        capsule_path(tmp_path, tiny_base(1), place, QUICK),
    }
    assert path not in others
    assert len(others) == 3


def summary(**changes: Any) -> dict[str, Any]:
    """Means that clear the bar, unless changed."""
    means = {
        "scenes": 5,
        "psnr_gain_db": 3.0,
        "worst_scene": "noise",
        "worst_scene_gain_db": 0.5,
        "ssim": 0.5,
        "classical_ssim": {"ring mean": 0.3, "biharmonic": 0.4},
        "matches_ratio": 2.5,
        "best_psnr_gain_db": 0.1,
    }
    return means | changes


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"psnr_gain_db": 2.4}, [0]),
        ({"worst_scene_gain_db": 0.0}, [1]),
        ({"classical_ssim": {"ring mean": 0.3, "biharmonic": 0.6}}, [2]),
        ({"matches_ratio": 1.9}, [3]),
    ],
)
def test_each_part_of_the_bar_is_judged_by_itself(
    changes: dict[str, Any], missed: list[int]
) -> None:
    """A miss is named, and only that one."""
    verdicts = adapt_report.verdicts_of(summary(**changes))
    assert [k for k, verdict in enumerate(verdicts) if not verdict.met] == missed


def test_the_rows_carry_targets_and_peers(tmp_path: Path) -> None:
    """The SSIM has to beat the better classical fill, whose value stands beside it."""
    path = tmp_path / "rows.jsonl"
    adapt_report.record_rows(summary(), device="cpu", path=path)
    rows = {row.name: row for row in read_rows(path)}
    assert rows["adapt.psnr_gain_db"].target == 2.5
    assert rows["adapt.ssim"].peer_value == rows["adapt.ssim"].target == 0.4
    assert rows["adapt.matches_ratio"].value == 2.5


@pytest.mark.weights
def test_the_adapt_report_measures_a_folder_of_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command trains, samples, prints a verdict on every part of the bar, and exits with 0."""
    monkeypatch.setitem(PRESETS, "quick", QUICK)
    write(scene(), tmp_path / "scenes" / "noise")
    (tmp_path / "scenes" / "no_truth" / "target").mkdir(parents=True)
    assert load_scene(tmp_path / "scenes" / "noise").truth is not None
    words = ["--base", str(save_tiny_base(tmp_path / "base")), "--no-demo", "--preset", "quick"]
    words += ["--scenes", str(tmp_path / "scenes"), "--seeds", "2", "--steps", "2"]
    words += ["--out", str(tmp_path / "out"), "--rows", str(tmp_path / "rows.jsonl")]
    answer = CliRunner().invoke(adapt_report.main, words, catch_exceptions=False)
    assert answer.exit_code == 0
    assert "mean PSNR gain over the base" in answer.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [place["scene"] for place in report["scenes"]] == ["noise"]
    assert (tmp_path / "out" / "noise.png").is_file()
    assert len(list((tmp_path / "out" / "capsules").iterdir())) == 1
    assert {row.name for row in read_rows(tmp_path / "rows.jsonl")} >= {"adapt.psnr_gain_db"}


def test_the_nano_report_measures_fills_and_draws_a_sheet(tmp_path: Path) -> None:
    """With --json the report is all that stands on the standard output."""
    words = ["--base", str(save_tiny_base(tmp_path / "base")), "--holes", "2", "--steps", "2"]
    words += ["--out", str(tmp_path / "out"), "--rows", str(tmp_path / "rows.jsonl"), "--json"]
    answer = CliRunner().invoke(nano_report.main, words, catch_exceptions=False)
    assert answer.exit_code == 0
    report = json.loads(answer.stdout)
    assert len(report["readings"]) == 2
    assert set(report["means"]) == {"base", "ring mean", "biharmonic"}
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > 5 * 192
    rows = {row.name: row for row in read_rows(tmp_path / "rows.jsonl")}
    assert rows["nano.autoencoder_psnr_db"].value == report["autoencoder_psnr_db"]
    assert rows["nano.fill_ssim"].peer_value is not None


def test_a_missing_base_is_said_in_one_sentence(tmp_path: Path) -> None:
    """No traceback, and a status that is not 0."""
    words = ["--base", str(tmp_path / "absent"), "--out", str(tmp_path / "out")]
    words += ["--rows", str(tmp_path / "rows.jsonl")]
    answer = CliRunner().invoke(nano_report.main, words)
    assert answer.exit_code == 1
    assert "No base" in answer.output
