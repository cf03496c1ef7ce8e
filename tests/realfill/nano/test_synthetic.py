"""Layers, cameras and looks: what a picture shows follows from the geometry."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from realfill.nano.synthetic import (
    Camera,
    Layer,
    Look,
    View,
    correspondences_of,
    developed,
    lifted,
    photograph_of,
    rendered,
    seen_at,
)

SIZE = (48, 64)
TURNED = Camera((0.1, -0.05, 0.2), yaw=0.1, pitch=-0.06, roll=0.2, zoom=1.2)


def backdrop(depth: float = 1.5, seed: int = 0) -> Layer:
    """Smooth colours behind everything."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 8, 8, generator=generator) * 0.6 + 0.2
    picture = torch.nn.functional.interpolate(coarse, (128, 128), mode="bicubic")[0].clamp(0, 1)
    return Layer(picture, torch.ones(128, 128), depth, 3.0)


def dot(depth: float = 1.0, centre: tuple[float, float] = (0.0, 0.0)) -> Layer:
    """A white disc on nothing."""
    line = torch.linspace(-1, 1, 65)
    disc = (line.square()[:, None] + line.square()[None, :] < 0.5).float()
    return Layer(torch.ones(3, 65, 65), disc, depth, 0.1, centre)


def centroid(pixels: Tensor) -> Tensor:
    """Column and row of the light's middle. [2]"""
    light = pixels.mean(0).double()
    rows, columns = (torch.arange(n).double() for n in light.shape)
    return torch.stack([(light.sum(0) * columns).sum(), (light.sum(1) * rows).sum()]) / light.sum()


def test_a_camera_at_the_origin_sees_one_unit_at_depth_one() -> None:
    """Column of x is (x + 1/2) widths less half a pixel; twice as far is half as wide."""
    points = torch.tensor([[0.0, 0.0], [0.25, 0.0], [0.0, 0.25]])
    near, ahead = seen_at(points, 1.0, Camera(), SIZE)
    far, _ = seen_at(points, 2.0, Camera(), SIZE)
    assert near.tolist() == [[31.5, 23.5], [47.5, 23.5], [31.5, 39.5]]
    assert far.tolist() == [[31.5, 23.5], [39.5, 23.5], [31.5, 31.5]]
    assert bool(ahead.all())


def test_what_is_seen_is_lifted_back() -> None:
    """From the plane to the pixel and back, for a camera that is moved, turned and zoomed."""
    points = torch.rand(50, 2, dtype=torch.float64) - 0.5
    pixels, ahead = seen_at(points, 1.3, TURNED, SIZE)
    back, met = lifted(pixels, 1.3, TURNED, SIZE)
    assert bool(ahead.all())
    assert bool(met.all())
    assert torch.allclose(back, points, atol=1e-9)


@pytest.mark.parametrize(
    ("camera", "moves"),
    [
        (Camera((0.1, 0, 0)), (-1, 0)),
        (Camera((0, 0.1, 0)), (0, -1)),
        (Camera(yaw=0.1), (-1, 0)),
        (Camera(pitch=0.1), (0, -1)),
    ],
)
def test_cameras_go_and_turn_where_their_numbers_say(
    camera: Camera, moves: tuple[int, int]
) -> None:
    """To the right or downwards: what is seen then moves to the left or upwards."""
    still, moved = (
        seen_at(torch.zeros(1, 2), 1.0, c, SIZE)[0][0].tolist() for c in (Camera(), camera)
    )
    assert [np.sign(round(b - a, 6)) for a, b in zip(still, moved, strict=True)] == list(moves)


@pytest.mark.parametrize("camera", [Camera(), TURNED, Camera((0, 0, -0.3), roll=0.5)])
def test_a_dot_is_drawn_where_the_formula_says(camera: Camera) -> None:
    """The centroid of a drawn disc is its middle's place, to a fifth of a pixel."""
    layer = dot(centre=(0.12, -0.07))
    drawn = rendered((layer,), View(camera), SIZE)
    place, _ = seen_at(torch.tensor([layer.centre]), layer.depth, camera, SIZE)
    assert float((centroid(drawn) - place[0]).abs().max()) < 0.2


def test_near_layers_move_more_than_far_ones() -> None:
    """A step aside of 0.05 moves a layer at depth d by 0.05 / d widths."""
    for depth in (0.5, 1.0, 2.0):
        before, after = (
            centroid(rendered((dot(depth),), View(Camera((x, 0, 0))), SIZE)) for x in (0, 0.05)
        )
        assert float(before[0] - after[0]) == pytest.approx(0.05 / depth * 64, abs=0.1)
        assert float(before[1] - after[1]) == pytest.approx(0, abs=0.01)


def test_corresponding_points_have_one_colour() -> None:
    """Where a point is seen in both views, both show the same."""
    layers = (backdrop(), Layer(backdrop(seed=1).picture, dot().cover.new_ones(128, 128), 1.0, 0.3))
    layers = (layers[0], replace(layers[1], cover=_inner(128)))
    view0, view1 = View(), View(Camera((0.08, 0.03, 0.1), yaw=-0.05, roll=0.1))
    pixels = torch.rand(400, 2) * torch.tensor([63.0, 47.0])
    places, seen = correspondences_of(layers, view0, view1, pixels, SIZE)
    assert 100 < int(seen.sum()) < 400
    shown = [_at(rendered(layers, v, SIZE), p) for v, p in ((view0, pixels), (view1, places))]
    off = (shown[0] - shown[1]).abs().max(0).values[seen]
    # Along the cut-out's rim a pixel mixes both layers.
    assert float(off.quantile(0.8)) < 0.02


