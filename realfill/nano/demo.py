"""The two demo scenes, made from photographs that nano has never seen.

The motorcycle is a real stereo pair: the left view is the reference, the right view with a hole the
target. The cup of coffee is one photograph seen from three more viewpoints, under other light and
out of focus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from realfill.nano.photographs import photograph
from realfill.scene import Scene, load_scene


@dataclass(frozen=True)
class View:
    """Another photograph of a flat one.

    Attributes:
        corners: Where the view's corners lie in the photograph, as shares of its size, clockwise
        from the
            upper left.
        light: Gain of each channel.
        gamma: Exponent of the tone curve.
        blur_px: Radius of the defocus.
    """

    corners: tuple[tuple[float, float], ...]
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)
    gamma: float = 1.0
    blur_px: float = 0.0


COFFEE_TARGET = View(((0.04, 0.02), (0.97, 0.05), (0.99, 0.97), (0.02, 0.99)))
COFFEE_REFERENCES = (
    View(((0.12, 0.00), (0.98, 0.10), (0.90, 0.98), (0.05, 0.88)), (0.92, 0.95, 1.04), 1.1, 0.6),
    View(((0.00, 0.12), (0.88, 0.00), (1.00, 0.90), (0.12, 1.00)), (1.06, 1.0, 0.93), 0.92, 0.0),
    View(((0.15, 0.08), (0.92, 0.03), (0.96, 0.93), (0.10, 0.96)), (0.88, 0.88, 0.9), 1.0, 1.2),
)


def motorcycle_scene() -> Scene:
    """One reference, real parallax; the hole takes the tank and the engine below it."""
    right = photograph("motorcycle_right.png")
    mask = _mask(right.shape[:2], lambda pen: pen.rectangle((262, 150, 438, 318), fill=255))
    return _scene("motorcycle", [photograph("motorcycle_left.png")], right, mask)


def coffee_scene() -> Scene:
    """Three references with other viewpoint, light and focus; the hole takes the cup's mouth."""
    photo = photograph("coffee.png")
    target = _seen(photo, COFFEE_TARGET)
    mask = _mask(target.shape[:2], lambda pen: pen.ellipse((170, 30, 400, 230), fill=255))
    return _scene("coffee", [_seen(photo, view) for view in COFFEE_REFERENCES], target, mask)


def demo_scenes() -> tuple[Scene, Scene]:
    """Both, in the order of the demo."""
    return motorcycle_scene(), coffee_scene()


def write_scene(scene: Scene, folder: Path) -> Scene:
    """Write a scene in RealBench's layout, and read it back as a user's files are."""
    (folder / "ref").mkdir(parents=True, exist_ok=True)
    (folder / "target").mkdir(parents=True, exist_ok=True)
    for k, reference in enumerate(scene.references):
        _picture(reference).save(folder / "ref" / f"{k}.png")
    known = scene.target * (1 - scene.mask) + scene.mask
    _picture(known).save(folder / "target" / "target.png")
    _picture(scene.mask.expand(3, -1, -1)).convert("L").save(folder / "target" / "mask.png")
    if scene.truth is not None:
        _picture(scene.truth).save(folder / "target" / "gt.png")
    return load_scene(folder, name=scene.name)


def _scene(name: str, references: Sequence[np.ndarray], target: np.ndarray, mask: Tensor) -> Scene:
    truth = _pixels(target)
    # What lies in the hole is not given to anyone: it is blank, as in a user's file.
    blanked = truth * (1 - mask) + mask
    return Scene(
        name=name,
        references=tuple(_pixels(r) for r in references),
        target=blanked,
        mask=mask,
        truth=truth,
        digests={},
    )


def _seen(photo: np.ndarray, view: View) -> np.ndarray:
    """The photograph warped to a viewpoint, relit and defocused. [H, W, 3]"""
    height, width = photo.shape[:2]
    corners = np.array(view.corners) * (width - 1, height - 1)
    upper_left, upper_right, lower_right, lower_left = corners
    # Solve for the homography that takes the view's corners to the photograph's.
    rows, values = [], []
    square = ((0, 0), (width - 1, 0), (width - 1, height - 1), (0, height - 1))
    for (u, v), (x, y) in zip(
        square, (upper_left, upper_right, lower_right, lower_left), strict=True
    ):
        rows += [[u, v, 1, 0, 0, 0, -x * u, -x * v], [0, 0, 0, u, v, 1, -y * u, -y * v]]
        values += [x, y]
    matrix = np.linalg.solve(np.array(rows, float), np.array(values, float))
    warped = Image.fromarray(photo).transform(
        (width, height), Image.Transform.PERSPECTIVE, tuple(matrix), Image.Resampling.BICUBIC
    )
    if view.blur_px:
        warped = warped.filter(ImageFilter.GaussianBlur(view.blur_px))
    pixels = (np.asarray(warped, np.float32) / 255) ** view.gamma * np.array(view.light, np.float32)
    return (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _mask(size: Sequence[int], paint: object) -> Tensor:
    sheet = Image.new("L", (size[1], size[0]))
    paint(ImageDraw.Draw(sheet))  # type: ignore[operator]
    return torch.from_numpy(np.asarray(sheet) > 127).float()


def _pixels(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1).contiguous()


def _picture(pixels: Tensor) -> Image.Image:
    rounded = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(rounded.permute(1, 2, 0).numpy())
