"""Image pairs with known truth, which nano-loftr learns from.

Every pair shows one picture twice: image 0 through a smooth displacement, image 1 through a
homography, each with its own light, blur and noise, behind an occluder that moves by itself. Where
a pixel of image 0 lies in image 1 is then a closed formula. About every third pair shows nothing
twice: what unrelated pictures look like has to be learned too.
"""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from realfill.nano.photographs import PHOTOGRAPHS, photograph, view
from realfill.rank.matching import CELL_PX

WORLD_PX = 320
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
UNMATCHED, UNKNOWN = -1, -2


@dataclass(frozen=True)
class Pairs:
    """Image pairs with their truth.

    Attributes:
        images0: Grey, in [0, 1]. [N, 1, H, W]
        images1: Grey, in [0, 1]. [N, 1, H, W]
        partner: For each cell of image 0 the cell of image 1 that shows the same point, UNMATCHED
            where none does, UNKNOWN where nothing is known. [N, L]
    """

    images0: Tensor
    images1: Tensor
    partner: Tensor


def worlds(
    drawn: NDArray[np.uint8], *, seed: int, sharp: int = 1200, workers: int | None = None
) -> tuple[Tensor, Tensor]:
    """Grey pictures to look at: drawn ones, and sharper views of the bundled photographs.

    Args:
        drawn: Pictures none of which shows the same as another, so no photographs. [K, 160, 160, 3]
        seed: Of the views.
        sharp: Number of views, which show the photographs in turn.
        workers: Processes that make the views; one for each core unless given.

    Returns:
        The pool [K, 1, 160, 160] and the sharp views [sharp, 1, 320, 320], uint8.
    """
    pool = np.stack([(picture @ LUMA + 0.5).astype(np.uint8) for picture in drawn])
    spans = [(k, min(k + 25, sharp), seed) for k in range(0, sharp, 25)]
    if len(spans) > 1 and workers != 1:
        with ProcessPoolExecutor(workers) as processes:
            views = list(processes.map(_views, spans))
    else:
        views = [_views(span) for span in spans]
    return torch.from_numpy(pool)[:, None], torch.from_numpy(np.concatenate(views))[:, None]


def _views(span: tuple[int, int, int]) -> NDArray[np.uint8]:
    start, stop, seed = span
    views = np.empty((stop - start, WORLD_PX, WORLD_PX), np.uint8)
    for k in range(start, stop):
        rng = np.random.default_rng((seed, 6, k))
        photo = photograph(PHOTOGRAPHS[k % len(PHOTOGRAPHS)])
        views[k - start] = (view(rng, photo, WORLD_PX, zoom=0.5) @ LUMA + 0.5).astype(np.uint8)
    return views


def _uniform(
    generator: torch.Generator, shape: tuple[int, ...], low: float | Tensor, high: float | Tensor
) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def _smooth(generator: torch.Generator, channels: int, count: int, knots: int, size: int) -> Tensor:
    """A smooth random field of unit deviation at its knots. [count, channels, size, size]"""
    shape = (count, channels, knots, knots)
    noise = torch.randn(shape, generator=generator, device=generator.device)
    return F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=True)


def _homographies(generator: torch.Generator, scale: Tensor, reach: Tensor) -> Tensor:
    """From image to world, both in [-1, 1]: turn, zoom, shift, shear and tilt. [N, 3, 3]"""
    count = len(scale)
    angle = _uniform(generator, (count,), -1, 1) * (0.08 + 0.35 * reach)
    zoom = _uniform(generator, (count,), -1, 1).mul(0.08 + 0.65 * reach).exp()
    # A picture seen from further away would be sampled too coarsely.
    zoom = (scale * zoom).clamp(max=1.2)
    far = reach.view(-1, 1)
    bend = _uniform(generator, (count, 2, 2), -1, 1) * 0.2 * far[..., None]
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    out = torch.eye(3, device=scale.device).repeat(count, 1, 1)
    out[:, :2, :2] = zoom[:, None, None] * (turn + bend)
    out[:, :2, 2] = _uniform(generator, (count, 2), -1, 1) * (0.1 + 0.35 * far) * scale[:, None]
    out[:, 2, :2] = _uniform(generator, (count, 2), -1, 1) * 0.2 * far
    return out


def _apply(homography: Tensor, points: Tensor) -> Tensor:
    """Points in [-1, 1], column first. [N, h, w, 2]"""
    ones = torch.ones_like(points[..., :1])
    moved = torch.cat([points, ones], -1).flatten(1, 2) @ homography.transpose(1, 2)
    moved = moved[..., :2] / moved[..., 2:].clamp(min=0.1)
    return moved.view_as(points)


def _sample(pictures: Tensor, points: Tensor) -> Tensor:
    return F.grid_sample(
        pictures, points, mode="bilinear", padding_mode="reflection", align_corners=False
    )


