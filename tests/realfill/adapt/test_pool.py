"""Crops, colours and holes that training draws from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from realfill.adapt.pool import Views
from realfill.complete.windows import crop_mask, window_of
from realfill.config import TrainingConfig
from realfill.nano.demo import motorcycle_scene
from realfill.scene import Scene

SIZE_PX = 64
COUNT = 40


@pytest.fixture
def scene() -> Scene:
    """One dark reference without contrast, and a bright target with a hole left of the middle."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(64, 80)
    mask[16:48, 16:40] = 1
    return Scene(
        name="tower",
        references=(0.1 + 0.1 * torch.rand(3, 64, 64, generator=generator),),
        target=0.5 + 0.5 * torch.rand(3, 64, 80, generator=generator),
        mask=mask,
        truth=None,
        digests={},
    )


def draws_of(scene: Scene, **changes: float) -> list[tuple[torch.Tensor, ...]]:
    """Forty draws under a configuration."""
    views = Views(scene, SIZE_PX, TrainingConfig(**changes))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    return [views.draw(generator) for _ in range(COUNT)]


def references_in(draws: list[tuple[torch.Tensor, ...]]) -> list[tuple[torch.Tensor, ...]]:
    """Those whose loss counts everywhere."""
    return [draw for draw in draws if bool((draw[2] == 1).all())]


def test_hole_share_draws_the_targets_hole(scene: Scene) -> None:
    """At a share of 1 a reference misses the hole's shape and nothing else, half the time there."""
    shape = crop_mask(scene.mask, window_of(scene.mask, SIZE_PX), SIZE_PX)
    holes = [hole for _, hole, _ in references_in(draws_of(scene, hole_share=1.0))]
    assert {float(hole.sum()) for hole in holes} == {float(shape.sum())}
    there = sum(torch.equal(hole, shape) for hole in holes)
    assert 0 < there < len(holes)


def test_complement_share_decides_which_side_is_missing(scene: Scene) -> None:
    """Rectangles at most cover part; all but them is more than the other half."""
    missing = {
        share: [
            float(hole.mean())
            for _, hole, _ in references_in(draws_of(scene, complement_share=share))
        ]
        for share in (0.0, 1.0)
    }
    assert len(missing[0.0]) == len(missing[1.0])
    for rectangles, complement in zip(missing[0.0], missing[1.0], strict=True):
        assert rectangles + complement == pytest.approx(1)


def test_colour_match_moves_references_towards_the_target(scene: Scene) -> None:
    """Up to the target's brightness, and no draw of the target changes."""
    plain, moved = (draws_of(scene, colour_match=share) for share in (0.0, 1.0))
    levels = [float(pixels.mean()) for pixels, _, _ in references_in(moved)]
    assert all(float(pixels.mean()) < 0.2 for pixels, _, _ in references_in(plain))
    assert min(levels) < 0.3
    assert max(levels) > 0.6
    assert all(float(p.min()) >= 0 and float(p.max()) <= 1 for p, _, _ in moved)
    known = torch.stack([p.mean() for p, _, w in moved if not bool((w == 1).all())])
    assert float(known.min()) > 0.5


def test_target_of_which_nothing_is_known_has_no_colours(scene: Scene) -> None:
    """A strip of one pixel leaves no known pixel in the window: references keep their colours."""
    mask = torch.ones_like(scene.mask)
    mask[:, 0] = 0
    plain, moved = (draws_of(replace(scene, mask=mask), colour_match=share) for share in (0.0, 1.0))
    for before, after in zip(plain, moved, strict=True):
        assert torch.equal(before[0], after[0])


def test_colour_jitter_varies_references_alone(scene: Scene) -> None:
    """Around their own brightness, each by another amount."""
    varied = draws_of(scene, colour_jitter=0.3)
    levels = [float(pixels.mean()) for pixels, _, _ in references_in(varied)]
    assert max(levels) > 1.3 * min(levels)
    assert min(levels) > 0.3 * 0.15
    assert max(levels) < 3 * 0.15
    targets = [pixels for pixels, _, weights in varied if not bool((weights == 1).all())]
    assert all(abs(float(pixels.mean()) - 0.75) < 0.02 for pixels in targets)


def test_references_that_cannot_be_aligned_are_shown_at_several_sizes(scene: Scene) -> None:
    """Wider than the photograph: what lies beyond it is missing and does not count."""
    missing = [float(1 - weights.mean()) for _, _, weights in draws_of(scene, align_share=1.0)]
    shape = crop_mask(scene.mask, window_of(scene.mask, SIZE_PX), SIZE_PX).mean()
    # Of a window of one and a half short sides the photograph fills less than a half.
    assert max(missing) > 0.45
    assert max(missing) > float(shape)


def test_references_that_can_be_aligned_show_the_window() -> None:
    """At about its size and place, and never the same twice."""
    scene = motorcycle_scene()
    assert scene.truth is not None
    window = window_of(scene.mask, SIZE_PX)
    views = Views(scene, SIZE_PX, TrainingConfig(align_share=1.0))
    near = [views._reference_window(0, torch.Generator().manual_seed(k)) for k in range(20)]
    assert all(abs(one.side / window.side - 1) < 0.3 for one in near)
    assert all(abs(one.left - window.left) < window.side / 3 for one in near)
    assert len(set(near)) > 10


@pytest.mark.parametrize(
    "name", ["complement_share", "hole_share", "align_share", "colour_jitter", "full_from"]
)
def test_shares_are_shares(name: str) -> None:
    """Anything outside of [0, 1] is refused by name."""
    with pytest.raises(ValueError, match=name):
        TrainingConfig(**{name: 1.5})


def test_without_the_union_the_hole_of_the_target_is_shown(scene: Scene) -> None:
    """What an ablation compares with: a target's draw whose mask leaves part of its hole open."""
    shown = {
        union: [
            bool((hole < 1 - weights).any())
            for _, hole, weights in draws_of(scene, target_union=union)
            if bool((weights == 0).any())
        ]
        for union in (True, False)
    }
    assert len(shown[True]) == len(shown[False]) > 0
    assert not any(shown[True])
    assert any(shown[False])