def test_a_point_behind_a_cut_out_is_not_seen() -> None:
    """Stepping aside, the near disc covers part of the backdrop that the first view shows."""
    layers = (backdrop(), dot(depth=0.5))
    view1 = View(Camera((0.1, 0, 0)))
    covered, _ = seen_at(torch.tensor([layers[1].centre]), 0.5, view1.camera, SIZE)
    behind, _ = lifted(covered, 1.5, view1.camera, SIZE)
    pixel, _ = seen_at(behind, 1.5, Camera(), SIZE)
    beside = pixel + torch.tensor([[20.0, 0.0]])
    _, seen = correspondences_of(layers, View(), view1, torch.cat([pixel, beside]), SIZE)
    assert seen.tolist() == [False, True]


def test_a_moved_part_takes_its_points_along() -> None:
    """Only the disc's own pixels change, and its points are found where it went."""
    layers = (backdrop(), dot())
    still, moved = View(), View(moved={1: (0.2, 0.1)})
    middle = torch.tensor([[31.5, 23.5], [5.0, 5.0]])
    places, seen = correspondences_of(layers, still, moved, middle, SIZE)
    assert seen.tolist() == [True, True]
    assert torch.allclose(places[0], torch.tensor([31.5 + 12.8, 23.5 + 6.4]).double())
    assert torch.allclose(places[1], middle[1].double())
    changed = (rendered(layers, still, SIZE) != rendered(layers, moved, SIZE)).any(0)
    alone = [rendered((layers[1],), View(moved=m), SIZE) for m in ({}, {0: (0.2, 0.1)})]
    assert bool(changed.any())
    assert not bool((changed & (sum(alone).sum(0) == 0)).any())


def test_light_multiplies_each_channel() -> None:
    """Gains of one half and one quarter halve and quarter their channels, nothing else."""
    grey = torch.full((3, 8, 8), 0.8)
    lit = developed(grey, Look(light=(0.5, 1.0, 0.25)))
    assert lit[:, 0, 0].tolist() == pytest.approx([0.4, 0.8, 0.2])
    assert bool((lit == lit[:, :1, :1]).all())


def test_a_gradient_rises_along_its_axis_only() -> None:
    """By 0.2 from the middle to the right edge, and not at all from row to row."""
    lit = developed(torch.full((3, 4, 10), 0.5), Look(gradient=(0.2, 0.0)))
    assert lit[0, 0].tolist() == pytest.approx(
        [0.5 * (1 + 0.2 * (2 * k - 9) / 10) for k in range(10)]
    )
    assert bool((lit == lit[:, :1]).all())


def test_defocus_spreads_light_and_keeps_its_amount() -> None:
    """One bright pixel becomes a Gaussian of the deviation asked for."""
    point = torch.zeros(3, 41, 41)
    point[:, 20, 20] = 1
    soft = developed(point, Look(defocus_px=2.0))[0].double()
    offsets = torch.arange(41).double() - 20
    assert float(soft.sum()) == pytest.approx(1, abs=1e-5)
    spread = float((soft.sum(0) * offsets.square()).sum()) ** 0.5
    assert spread == pytest.approx(2.0, rel=0.03)


def test_gamma_and_saturation_are_curves_of_each_pixel() -> None:
    """Gamma 2 squares; saturation 0 leaves the luma in all channels."""
    pixels = torch.tensor([0.5, 0.2, 0.8])[:, None, None].expand(3, 2, 2)
    assert developed(pixels, Look(gamma=2.0))[:, 0, 0].tolist() == pytest.approx([0.25, 0.04, 0.64])
    luma = 0.299 * 0.5 + 0.587 * 0.2 + 0.114 * 0.8
    assert developed(pixels, Look(saturation=0.0))[:, 0, 0].tolist() == pytest.approx([luma] * 3)


def test_grain_has_its_deviation_and_follows_from_its_seed() -> None:
    """Noise of 0.04 around what was there; another seed, other noise."""
    grey = torch.full((3, 64, 64), 0.5)
    first, again, other = (developed(grey, Look(grain=0.04, seed=s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.mean()) == pytest.approx(0.5, abs=0.002)
    assert float(first.std()) == pytest.approx(0.04, rel=0.05)


def test_a_plain_look_changes_nothing() -> None:
    """The defaults are what was rendered."""
    layers = (backdrop(), dot())
    assert torch.equal(photograph_of(layers, View(), SIZE), rendered(layers, View(), SIZE))


def test_a_layer_that_cannot_be_is_refused() -> None:
    """Cover of another size, no width, or a depth behind the camera."""
    picture, cover = torch.zeros(3, 4, 4), torch.ones(4, 4)
    with pytest.raises(ValueError, match="give both one height"):
        Layer(picture, torch.ones(4, 5), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"depth is -1\.0"):
        Layer(picture, cover, -1.0, 1.0)
    with pytest.raises(ValueError, match=r"width is 0\.0"):
        Layer(picture, cover, 1.0, 0.0)


def _inner(size: int) -> Tensor:
    """1 but for a rim."""
    cover = torch.zeros(size, size)
    cover[8:-8, 8:-8] = 1
    return cover


def _at(pixels: Tensor, places: Tensor) -> Tensor:
    """Bilinear colours at columns and rows. [3, K]"""
    height, width = pixels.shape[-2:]
    where = (2 * places.float() + 1) / torch.tensor([width, height]) - 1
    sampled = torch.nn.functional.grid_sample(
        pixels[None], where[None, None], padding_mode="border", align_corners=False
    )
    return sampled[0, :, 0]