def _inside(points: Tensor) -> Tensor:
    """Whether points lie in the world's square. [N, 1, h, w]"""
    return (points.abs().amax(-1) < 1)[:, None]


def _tone(generator: torch.Generator, pixels: Tensor, reach: Tensor) -> Tensor:
    """Tone curve and contrast of one layer: in other light a tower is darker than its sky."""

    def each(low: float | Tensor, high: float | Tensor) -> Tensor:
        return _uniform(generator, (len(pixels), 1, 1, 1), low, high)

    far = reach.view(-1, 1, 1, 1)
    pixels = pixels.clamp(1e-4, 1) ** each(-0.6 * far, 0.6 * far).exp()
    middle = pixels.mean((2, 3), keepdim=True)
    pixels = (pixels - middle) * each(1 - 0.5 * far, 1 + 0.3 * far) + middle
    return pixels + each(-0.15 * far, 0.15 * far)


def _light(generator: torch.Generator, pixels: Tensor, reach: Tensor) -> Tensor:
    """Exposure, shading, shadows, defocus and grain, for each image its own. [N, 1, H, W]"""
    count, size = len(pixels), pixels.shape[-1]
    far = reach.view(-1, 1, 1, 1)

    def each(low: float | Tensor, high: float | Tensor) -> Tensor:
        return _uniform(generator, (count, 1, 1, 1), low, high)

    # Defocus by a gaussian, in the width of which images differ.
    sigma = each(0.0, 1.0).square() * (1.0 + 2.0 * far) + 0.05
    taps = torch.arange(-6, 7.0, device=pixels.device)
    kernel = (-0.5 * (taps / sigma.view(-1, 1)).square()).exp()
    kernel = (kernel / kernel.sum(1, keepdim=True)).view(count, 1, 1, 13)
    stacked = F.pad(pixels.transpose(0, 1), (6, 6, 6, 6), mode="reflect")
    stacked = F.conv2d(F.conv2d(stacked, kernel, groups=count), kernel.mT, groups=count)
    pixels = stacked.transpose(0, 1).clamp(1e-4, 1) ** each(-0.5 * far, 0.5 * far).exp()
    shading = _smooth(generator, 1, count, 3, size) * 0.2 * far
    edge = (_smooth(generator, 1, count, 5, size) * 8).sigmoid()
    shadow = edge * each(-1.5, 1.0).clamp(min=0) * far
    pixels = pixels * (shading - shadow).exp() + each(-0.1 * far, 0.1 * far)
    grain = torch.randn(pixels.shape, generator=generator, device=pixels.device)
    return (pixels + grain * each(0, 0.01 + 0.03 * far)).clamp(0, 1)


def make_pairs(
    pool: Tensor, sharp: Tensor, count: int, size_px: int, reach: float, generator: torch.Generator
) -> Pairs:
    """Make pairs with known truth, on the device that pictures and generator are on.

    Args:
        pool: From ``worlds``. [K, 1, 160, 160]
        sharp: From ``worlds``, at least one of each photograph. [M, 1, 320, 320]
        count: Number of pairs.
        size_px: Height and width of both images, a multiple of 8.
        reach: From 0, hardly moved, to 1, up to far apart in view and light.
        generator: Source of every random choice.

    Returns:
        Pairs. One in five shows two different places, one in seven another place behind the same
        occluder, if there is one, and one in five another occluder.
    """
    device = generator.device
    back, front, back1, front1, around = _pictures(pool, sharp, 5, count, generator)
    far = reach * _uniform(generator, (count,), 0, 1).sqrt()
    scale = _uniform(generator, (count,), math.log(0.5), math.log(1.0)).exp()
    scale = (scale * (size_px / 160) ** 0.5).clamp(max=1.0)
    first = _homographies(generator, scale, 0.3 * far)
    second = _homographies(generator, scale, far)
    amplitude = scale * _uniform(generator, (count,), 0, 0.02 + 0.08 * far)
    bend = _smooth(generator, 2, count, 4, size_px) * amplitude.view(-1, 1, 1, 1)
    # The occluder has its own texture and light, and moves apart from what is behind it.
    blob = _blobs(generator, count)
    apart = torch.eye(3, device=device).repeat(count, 1, 1)
    apart[:, :2, :2] *= (_uniform(generator, (count,), -0.3, 0.3) * far).exp()[:, None, None]
    shift = _uniform(generator, (count, 2), -1, 1) * (0.05 + 0.25 * far[:, None])
    apart[:, :2, 2] = shift * scale[:, None]
    second_front = apart @ second
    kind = torch.rand((2, count, 1, 1, 1), generator=generator, device=device)
    alien, alien_front = kind[0] < 0.35, (kind[0] < 0.2) | (kind[1] < 0.25)

    axis = (torch.arange(size_px, device=device) * 2 + 1) / size_px - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).expand(count, -1, -1, -1)
    world0 = _apply(first, grid) + bend.permute(0, 2, 3, 1)
    world1, world1_front = _apply(second, grid), _apply(second_front, grid)
    near0 = (_sample(blob, world0) > 0) & _inside(world0)
    near1 = (_sample(blob, world1_front) > 0) & _inside(world1_front)

    def seen(picture: Tensor, points: Tensor) -> Tensor:
        return _tone(generator, _sample(picture, points), far)

    # Beyond a world's edge lies another one, so that no point is seen twice.
    behind = torch.where(_inside(world0), seen(back, world0), seen(around, world0))
    images0 = torch.where(near0, seen(front, world0), behind)
    there = seen(torch.where(alien, back1, back), world1)
    behind = torch.where(_inside(world1) | alien, there, seen(back1, world1))
    before = seen(torch.where(alien_front, front1, front), world1_front)
    images1 = torch.where(near1, before, behind)

    cells, near = world0[:, ::CELL_PX, ::CELL_PX], near0[:, 0, ::CELL_PX, ::CELL_PX]
    # Unlike inv, inv_ex does not wait for the device.
    back_there = _apply(torch.linalg.inv_ex(second).inverse, cells)
    front_there = _apply(torch.linalg.inv_ex(second_front).inverse, cells)
    moved = torch.where(near[..., None], front_there, back_there)
    covering = _apply(second_front, moved)
    near_there = ((_sample(blob, covering) > 0) & _inside(covering))[:, 0]
    strange = torch.where(near, alien_front[:, 0], alien[:, 0])
    visible = (near_there == near) & ~strange & _inside(cells)[:, 0]
    partner = _partner(moved, visible, size_px)
    return Pairs(_light(generator, images0, far), _light(generator, images1, far), partner)


