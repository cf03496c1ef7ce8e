"""Synthetic scenes: textured layers at known depths, photographed by pinhole cameras.

Every picture follows from geometry, so where a point of one view lies in another is a closed
formula, and what is missing of a target is known to the pixel. Viewpoint, light, focus, style and
moving parts are set one by one: each of a scene's difficulties can be measured by itself.

``realfill.nano.difficulties`` makes scenes of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)
# Views are drawn at a multiple of their size and averaged, so that fine textures do not alias.
OVERSAMPLING = 2
NEAREST_DEPTH = 0.05


@dataclass(frozen=True)
class Layer:
    """A flat picture that faces the cameras.

    One unit is the width of what a camera at the origin sees at depth 1; x grows to the right, y
    downwards, depth away from the cameras.

    Attributes:
        picture: Colours in [0, 1]; beyond its edges they repeat, mirrored. [3, h, w]
        cover: 1 where the layer hides what lies behind it, 0 where it is not there. [h, w]
        depth: Distance from a camera at the origin.
        width: Of the whole picture.
        centre: Where the picture's middle lies.
    """

    picture: Tensor
    cover: Tensor
    depth: float
    width: float
    centre: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if self.picture.shape[-2:] != self.cover.shape:
            raise ValueError(
                f"A layer's picture is {list(self.picture.shape)} and its cover"
                f" {list(self.cover.shape)}: give both one height and width."
            )
        for name in ("depth", "width"):
            if getattr(self, name) <= 0:
                raise ValueError(f"A layer's {name} is {getattr(self, name)}: it must be above 0.")


@dataclass(frozen=True)
class Camera:
    """Where a view is taken from.

    Attributes:
        position: x, y and how far it stands towards the layers, in units of the world.
        yaw, pitch, roll: Turned to the right, downwards and clockwise, in radians.
        zoom: Focal length; 2 shows half as much.
    """

    position: tuple[float, float, float] = (0.0, 0.0, 0.0)
    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    zoom: float = 1.0

    def rotation(self) -> Tensor:
        """From the world's axes to the camera's. [3, 3], float64"""
        (sin_y, cos_y), (sin_p, cos_p), (sin_r, cos_r) = (
            (math.sin(angle), math.cos(angle)) for angle in (self.yaw, self.pitch, self.roll)
        )
        yaw = torch.tensor([[cos_y, 0, -sin_y], [0, 1, 0], [sin_y, 0, cos_y]], dtype=torch.float64)
        pitch = torch.tensor(
            [[1, 0, 0], [0, cos_p, -sin_p], [0, sin_p, cos_p]], dtype=torch.float64
        )
        roll = torch.tensor([[cos_r, sin_r, 0], [-sin_r, cos_r, 0], [0, 0, 1]], dtype=torch.float64)
        return roll @ pitch @ yaw


@dataclass(frozen=True)
class Look:
    """What light, lens and style make of a view.

    Attributes:
        light: Gain of each channel.
        gradient: How much brighter the right and the lower edge are than the middle, as a share.
        defocus_px: Deviation of the Gaussian blur.
        gamma: Exponent of the tone curve.
        saturation: 1 leaves colours alone, 0 makes them grey.
        grain: Deviation of the sensor's noise.
        seed: Of the noise.
    """

    light: tuple[float, float, float] = (1.0, 1.0, 1.0)
    gradient: tuple[float, float] = (0.0, 0.0)
    defocus_px: float = 0.0
    gamma: float = 1.0
    saturation: float = 1.0
    grain: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class View:
    """One photograph of a world.

    Attributes:
        camera: Where it is taken from.
        look: Light, lens and style.
        moved: For layers that stand elsewhere in this view, by index: how far to the right and
            downwards.
    """

    camera: Camera = field(default_factory=Camera)
    look: Look = field(default_factory=Look)
    moved: Mapping[int, tuple[float, float]] = field(default_factory=dict)


def photograph_of(layers: tuple[Layer, ...], view: View, size: tuple[int, int]) -> Tensor:
    """Take a view of a world.

    Args:
        layers: Far to near; the first must cover all that the view sees, or black shows.
        view: Camera, look and what has moved.
        size: Height and width, in px.

    Returns:
        Pixels in [0, 1]. [3, H, W]
    """
    return developed(rendered(layers, view, size), view.look)


def rendered(layers: tuple[Layer, ...], view: View, size: tuple[int, int]) -> Tensor:
    """A view before light, lens and style. [3, H, W]"""
    large = (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING)
    pixels = _pixel_centres(large)
    canvas = torch.zeros(3, *large)
    for index, layer in enumerate(layers):
        where, ahead = _on_layer(layer, view, index, pixels, large)
        cover = _sampled(layer.cover[None], where, "zeros")
        # A layer of full cover is a backdrop without end; others end where their picture does.
        if bool((layer.cover == 1).all()):
            cover = torch.ones_like(cover)
        canvas = torch.lerp(canvas, _sampled(layer.picture, where, "reflection"), cover * ahead)
    return F.avg_pool2d(canvas[None], OVERSAMPLING)[0]


def developed(pixels: Tensor, look: Look) -> Tensor:
    """Apply light, then the lens, then the tone curve, colours and noise. [3, H, W]"""
    height, width = pixels.shape[-2:]
    across, along = look.gradient
    ramp = 1 + across * _ramp(width)[None, :] + along * _ramp(height)[:, None]
    lit = pixels * pixels.new_tensor(look.light)[:, None, None] * ramp
    curved = _blurred(lit, look.defocus_px).clamp(0, 1) ** look.gamma
    grey = (curved * curved.new_tensor(LUMA)[:, None, None]).sum(0, keepdim=True)
    coloured = grey + look.saturation * (curved - grey) if look.saturation != 1 else curved
    if look.grain:
        generator = torch.Generator().manual_seed(look.seed)
        coloured = coloured + look.grain * torch.randn(coloured.shape, generator=generator)
    return coloured.clamp(0, 1)


def seen_at(
    points: Tensor, depth: float, camera: Camera, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Where points of a plane at a depth lie in a view.

    Args:
        points: x and y in the world. [K, 2]
        depth: Of the plane.
        camera: The view's.
        size: Height and width of the view, in px.

    Returns:
        Column and row, in px, 0 for the middle of the first pixel [K, 2]; whether the point lies
        before the camera [K].
    """
    x, y, towards = camera.position
    away = points.new_full((len(points),), depth)
    world = torch.stack([points[:, 0] - x, points[:, 1] - y, away - towards], 1).double()
    turned = world @ camera.rotation().T
    ahead = turned[:, 2] > NEAREST_DEPTH
    share = camera.zoom * turned[:, :2] / turned[:, 2:].clamp(min=NEAREST_DEPTH)
    height, width = size
    middle = share.new_tensor([(width - 1) / 2, (height - 1) / 2])
    return share * width + middle, ahead


