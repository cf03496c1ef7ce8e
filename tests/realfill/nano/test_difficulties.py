"""Synthetic scenes: each is hard in the way that its name says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from realfill.nano.difficulties import (
    DIFFICULTIES,
    main,
    synthetic_scene,
    synthetic_scenes,
    world,
)
from realfill.nano.synthetic import Look, correspondences_of, photograph_of
from realfill.scene import load_scene

SIZE = (96, 96)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_a_scene_follows_from_its_seed(difficulty: str) -> None:
    """Equal seeds give equal scenes; the truth is shown outside the hole and nowhere inside."""
    first, again = (synthetic_scene(difficulty, seed=1, size=SIZE) for _ in range(2))  # type: ignore[arg-type]
    assert torch.equal(first.target, again.target)
    assert all(torch.equal(*pair) for pair in zip(first.references, again.references, strict=True))
    assert first.truth is not None
    known = first.mask == 0
    assert torch.equal(first.target[:, known], first.truth[:, known])
    assert bool((first.target[:, ~known] == 1).all())
    assert 0.08 < float(first.mask.mean()) < 0.26


def test_difficulties_share_layers_and_target() -> None:
    """Of one seed, only what the references show differs."""
    plain = world("plain", seed=1, size=SIZE)
    for difficulty in DIFFICULTIES[1:]:
        hard = world(difficulty, seed=1, size=SIZE)
        assert hard.target == plain.target
        assert all(
            torch.equal(a.picture, b.picture)
            for a, b in zip(plain.layers, hard.layers, strict=True)
        )
        assert hard.references != plain.references


def test_each_difficulty_changes_what_it_says_and_nothing_else() -> None:
    """Viewpoint moves the camera alone, moving the parts alone, the other three the look alone."""
    plain = world("plain", seed=1, size=SIZE).references
    for difficulty in DIFFICULTIES[1:]:
        hard = world(difficulty, seed=1, size=SIZE).references
        for easy, view in zip(plain, hard, strict=True):
            assert (view.camera != easy.camera) == (difficulty == "viewpoint")
            assert bool(view.moved) == (difficulty == "moving")
            assert (view.look != Look()) == (difficulty in ("light", "defocus", "style"))
    assert all(view.look.defocus_px > 0 for view in world("defocus", seed=1, size=SIZE).references)
    assert all(view.look.grain > 0 for view in world("style", seed=1, size=SIZE).references)


def test_more_references_change_none_of_the_first() -> None:
    """The third reference is the same with three as with five."""
    few, many = (world("style", seed=2, references=n, size=SIZE) for n in (3, 5))
    assert few.references == many.references[:3]


@pytest.mark.parametrize("seed", range(3))
def test_references_show_what_is_missing(seed: int) -> None:
    """Of the hole's points most are seen in a plain reference, at another place than their own."""
    place = world("plain", seed=seed, references=5, size=SIZE)
    scene = synthetic_scene("plain", seed=seed, size=SIZE)
    rows, columns = torch.where(scene.mask > 0)
    pixels = torch.stack([columns, rows], 1).double()
    for view in place.references:
        there, seen = correspondences_of(place.layers, place.target, view, pixels, SIZE)
        assert float(seen.double().mean()) > 0.6
        assert float((there - pixels)[seen].norm(dim=1).mean()) > 1
    assert scene.truth is not None
    shown = photograph_of(place.layers, place.target, SIZE)
    assert float((shown - scene.truth).abs().max()) <= 0.5 / 255 + 1e-6


def test_scenes_come_in_turn() -> None:
    """Names say what is hard; references are one to five; a longer row begins like a shorter."""
    scenes = synthetic_scenes(7, seed=0)
    assert [scene.name for scene in scenes[:2]] == ["plain_0", "viewpoint_1"]
    assert scenes[6].name == "plain_6"
    assert [len(scene.references) for scene in scenes] == [3, 1, 5, 2, 4, 3, 1]
    assert torch.equal(synthetic_scenes(1, seed=0)[0].target, scenes[0].target)


def test_photographs_make_other_layers() -> None:
    """The pictures change, the geometry does not follow from them."""
    drawn, real = (
        synthetic_scene("plain", seed=0, size=SIZE, pictures=p)
        for p in ("drawn", "photographs")  # type: ignore[arg-type]
    )
    assert not torch.equal(drawn.target, real.target)
    assert torch.equal(drawn.mask, real.mask)


def test_unknown_difficulties_and_too_many_references_are_refused() -> None:
    """One sentence with what there is to choose from."""
    with pytest.raises(ValueError, match="choose one of plain, viewpoint"):
        world("rain", seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="6 references: a scene has 1 to 5"):
        world("plain", seed=0, references=6)


def test_the_command_writes_folders_that_read_back_equal(tmp_path: Path) -> None:
    """RealBench's layout, to the bit."""
    run = CliRunner().invoke(main, [str(tmp_path), "--count", "2", "--seed", "0"])
    assert run.exit_code == 0, run.output
    for scene in synthetic_scenes(2):
        read = load_scene(tmp_path / scene.name)
        assert read.truth is not None
        assert scene.truth is not None
        assert torch.equal(read.truth, scene.truth)
        assert torch.equal(read.mask, scene.mask)
        assert len(read.references) == len(scene.references)
        assert all(
            torch.equal(a, b) for a, b in zip(read.references, scene.references, strict=True)
        )
