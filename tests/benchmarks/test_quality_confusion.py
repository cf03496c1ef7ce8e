"""The confusion table, by hand and with the embedded matcher."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.quality.confusion import (
    Confusion,
    confusions_of,
    main,
    markdown,
    sites_of,
)
from benchmarks.record import read_rows
from realfill.nano.difficulties import synthetic_scene
from realfill.rank import loftr
from realfill.scene import Scene
from tests.fakes import LightMatcher

HAND = Confusion(("a", "b"), ((9.0, 2.0), (3.0, 2.5)), (8, 2), (4, 4))


def test_what_is_confused_by_hand() -> None:
    """Scene b has a wrong pair above its worst true one, and matches a better than itself."""
    assert HAND.confused == ("b",)
    assert HAND.confused_on_average == ("b",)
    fair = replace(HAND, means=((9.0, 2.0), (2.0, 2.5)))
    assert fair.confused_on_average == ()
    assert "| b | 3 | 2 | 2 | 4 |" in markdown(HAND)


@pytest.mark.weights
def test_the_embedded_matcher_tells_synthetic_scenes_apart() -> None:
    """True pairs have more matches than every wrong pairing, pair by pair."""
    scenes = [synthetic_scene("plain", seed=k, references=2) for k in range(3)]
    found, agreeing = confusions_of(loftr("nano"), sites_of(scenes))
    assert found.confused == agreeing.confused == ()
    assert min(found.least_true) > 2 * max(found.most_wrong)
    # Chance matches do not move alike: fewer of the wrong ones are left than of the true ones.
    lost = [1 - b / a for a, b in zip(found.averages, agreeing.averages, strict=True)]
    assert lost[0] < 0.5 < lost[1]


def test_a_single_reference_is_matched_with_the_truth() -> None:
    """Else there would be no pair; several references stay among themselves."""
    lone = synthetic_scene("plain", seed=0, references=1)
    assert lone.truth is not None
    assert torch.equal(sites_of([lone])[0].photos[1], lone.truth)
    assert len(sites_of([synthetic_scene("plain", seed=0, references=3)])[0].photos) == 3
    with pytest.raises(ValueError, match="two photographs of each"):
        confusions_of(LightMatcher(), sites_of([synthetic_scene("plain", seed=1), _bare(lone)]))
    with pytest.raises(ValueError, match="needs two places"):
        confusions_of(LightMatcher(), sites_of([lone]))


def test_scenes_that_share_a_photograph_are_one_place() -> None:
    """Else a place would be confused with itself; what only one of them shows is added."""
    first = synthetic_scene("plain", seed=0, references=3)
    second = replace(first, name="other", references=(first.truth, *first.references[1:]))  # type: ignore[arg-type]
    third = synthetic_scene("plain", seed=1)
    found = sites_of([first, third, second])
    assert [(site.name, len(site.photos)) for site in found] == [("plain_0", 4), ("plain_1", 3)]


def _bare(scene: Scene) -> Scene:
    return replace(scene, truth=None)


@pytest.mark.weights
def test_the_command_prints_and_records(tmp_path: Path) -> None:
    """JSON with the means of both tables, and two rows of each."""
    rows = tmp_path / "rows.jsonl"
    run = CliRunner().invoke(main, ["--no-demo", "--synthetic", "2", "--json", "--rows", str(rows)])
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    assert report["scenes"] == ["plain_0", "viewpoint_1"]
    assert len(report["means"]) == 2
    assert report["agreeing"]["means"][0][0] <= report["means"][0][0]
    names = ("rank.scenes_told_apart", "rank.matches_true_pairs")
    assert {row.name for row in read_rows(rows)} == {*names, *(f"{n}.agreeing" for n in names)}
    arguments = ["--no-demo", "--synthetic", "2", "--json", "--rows", str(rows)]
    smaller = CliRunner().invoke(main, [*arguments, "--working-px", "128"])
    assert json.loads(smaller.stdout)["means"][0][0] < report["means"][0][0] / 2
    assert len(read_rows(rows)) == 4