def lifted(
    pixels: Tensor, depth: float, camera: Camera, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Points of a plane at a depth that a view shows at pixels: ``seen_at`` the other way round.

    Args:
        pixels: Column and row, in px. [K, 2]
        depth: Of the plane.
        camera: The view's.
        size: Height and width of the view, in px.

    Returns:
        x and y in the world [K, 2]; whether the ray meets the plane before the camera [K].
    """
    height, width = size
    middle = torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=torch.float64)
    share = (pixels.double() - middle) / (width * camera.zoom)
    rays = torch.cat([share, torch.ones(len(share), 1, dtype=torch.float64)], 1)
    rays = rays @ camera.rotation()
    distance = (depth - camera.position[2]) / rays[:, 2]
    origin = torch.tensor(camera.position[:2], dtype=torch.float64)
    return origin + rays[:, :2] * distance[:, None], (distance > NEAREST_DEPTH) & (rays[:, 2] > 0)


def correspondences_of(
    layers: tuple[Layer, ...], view0: View, view1: View, pixels: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Where the points that one view shows lie in another.

    Args:
        layers: The world, far to near.
        view0: The view that shows them.
        view1: The view in which they are sought.
        pixels: Column and row in view 0, in px. [K, 2]
        size: Height and width of both views, in px.

    Returns:
        Column and row in view 1 [K, 2]; whether the point is seen there: inside the view and
        hidden by nothing [K].
    """
    front = front_layer(layers, view0, pixels, size)
    places = torch.zeros(len(pixels), 2, dtype=torch.float64)
    seen = torch.zeros(len(pixels), dtype=torch.bool)
    for index, layer in enumerate(layers):
        chosen = front == index
        points, _ = lifted(pixels[chosen], layer.depth, view0.camera, size)
        points = points + _shift(view1, index) - _shift(view0, index)
        places[chosen], seen[chosen] = seen_at(points, layer.depth, view1.camera, size)
    height, width = size
    inside = (places >= 0).all(1) & (places <= places.new_tensor([width - 1, height - 1])).all(1)
    return places, seen & inside & (front_layer(layers, view1, places, size) == front)


def front_layer(
    layers: tuple[Layer, ...], view: View, pixels: Tensor, size: tuple[int, int]
) -> Tensor:
    """Index of the layer that a view shows at pixels, -1 for none. [K, 2] to [K]"""
    front = torch.full((len(pixels),), -1)
    for index, layer in enumerate(layers):
        where, ahead = _on_layer(layer, view, index, pixels[None], size)
        if bool((layer.cover == 1).all()):
            covers = ahead[0]
        else:
            covers = ahead[0] & (_sampled(layer.cover[None], where, "zeros")[0, 0] > 0.5)
        front[covers] = index
    return front


def _on_layer(
    layer: Layer, view: View, index: int, pixels: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Where rays meet a layer, as ``grid_sample`` counts [h, w, 2], and whether they do [h, w]."""
    points, ahead = lifted(pixels.reshape(-1, 2), layer.depth, view.camera, size)
    rows, columns = layer.cover.shape
    extent = points.new_tensor([layer.width, layer.width * rows / columns])
    middle = points.new_tensor(layer.centre) + _shift(view, index)
    where = 2 * (points - middle) / extent
    shape = pixels.shape[:2]
    return where.reshape(*shape, 2).float(), ahead.reshape(shape)


def _shift(view: View, index: int) -> Tensor:
    return torch.tensor(view.moved.get(index, (0.0, 0.0)), dtype=torch.float64)


def _sampled(planes: Tensor, where: Tensor, beyond: str) -> Tensor:
    """Bilinear. [C, h, w] at [H, W, 2] to [C, H, W]"""
    return F.grid_sample(
        planes[None], where[None], mode="bilinear", padding_mode=beyond, align_corners=False
    )[0]


def _pixel_centres(size: tuple[int, int]) -> Tensor:
    """Column and row of every pixel. [H, W, 2]"""
    rows, columns = torch.meshgrid(*(torch.arange(n).double() for n in size), indexing="ij")
    return torch.stack([columns, rows], -1)


def _ramp(length: int) -> Tensor:
    """From -1 at the first edge to 1 at the last. [length]"""
    return (2 * torch.arange(length) + 1) / length - 1


def _blurred(pixels: Tensor, deviation_px: float) -> Tensor:
    """Gaussian blur, edges repeated. [3, H, W]"""
    if deviation_px <= 0:
        return pixels
    radius = math.ceil(3 * deviation_px)
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-offsets.square() / (2 * deviation_px**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(pixels[:, None], (radius,) * 4, mode="replicate")
    across = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    return F.conv2d(across, kernel.view(1, 1, -1, 1))[:, 0]
