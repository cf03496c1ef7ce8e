"""Scenes of drawn layers, each hard in one of the ways that the paper names.

``python -m realfill.nano.difficulties OUT`` writes them as folders that every command reads. What
is drawn follows from a seed; with ``pictures="photographs"`` the layers are photographs that ship
with scikit-image, which nano was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import click
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from realfill.nano.demo import write_scene
from realfill.nano.images import draw
from realfill.nano.photographs import PHOTOGRAPHS, photograph, view
from realfill.nano.synthetic import Camera, Layer, Look, View, photograph_of
from realfill.scene import MAX_REFERENCES, Scene

Difficulty = Literal["plain", "viewpoint", "light", "defocus", "style", "moving"]
DIFFICULTIES: tuple[Difficulty, ...] = get_args(Difficulty)
Pictures = Literal["drawn", "photographs"]
Rng = np.random.Generator

BACKDROP_DEPTH = 1.4
# Wide enough for every camera below; beyond its edges a backdrop repeats, mirrored.
BACKDROP_WIDTH = 1.9
BACKDROP_PX = 448
OBJECTS = (4, 8)


@dataclass(frozen=True)
class World:
    """Layers and the views of them that make a scene.

    Attributes:
        layers: Far to near.
        target: What the target shows, hole and all.
        references: What the references show.
        size: Height and width of every view, in px.
    """

    layers: tuple[Layer, ...]
    target: View
    references: tuple[View, ...]
    size: tuple[int, int]


def synthetic_scene(
    difficulty: Difficulty,
    *,
    seed: int,
    references: int = 3,
    size: tuple[int, int] = (256, 256),
    pictures: Pictures = "drawn",
) -> Scene:
    """A scene with its truth.

    Args:
        difficulty: What sets the references apart from the target, besides small steps aside:
            nothing else, larger steps and turns, light, focus, style, or parts that move.
        seed: Start of every draw.
        references: 1 to 5.
        size: Height and width of every photograph, in px.
        pictures: What the layers show.

    Raises:
        ValueError: The difficulty or the number of references is out of range.
    """
    place = world(difficulty, seed=seed, references=references, size=size, pictures=pictures)
    truth = _rounded(photograph_of(place.layers, place.target, size))
    mask = _hole(np.random.default_rng((seed, 2)), size)
    return Scene(
        name=f"{difficulty}_{seed}",
        references=tuple(
            _rounded(photograph_of(place.layers, view, size)) for view in place.references
        ),
        # What lies in the hole is blank, as in a user's file.
        target=truth * (1 - mask) + mask,
        mask=mask,
        truth=truth,
        digests={},
    )


def synthetic_scenes(count: int, *, seed: int = 0, pictures: Pictures = "drawn") -> list[Scene]:
    """The first scenes of an endless row: the difficulties in turn, 3, 1, 5, 2 or 4 references."""
    return [
        synthetic_scene(
            DIFFICULTIES[k % len(DIFFICULTIES)],
            seed=seed + k,
            references=(3, 1, 5, 2, 4)[k % 5],
            pictures=pictures,
        )
        for k in range(count)
    ]


def world(
    difficulty: Difficulty,
    *,
    seed: int,
    references: int = 3,
    size: tuple[int, int] = (256, 256),
    pictures: Pictures = "drawn",
) -> World:
    """The layers and views behind ``synthetic_scene``, for who needs the geometry.

    The layers and the target of one seed are the same for every difficulty.
    """
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"No difficulty {difficulty!r}: choose one of {', '.join(DIFFICULTIES)}.")
    if not 1 <= references <= MAX_REFERENCES:
        raise ValueError(f"{references} references: a scene has 1 to {MAX_REFERENCES}.")
    layers = _layers(seed, size, pictures)
    target = View()
    views = []
    for k in range(references):
        # Each reference has draws of its own, so that another number of them changes none.
        rng = np.random.default_rng((seed, 1, k))
        aside = View(camera=_camera(rng, k, reach=1.0))
        views.append(HARDSHIPS[difficulty](np.random.default_rng((seed, 3, k)), aside, layers))
    return World(layers, target, tuple(views), size)


# Drawing takes a second, and all difficulties of a seed share it.
@lru_cache(maxsize=8)
def _layers(seed: int, size: tuple[int, int], pictures: Pictures) -> tuple[Layer, ...]:
    """A backdrop, and cut-outs of other pictures before it."""
    rng = np.random.default_rng((seed, 0))
    backdrop = _picture(rng, BACKDROP_PX, pictures)
    layers = [Layer(backdrop, torch.ones(backdrop.shape[-2:]), BACKDROP_DEPTH, BACKDROP_WIDTH)]
    height = size[0] / size[1]
    depths = np.sort(rng.uniform(0.75, 1.25, int(rng.integers(*OBJECTS))))[::-1]
    for index, depth in enumerate(depths.tolist()):
        width = depth * float(rng.uniform(0.2, 0.45))
        # Every other cut-out stands near the middle, where the hole is.
        reach = depth * (0.15 if index % 2 else 0.4)
        x, y = reach * rng.uniform(-1, 1), reach * height * rng.uniform(-1, 1)
        picture = _picture(rng, 160, pictures)
        layers.append(Layer(picture, _outline(rng, 160), depth, width, (float(x), float(y))))
    return tuple(layers)


def _camera(rng: Rng, index: int, *, reach: float) -> Camera:
    """A step aside, in another direction for each index, that still faces the middle."""
    # The golden angle keeps any number of directions apart.
    angle = 2.399963 * index + rng.uniform(-0.3, 0.3)
    step = reach * rng.uniform(0.08, 0.13)
    x, y, towards = step * math.cos(angle), 0.6 * step * math.sin(angle), rng.uniform(-0.05, 0.08)
    # Turned halfway back to the middle of the world, so that it stays in view.
    yaw, pitch = -math.atan(0.5 * x / 1.1), -math.atan(0.5 * y / 1.1)
    roll = reach * rng.uniform(-0.03, 0.03)
    return Camera((x, y, reach * float(towards)), yaw, pitch, float(roll))


def _plain(rng: Rng, aside: View, layers: tuple[Layer, ...]) -> View:
    return aside


def _viewpoint(rng: Rng, aside: View, layers: tuple[Layer, ...]) -> View:
    camera = aside.camera
    x, y, towards = camera.position
    return replace(
        aside,
        camera=Camera(
            (2.2 * x, 2.2 * y, 2.2 * towards),
            2.2 * camera.yaw,
            2.2 * camera.pitch,
            3 * camera.roll,
            zoom=float(rng.uniform(0.85, 1.2)),
        ),
    )


def _light(rng: Rng, aside: View, layers: tuple[Layer, ...]) -> View:
    gain, cast = rng.uniform(0.6, 1.15), rng.normal(1, 0.08, 3)
    red, green, blue = (float(gain * channel) for channel in cast)
    across, along = rng.uniform(-0.3, 0.3, 2).tolist()
    return replace(aside, look=Look(light=(red, green, blue), gradient=(across, along)))


def _defocus(rng: Rng, aside: View, layers: tuple[Layer, ...]) -> View:
    return replace(aside, look=Look(defocus_px=float(rng.uniform(1.0, 3.0))))


def _style(rng: Rng, aside: View, layers: tuple[Layer, ...]) -> View:
    gamma, saturation = float(rng.uniform(0.6, 1.6)), float(rng.uniform(0.0, 0.8))
    seed = int(rng.integers(2**31))
    return replace(aside, look=Look(gamma=gamma, saturation=saturation, grain=0.04, seed=seed))


def _moving(rng: Rng, aside: View, layers: tuple[Layer, ...]) -> View:
    """Every third cut-out stands elsewhere; the first of them is never the only one left."""
    moved = {
        index: (float(rng.uniform(-0.3, 0.3)), float(rng.uniform(-0.1, 0.1)))
        for index in range(1, len(layers), 3)
    }
    return replace(aside, moved=moved)


HARDSHIPS: dict[str, Callable[[Rng, View, tuple[Layer, ...]], View]] = {
    "plain": _plain,
    "viewpoint": _viewpoint,
    "light": _light,
    "defocus": _defocus,
    "style": _style,
    "moving": _moving,
}


def _picture(rng: Rng, size_px: int, pictures: Pictures) -> Tensor:
    """A drawing, or a crop of a photograph. [3, size_px, size_px]"""
    if pictures == "drawn":
        _, pixels = draw(rng, size_px)
    else:
        chosen = PHOTOGRAPHS[int(rng.integers(len(PHOTOGRAPHS)))]
        pixels = view(rng, photograph(chosen), size_px, zoom=0.6)
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1).contiguous()


def _outline(rng: Rng, size_px: int) -> Tensor:
    """A convex shape that leaves the picture's border free. [size_px, size_px]"""
    corners = int(rng.choice((4, 5, 6, 32)))
    angles = 2 * np.pi * (np.arange(corners) + rng.uniform(0, 1)) / corners
    radii = rng.uniform(0.36, 0.48) * (1 if corners == 32 else rng.uniform(0.75, 1, corners))
    around = np.stack([np.cos(angles), np.sin(angles)], 1) * np.reshape(radii, (-1, 1))
    points = size_px * (0.5 + around)
    sheet = Image.new("L", (4 * size_px, 4 * size_px))
    ImageDraw.Draw(sheet).polygon([tuple(4 * point) for point in points], fill=255)
    return torch.from_numpy(np.asarray(sheet.reduce(4), np.float32) / 255)


