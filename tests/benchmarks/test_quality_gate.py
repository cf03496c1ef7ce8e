"""What the gate says of fillings whose truth is known, by hand and with the embedded matcher."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.quality.evaluation import Place
from benchmarks.quality.gate import Filling, elsewhere, held_out, main, markdown, rates, verdicts
from benchmarks.record import read_rows
from realfill.config import preset
from realfill.nano.difficulties import synthetic_scene
from realfill.rank.gate import Thresholds
from tests.realfill.rank.test_gate import ranking

COVERAGES = {"truth": 0.8, "truth, decoded": 0.3, "another place": 0.4, "base alone": 0.0}


def fillings(scene: str, lift: float = 0.0) -> list[Filling]:
    """One of each kind."""
    seen = ranking([coverage + lift for coverage in COVERAGES.values()], [40, 30, 20, 10])
    return [Filling(scene, kind, seen, k) for k, kind in enumerate(COVERAGES)]


def test_verdicts_and_both_errors_by_hand() -> None:
    """Half of the false fillings are supported, and half of the true ones are not even weak."""
    found = verdicts(fillings("a"), {"a": Thresholds(0.4, 0.35, 1)})
    assert found["truth"] == {"supported": 1, "weak": 0, "unsupported": 0}
    assert found["truth, decoded"] == {"supported": 0, "weak": 0, "unsupported": 1}
    assert found["another place"]["supported"] == found["base alone"]["unsupported"] == 1
    assert rates(found) == (50.0, 50.0)
    assert "| as set | another place | 1 | 1 | 0 | 0 |" in markdown({"as set": found})


def test_a_scene_has_no_say_in_its_own_thresholds() -> None:
    """Those of a come from b alone, where everything is covered more."""
    both = [*fillings("a"), *fillings("b", lift=0.1)]
    found = held_out(both, {"a": {"b"}, "b": {"a"}})
    assert found["a"].supported == pytest.approx(0.9)
    assert found["b"].supported == pytest.approx(0.8)


def test_the_same_place_is_not_elsewhere() -> None:
    """Scenes that share a photograph show each other's truth."""
    config = preset("demo")
    one, two = (synthetic_scene("plain", seed=k, references=2) for k in range(2))
    twin = replace(two, name="twin", references=(one.references[0],), truth=two.truth)
    places = [Place(scene, config, "synthetic") for scene in (one, two, twin)]
    assert list(elsewhere(places[0], places)) == [places[1]]
    assert list(elsewhere(places[1], places)) == [places[0]]


@pytest.mark.weights
def test_the_command_tells_truth_from_invention_on_drawn_scenes(tmp_path: Path) -> None:
    """Every true filling covers more than every false one of its scene; two rows are kept."""
    rows = tmp_path / "rows.jsonl"
    words = ["--no-demo", "--synthetic", "3", "--seeds", "2", "--json"]
    words += ["--out", str(tmp_path / "out"), "--rows", str(rows)]
    run = CliRunner().invoke(main, words)
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    scenes = {entry["scene"] for entry in report["fillings"]}
    assert len(scenes) == 3
    for scene in scenes:
        mine = [entry for entry in report["fillings"] if entry["scene"] == scene]
        true = [e["coverage"] for e in mine if e["kind"] == "truth"]
        false = [e["coverage"] for e in mine if e["kind"] in ("another place", "base alone")]
        assert len(false) == 4
        assert min(true) > max(false)
    assert set(report["verdicts"]) == {"as set", "from other scenes", "from these scenes"}
    assert (tmp_path / "out" / "gate.md").read_text().startswith("| thresholds |")
    names = [row.name for row in read_rows(rows)]
    assert names == ["rank.gate_false_supported_pct", "rank.gate_true_unsupported_pct"]
