"""The steps sweep and the ablation, by hand and from end to end on a tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.quality import ablation, evaluation, sweep
from benchmarks.quality.evaluation import SCORES, Judgement
from benchmarks.quality.metric import PSNR, Metric
from benchmarks.quality.sampling import candidates
from benchmarks.quality.selection import Interval
from benchmarks.record import read_rows
from realfill.config import PRESETS, preset
from realfill.nano.demo import write_scene
from service.engine import Runner
from tests.benchmarks.scenes import noise
from tests.fakes import LightMatcher
from tests.tiny import save_tiny_base, tiny_base

QUICK = preset("demo", steps=2, batch=2, rank=2, pool=4, probe_every=0)


def judged(*quality: float, metric: str = "psnr_db") -> Judgement:
    """Four candidates of one scene, the last of which is ranked best."""
    q, s = torch.tensor(quality, dtype=torch.float64), torch.arange(1, 5).double()
    order = tuple(s.argsort(descending=True, stable=True).tolist())
    return Judgement({metric: q}, dict.fromkeys(SCORES, s), order)


def test_a_setting_within_the_standard_error_is_accepted() -> None:
    """The reference's is sqrt(5/3 / 4) = 0.65 of a mean of 11.5: 10.9 will do, 10.8 will not."""
    settings = [("ddpm", 200), ("ddim", 20), ("ddim", 10), ("ddim", 5)]
    scenes = [[judged(10, 11, 12, 13)], [judged(*[10.9] * 4)], [judged(*[20.0] * 4)]]
    scenes.append([judged(*[10.8] * 4)])
    lines = sweep.lines_of(scenes, [PSNR], settings)
    assert [line.accepted for line in lines] == [True, True, True, False]
    assert sweep.fastest(lines).steps == 10
    assert lines[0].agreement == pytest.approx(1)
    assert [line.matches for line in lines] == [2.5] * 4


def test_dreamsim_decides_where_it_was_measured() -> None:
    """Lower is better there, and PSNR is only shown."""
    dreamsim = Metric("dreamsim", PSNR.measure, higher_is_better=False)
    first, worse = (
        judged(0.1, 0.2, 0.1, 0.2, metric="dreamsim"),
        judged(0.3, 0.3, 0.3, 0.3, metric="dreamsim"),
    )
    for judgement, level in ((first, 10.0), (worse, 30.0)):
        judgement.qualities["psnr_db"] = torch.full((4,), level, dtype=torch.float64)
    lines = sweep.lines_of([[first], [worse]], [PSNR, dreamsim], [("ddpm", 200), ("ddpm", 50)])
    assert [line.accepted for line in lines] == [True, False]
    assert lines[1].within == {"psnr_db": True, "dreamsim": False}


def test_verdicts_follow_the_intervals() -> None:
    """Above zero the default wins, below it loses, around it nothing shows."""
    better, worse, unclear = (
        Interval(0.2, 0.1, 0.3),
        Interval(-0.2, -0.3, -0.1),
        Interval(0, -1, 1),
    )
    assert ablation.verdict_of([better, unclear]) == "default is better"
    assert ablation.verdict_of([worse, unclear]) == "default is worse"
    assert ablation.verdict_of([worse, better]) == "mixed"
    assert ablation.verdict_of([unclear, unclear]) == "no difference shows"


def test_an_ablation_line_by_hand() -> None:
    """The variant is 2 below the default on every seed; its top quarter by score is its last."""
    default, variant = [judged(10, 11, 12, 13)], [judged(8, 9, 10, 11)]
    line = ablation.line_of(ablation.VARIANTS[0], variant, default, [PSNR])
    assert line.means == {"psnr_db": 9.5}
    assert line.loss["psnr_db"] == Interval(2, 2, 2)
    assert line.verdict == "default is better"
    ranked = ablation.line_of(ablation.RANKINGS[0], default, default, [PSNR])
    assert ranked.means == {"psnr_db": 13}
    assert ranked.loss["psnr_db"].mean == pytest.approx(-1.5)


def test_every_variant_is_another_configuration() -> None:
    """None of them is what the default does already."""
    demo = PRESETS["demo"]
    digests = {preset("demo", **variant.changes).digest for variant in ablation.VARIANTS}
    assert len(digests | {demo.digest}) == len(ablation.VARIANTS) + 1


def test_a_nearest_mask_changes_candidates_only_where_it_differs() -> None:
    """On a hole that cells tile both reductions are equal; else the candidates are others."""
    runner = Runner(tiny_base())
    target = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    aligned, ragged = torch.zeros(2, 32, 32)
    aligned[8:24, 8:24] = 1
    ragged[9:27, 9:27] = 1
    for mask, same in ((aligned, True), (ragged, False)):
        plain, nearest = (
            candidates(runner, target, mask, (0, 1), steps=2, nearest=n) for n in (False, True)
        )
        assert torch.allclose(plain, nearest, atol=1e-5) == same


def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One scene of noise on a tiny base."""
    save_tiny_base(tmp_path / "base")
    write_scene(noise(), tmp_path / "scenes" / "noise")
    monkeypatch.setattr(evaluation, "loftr", lambda *_: LightMatcher())
    monkeypatch.setitem(PRESETS, "demo", QUICK)
    given = ["--base", str(tmp_path / "base"), "--scenes", str(tmp_path / "scenes"), "--no-demo"]
    given += ["--synthetic", "0", "--seeds", "2", "--out", str(tmp_path / "out")]
    given += ["--capsules", str(tmp_path / "capsules"), "--rows", str(tmp_path / "rows.jsonl")]
    return [*given, "--json"]


def test_the_sweep_reports_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Report, table, plot and row."""
    given = arguments(tmp_path, monkeypatch)
    monkeypatch.setattr(sweep, "SETTINGS", (("ddpm", 4), ("ddim", 2)))
    run = CliRunner().invoke(sweep.main, given)
    assert run.exit_code == 0, run.output
    report = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [(line["sampler"], line["steps"]) for line in report["lines"]] == [
        ("ddpm", 4),
        ("ddim", 2),
    ]
    assert "| ddim, 2 |" in (tmp_path / "out" / "sweep.md").read_text()
    assert (tmp_path / "out" / "sweep.png").is_file()
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert (row.name, row.value) == ("quality.fewest_steps_accepted", report["fastest"][1])


def test_the_ablation_reports_every_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default, one variant and the rankings; the default is as good as itself."""
    given = arguments(tmp_path, monkeypatch)
    run = CliRunner().invoke(ablation.main, [*given, "--only", "nearest mask"])
    assert run.exit_code == 0, run.output
    report = json.loads((tmp_path / "out" / "ablation.json").read_text())
    names = [line["name"] for line in report["lines"]]
    assert names == ["default", "nearest mask", *(v.name for v in ablation.RANKINGS)]
    assert report["lines"][0]["loss"]["psnr_db"] == {"mean": 0, "low": 0, "high": 0}
    assert {row.name for row in read_rows(tmp_path / "rows.jsonl")} == {
        "quality.defaults_contradicted"
    }