def _blobs(generator: torch.Generator, count: int) -> Tensor:
    """Fields that are positive on a smooth shape, half of them nowhere. [count, 1, 320, 320]"""
    field = _smooth(generator, 1, count, 6, 64)
    area = _uniform(generator, (count,), -0.5, 0.5).clamp(min=0)
    ranked = field.flatten(1).sort(descending=True).values
    level = ranked.gather(1, (area * ranked.shape[1]).long()[:, None])
    level = torch.where(area[:, None] > 0, level, torch.inf)
    field = (field - level.view(-1, 1, 1, 1)).clamp(min=-1)
    return F.interpolate(field, size=(WORLD_PX, WORLD_PX), mode="bilinear")


def _pictures(
    pool: Tensor, sharp: Tensor, roles: int, count: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """For each role and pair a world in [0, 1], flipped and turned. roles x [count, 1, 320, 320]

    Two in five are photographs, of which a pair never gets the same for two roles; the others are
    mosaics of four drawn pictures, as sharp, or single ones enlarged.
    """
    device, total = generator.device, roles * count

    def pick(shape: tuple[int, ...], below: int) -> Tensor:
        return torch.randint(below, shape, generator=generator, device=device)

    photos = len(PHOTOGRAPHS)
    order = torch.rand((count, photos), generator=generator, device=device).argsort(1)
    views = order[:, :roles].T + photos * pick((roles, count), len(sharp) // photos)
    keen = sharp[views.flatten()]
    tiles = pool[pick((total, 2, 2), len(pool))]  # [total, 2, 2, 1, 160, 160]
    mosaic = tiles.permute(0, 3, 1, 4, 2, 5).reshape(total, 1, WORLD_PX, WORLD_PX)
    soft = F.interpolate(tiles[:, 0, 0].float(), scale_factor=2.0, mode="bilinear")
    kind = torch.rand((total, 1, 1, 1), generator=generator, device=device)
    pictures = torch.where(kind < 0.4, keen, mosaic)
    for axes in ((3,), (2,)):
        pictures = torch.where(pick((total, 1, 1, 1), 2) > 0, pictures.flip(axes), pictures)
    pictures = torch.where(kind < 0.75, pictures, soft)
    pictures = torch.where(pick((total, 1, 1, 1), 2) > 0, pictures.mT, pictures)
    return (pictures / 255).chunk(roles)


def _partner(moved: Tensor, visible: Tensor, size_px: int) -> Tensor:
    """Nearest cell of each moved cell, which several do not share: the nearest has it. [N, L]"""
    side = size_px // CELL_PX
    place = (((moved + 1) * size_px - 1) / 2 / CELL_PX).flatten(1, 2)
    nearest = place.round()
    inside = ((nearest >= 0) & (nearest < side)).all(-1) & visible.flatten(1)
    cell = (nearest[..., 1] * side + nearest[..., 0]).long().clamp(0, side * side - 1)
    distance = torch.where(inside, (place - nearest).square().sum(-1), torch.inf)
    least = torch.full_like(distance, torch.inf).scatter_reduce(1, cell, distance, "amin")
    partner = torch.where(distance == least.gather(1, cell), cell, UNKNOWN)
    return torch.where(inside, partner, UNMATCHED)
