"""Classical fills, and the trials they are measured on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.quality.fills import CLASSICAL, biharmonic, ring_mean
from benchmarks.quality.trials import Photograph, held_out, random_hole, trials


def square_hole(size_px: int = 32) -> torch.Tensor:
    mask = torch.zeros(size_px, size_px)
    mask[10:20, 12:22] = 1
    return mask


def test_ring_mean_fills_with_the_colour_next_to_the_hole() -> None:
    """Far pixels and what lies in the hole do not count."""
    target = torch.zeros(3, 32, 32)
    target[:, 6:24, 8:26] = torch.tensor([0.2, 0.4, 0.6])[:, None, None]
    mask = square_hole()
    target[:, mask.bool()] = 1.0
    filled = ring_mean(target, mask)
    assert torch.allclose(filled[:, 15, 15], torch.tensor([0.2, 0.4, 0.6]))


def test_biharmonic_continues_a_slope() -> None:
    """A linear gradient is its own smoothest continuation."""
    truth = torch.linspace(0.1, 0.9, 32).expand(3, 32, 32)
    filled = biharmonic(truth, square_hole())
    assert torch.allclose(filled, truth, atol=1e-3)


@pytest.mark.parametrize("name", CLASSICAL)
def test_fills_do_not_see_the_hole_and_leave_the_rest(name: str) -> None:
    """The answer is the same whatever the hole held, and known pixels stay bit-identical."""
    mask, target = square_hole(), torch.rand(3, 32, 32)
    blanked = torch.where(mask > 0, torch.ones_like(target), target)
    filled = CLASSICAL[name](target, mask)
    assert torch.equal(filled, CLASSICAL[name](blanked, mask))
    assert torch.equal(filled[:, mask == 0], target[:, mask == 0])


def test_random_holes_have_the_promised_size() -> None:
    """Sides are 20 to 50 % of the square, so nothing is empty and at most a quarter is missing."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        mask = random_hole(generator, 64)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        for line in (mask.any(0), mask.any(1)):
            assert 0.18 * 64 <= int(line.sum()) <= 0.52 * 64


def test_trials_follow_from_their_seed_alone() -> None:
    """The k-th trial is the same however many there are, and holes differ between trials."""
    photographs = [Photograph("a", torch.rand(3, 40, 60)), Photograph("b", torch.rand(3, 50, 50))]
    few, many = (list(trials(photographs, count, 32, seed=1)) for count in (2, 4))
    assert torch.equal(few[1].truth, many[1].truth)
    assert torch.equal(few[1].mask, many[1].mask)
    assert [trial.name for trial in many] == ["a", "b", "a", "b"]
    assert not torch.equal(many[0].mask, many[2].mask)


def test_held_out_photographs_include_the_scenes_references(tmp_path: Path) -> None:
    """The bundled three come first; an absent folder of scenes is no error."""
    (tmp_path / "square" / "ref").mkdir(parents=True)
    pixels = np.zeros((40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "square" / "ref" / "0.png")
    names = [photograph.name for photograph in held_out(tmp_path)]
    assert names == ["motorcycle_left", "motorcycle_right", "coffee", "square 0"]
    assert len(held_out(tmp_path / "absent")) == 3
