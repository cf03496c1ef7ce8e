"""The demo scenes."""

from __future__ import annotations

from pathlib import Path

import torch

from realfill.nano.demo import coffee_scene, demo_scenes, motorcycle_scene, write_scene


def test_motorcycle_is_one_reference_and_a_hole() -> None:
    """The right view with a hole; the truth is known everywhere and shown nowhere in the hole."""
    scene = motorcycle_scene()
    assert len(scene.references) == 1
    assert scene.truth is not None
    known = scene.mask == 0
    assert torch.equal(scene.target[:, known], scene.truth[:, known])
    assert bool((scene.target[:, ~known] == 1).all())
    assert 0.03 < float(scene.mask.mean()) < 0.3


def test_coffee_is_seen_from_other_viewpoints() -> None:
    """Three references, none of which shows the target's pixels."""
    scene = coffee_scene()
    assert len(scene.references) == 3
    assert scene.truth is not None
    for reference in scene.references:
        assert reference.shape == scene.target.shape
        assert float((reference - scene.truth).abs().mean()) > 0.02


def test_written_scene_reads_back_equal(tmp_path: Path) -> None:
    """What a user's files would say is what the demo holds in memory."""
    for scene in demo_scenes():
        read = write_scene(scene, tmp_path / scene.name)
        assert read.name == scene.name
        assert torch.equal(read.target, scene.target)
        assert torch.equal(read.mask, scene.mask)
        assert read.truth is not None
        assert scene.truth is not None
        assert torch.equal(read.truth, scene.truth)
        assert len(read.digests) >= len(scene.references) + 2