def _hole(rng: Rng, size: tuple[int, int]) -> Tensor:
    """A rectangle or an ellipse of 35 to 50 % of the sides, near the middle. [H, W]"""
    sides = rng.uniform(0.35, 0.5, 2)
    middle = rng.uniform(-0.12, 0.12, 2)
    y, x = (
        torch.from_numpy(np.abs((np.arange(n) + 0.5) / n - 0.5 - c) / (side / 2))
        for n, c, side in zip(size, middle, sides, strict=True)
    )
    if rng.random() < 0.5:
        return (torch.maximum(y[:, None], x[None, :]) < 1).float()
    return (y.square()[:, None] + x.square()[None, :] < 1).float()


def _rounded(pixels: Tensor) -> Tensor:
    """To what an 8-bit file holds, so that a written scene reads back equal."""
    return (pixels * 255).round() / 255


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--count", type=click.IntRange(min=1), default=6, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--pictures",
    type=click.Choice(get_args(Pictures)),
    default="drawn",
    show_default=True,
    help="What the layers show; nano was trained on the photographs.",
)
def main(out: Path, count: int, seed: int, pictures: Pictures) -> None:
    """Write synthetic scenes with their truth into OUT, a folder each, in RealBench's layout.

    \b
    The difficulties come in turn: plain, viewpoint, light, defocus, style, moving.
    Any command reads them, such as
        realfill train OUT/light_2
        python -m benchmarks.quality.tables --scenes OUT
    """
    for scene in synthetic_scenes(count, seed=seed, pictures=pictures):
        write_scene(scene, out / scene.name)
        click.echo(out / scene.name)


if __name__ == "__main__":
    main()
