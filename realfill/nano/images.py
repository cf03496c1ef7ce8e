"""Drawn pictures with the statistics of photographs.

Occluding regions of all sizes, power-law textures, muted colours, smooth light, lens blur. They
hold nothing that a photo in a benchmark shows.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from realfill.nano.photographs import PHOTOGRAPHS, photograph, to_bytes

Field = NDArray[np.floating[Any]]
Rng = np.random.Generator


def draw(rng: Rng, size_px: int) -> tuple[str, NDArray[np.uint8]]:
    """Draw one image, and the caption of its family.

    Args:
        rng: Source of every random choice.
        size_px: Height and width.

    Returns:
        Caption such as ``"a photo of a facade"``, and the image in sRGB. [H, W, 3]
    """
    families: tuple[tuple[str, Callable[[Rng, int], Field]], ...] = (
        ("a photo of leaves", _leaves),
        ("a photo of a facade", _facade),
        ("a photo of a landscape", _landscape),
        ("a photo of a workshop", _workshop),
    )
    caption, family = families[rng.choice(len(families), p=(0.35, 0.25, 0.15, 0.25))]
    return caption, _develop(rng, family(rng, size_px))


def _leaves(rng: Rng, size_px: int) -> Field:
    """Shapes of all sizes that occlude one another: the dead-leaves model."""
    texture, palette = _Texture(rng, size_px), _palette(rng)
    canvas = texture.surface(palette[0])
    smallest = size_px * rng.uniform(0.015, 0.05)
    for radius in sorted(_power_law(rng, int(rng.integers(40, 160)), smallest, size_px * 0.4))[
        ::-1
    ]:
        centre = rng.uniform(-0.1, 1.1, 2) * size_px
        alpha = _shape(rng, size_px, centre, radius)
        _paint(canvas, alpha, texture.surface(palette[rng.integers(len(palette))]))
    return canvas


def _facade(rng: Rng, size_px: int) -> Field:
    """A wall with a grid of windows or arches under a sky, seen in perspective."""
    texture, palette = _Texture(rng, size_px), _palette(rng)
    wall, trim, glass = (palette[k] for k in (0, 1, 2))
    glass = glass * rng.uniform(0.2, 0.7)
    canvas = texture.surface(wall, contrast=rng.uniform(0.03, 0.2))
    columns, rows = rng.integers(2, 9), rng.integers(1, 7)
    arched, framed = rng.random() < 0.5, rng.random() < 0.7
    cell_w, cell_h = size_px / columns, size_px / rows
    fill_w, fill_h = rng.uniform(0.3, 0.75), rng.uniform(0.4, 0.85)
    for row in range(rows):
        # Storeys differ in light, as real ones do in depth.
        surface = texture.surface(glass * rng.uniform(0.7, 1.4), contrast=rng.uniform(0.05, 0.4))
        border = texture.surface(trim)
        for column in range(columns):
            x, y = (column + 0.5) * cell_w, (row + 0.5) * cell_h
            half_w, half_h = fill_w * cell_w / 2, fill_h * cell_h / 2
            if framed:
                _paint(canvas, _window(size_px, x, y, half_w * 1.2, half_h * 1.1, arched), border)
            _paint(canvas, _window(size_px, x, y, half_w, half_h, arched), surface)
        if rng.random() < 0.6:
            band = (row * cell_h, row * cell_h + size_px * rng.uniform(0.01, 0.05))
            _paint(
                canvas,
                _window(size_px, size_px / 2, sum(band) / 2, size_px, np.ptp(band), False),
                border,
            )
    warped = _perspective(rng, canvas)
    if rng.random() < 0.6:
        roof = int(size_px * rng.uniform(0.1, 0.45))
        alpha = np.zeros((size_px, size_px), np.float32)
        alpha[:roof] = 1
        edge = _shape(rng, size_px, np.array([rng.uniform(0, size_px), roof]), size_px * 0.15)
        _paint(warped, np.clip(alpha - edge, 0, 1), _sky(rng, size_px))
    _people(rng, warped, texture, palette)
    return warped


def _landscape(rng: Rng, size_px: int) -> Field:
    """Sky over ridges, with ground or still water before them."""
    texture, palette = _Texture(rng, size_px), _palette(rng)
    canvas = _sky(rng, size_px)
    x = np.arange(size_px)
    level = size_px * rng.uniform(0.3, 0.6)
    for depth in range(int(rng.integers(1, 5))):
        ridge = level + size_px * 0.12 * _profile(rng, size_px)
        alpha = np.clip(np.arange(size_px)[:, None] - ridge[x][None, :], 0, 1).astype(np.float32)
        haze = 0.75 ** (3 - min(depth, 3))
        colour = palette[depth % len(palette)] * haze + (1 - haze) * canvas[0].mean(0)
        _paint(canvas, alpha, texture.surface(colour, contrast=rng.uniform(0.05, 0.35)))
        level += size_px * rng.uniform(0.05, 0.2)
    if rng.random() < 0.4:
        shore = int(size_px * rng.uniform(0.5, 0.8))
        depth_px = size_px - shore
        mirrored = canvas[shore - depth_px : shore][::-1] if shore >= depth_px else canvas[shore:]
        ripple = 1 + 0.15 * texture.field(stretch=6)[shore:, :, None]
        canvas[shore:] = mirrored * rng.uniform(0.6, 0.95) * ripple
    _people(rng, canvas, texture, palette)
    return canvas


def _workshop(rng: Rng, size_px: int) -> Field:
    """A wall and a floor crowded with boxes, tubes, wheels and highlights."""
    texture, palette = _Texture(rng, size_px), _palette(rng)
    canvas = texture.surface(palette[0])
    floor = texture.surface(palette[1])
    alpha = np.zeros((size_px, size_px), np.float32)
    alpha[int(size_px * rng.uniform(0.5, 0.9)) :] = 1
    _paint(canvas, alpha, floor)
    for _ in range(int(rng.integers(15, 60))):
        colour = palette[rng.integers(len(palette))]
        centre = rng.uniform(0, 1, 2) * size_px
        kind = rng.random()
        if kind < 0.35:
            radius = size_px * rng.uniform(0.03, 0.22)
            _paint(canvas, _polygon(rng, size_px, centre, radius, 4), texture.surface(colour))
        elif kind < 0.65:
            _tube(rng, canvas, size_px, colour)
        elif kind < 0.85:
            _wheel(rng, canvas, centre, texture, colour)
        else:
            alpha = _shape(rng, size_px, centre, size_px * rng.uniform(0.02, 0.1))
            _paint(canvas, alpha, texture.surface(np.minimum(colour + 0.3, 1)))
    return canvas


class _Texture:
    """A few noise fields of one image, shifted anew for every surface."""

    def __init__(self, rng: Rng, size_px: int) -> None:
        self.rng, self.size_px = rng, size_px
        self.fields = [_power_noise(rng, size_px, rng.uniform(0.6, 1.8)) for _ in range(4)]
        self.fields += [_stripes(rng, size_px) for _ in range(2)]

    def field(self, stretch: int = 1) -> Field:
        """Zero mean, unit deviation. [H, W]"""
        rng, size_px = self.rng, self.size_px
        pick = self.fields[rng.choice(6, p=(0.22, 0.22, 0.22, 0.22, 0.06, 0.06))]
        pick = np.roll(pick, rng.integers(0, size_px, 2), (0, 1))
        if stretch > 1:
            pick = np.repeat(pick, stretch, axis=1)[:, :size_px]
        return pick if rng.random() < 0.5 else pick.T

    def surface(self, colour: Field, *, contrast: float | None = None) -> Field:
        """A textured, smoothly lit area of one colour. [H, W, 3]"""
        rng, size_px = self.rng, self.size_px
        if contrast is None:
            contrast = float(np.exp(rng.uniform(np.log(0.01), np.log(0.35))))
        along = rng.normal(0, 1, 2)
        ramp = np.linspace(-0.5, 0.5, size_px, dtype=np.float32)
        light = along[0] * ramp[:, None] + along[1] * ramp[None, :]
        shade = 1 + rng.uniform(0, 0.35) * light + contrast * self.field()
        return (colour * shade[..., None]).astype(np.float32)


def _palette(rng: Rng) -> Field:
    """Colours that go together: pixels of one photograph, or tints around one hue. [K, 3]"""
    count = int(rng.integers(4, 9))
    if rng.random() < 0.6:
        source = photograph(PHOTOGRAPHS[rng.integers(6)]).reshape(-1, 3)
        colours = source[rng.integers(0, len(source), count)].astype(np.float32) / 255
        colours = np.clip(colours + rng.normal(0, 0.05, (count, 3)), 0.02, 0.98)
    else:
        hue = rng.random()
        colours = np.array(
            [
                colorsys.hsv_to_rgb(
                    (hue + rng.normal(0, 0.15)) % 1, rng.beta(1.3, 3), rng.uniform(0.1, 0.95)
                )
                for _ in range(count)
            ]
        )
    # Most of a photograph is muted: pull the palette towards its greys, and lift the darkest ones.
    grey = colours.mean(axis=1, keepdims=True)
    colours = grey + (colours - grey) * rng.beta(2, 2)
    return (0.04 + 0.96 * colours).astype(np.float32)


def _power_noise(rng: Rng, size_px: int, exponent: float) -> Field:
    """Noise whose amplitude falls as frequency to the ``-exponent``, unit deviation. [H, W]"""
    frequency = np.hypot(np.fft.fftfreq(size_px)[:, None], np.fft.rfftfreq(size_px)[None, :])
    frequency[0, 0] = np.inf
    spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
    field = np.fft.irfft2(spectrum * frequency**-exponent, s=(size_px, size_px))
    return (field / field.std()).astype(np.float32)


def _stripes(rng: Rng, size_px: int) -> Field:
    """Courses of brick, boards or blinds, unit deviation. [H, W]"""
    period = rng.uniform(4, size_px / 8)
    row = np.arange(size_px)
    joint = ((row % period) < max(1.0, period * 0.15)).astype(np.float32)
    field = np.repeat(joint[:, None], size_px, axis=1)
    if rng.random() < 0.5:
        length = period * rng.uniform(1.5, 3)
        course = (row // period).astype(int)
        along = (row[None, :] + (course[:, None] % 2) * length / 2) % length
        field = np.maximum(field, (along < max(1.0, length * 0.08)).astype(np.float32))
    field = field - field.mean()
    return field / max(float(field.std()), 1e-3)


def _profile(rng: Rng, size_px: int) -> Field:
    """A one-dimensional ridge, unit deviation. [W]"""
    frequency = np.fft.rfftfreq(size_px)
    frequency[0] = np.inf
    spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
    line = np.fft.irfft(spectrum * frequency ** -rng.uniform(1.0, 1.8), n=size_px)
    return (line / line.std()).astype(np.float32)


def _sky(rng: Rng, size_px: int) -> Field:
    """A graded sky, sometimes clouded. [H, W, 3]"""
    hue, saturation = rng.choice((0.58, 0.6, 0.08, 0.62)), rng.uniform(0.0, 0.6)
    top = np.array(colorsys.hsv_to_rgb(hue, saturation, rng.uniform(0.4, 0.95)))
    bottom = top + (1 - top) * rng.uniform(0, 0.7)
    ramp = np.linspace(0, 1, size_px)[:, None, None]
    sky = np.broadcast_to(top * (1 - ramp) + bottom * ramp, (size_px, size_px, 3)).copy()
    if rng.random() < 0.6:
        cover = np.clip(_power_noise(rng, size_px, 1.6) * 0.6 + rng.uniform(-0.5, 0.5), 0, 1)[
            ..., None
        ]
        sky = sky * (1 - cover) + cover * rng.uniform(0.75, 1.0)
    return sky.astype(np.float32)


def _paint(canvas: Field, alpha: Field, surface: Field) -> None:
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    if rows.size == 0:
        return
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    cover = alpha[box][..., None]
    canvas[box] = canvas[box] * (1 - cover) + surface[box] * cover


def _mask(size_px: int, paint: Callable[[ImageDraw.ImageDraw], None]) -> Field:
    """Coverage of a shape drawn at twice the size, in [0, 1]. [H, W]"""
    sheet = Image.new("L", (2 * size_px, 2 * size_px))
    paint(ImageDraw.Draw(sheet))
    return np.asarray(sheet.reduce(2), np.float32) / 255


def _shape(rng: Rng, size_px: int, centre: Field, radius: float) -> Field:
    if rng.random() < 0.45:
        return _polygon(rng, size_px, centre, radius, int(rng.integers(3, 7)))
    return _polygon(rng, size_px, centre, radius, 28)


def _polygon(rng: Rng, size_px: int, centre: Field, radius: float, corners: int) -> Field:
    angles = (
        np.sort(rng.uniform(0, 2 * np.pi, corners))
        if corners < 7
        else np.linspace(0, 2 * np.pi, 28)
    )
    if corners == 4:
        angles = np.array([0.25, 0.75, 1.25, 1.75]) * np.pi
    wobble = 1 + (0.12 * np.sin(angles * rng.integers(2, 5)) if corners > 6 else 0)
    stretch = np.exp(rng.normal(0, 0.45, 2) * np.array([1, -1]))
    points = (
        np.stack([np.cos(angles), np.sin(angles)], 1)
        * stretch
        * radius
        * np.reshape(wobble, (-1, 1))
    )
    turn = rng.normal(0, 0.15) if corners == 4 else rng.uniform(0, np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    outline = [tuple(p) for p in (points @ rotation.T + centre) * 2]
    return _mask(size_px, lambda pen: pen.polygon(outline, fill=255))


def _window(size_px: int, x: float, y: float, half_w: float, half_h: float, arched: bool) -> Field:
    def paint(pen: ImageDraw.ImageDraw) -> None:
        left, top, right, bottom = (2 * v for v in (x - half_w, y - half_h, x + half_w, y + half_h))
        if arched:
            pen.ellipse((left, top, right, top + 2 * (right - left) / 2), fill=255)
            top = min(top + (right - left) / 2, bottom)
        pen.rectangle((left, top, right, bottom), fill=255)

    return _mask(size_px, paint)


def _tube(rng: Rng, canvas: Field, size_px: int, colour: Field) -> None:
    """A bent rod with a highlight along it."""
    steps = np.linspace(0, 1, 12)[:, None]
    ends = rng.uniform(-0.1, 1.1, (3, 2)) * size_px
    curve = (1 - steps) ** 2 * ends[0] + 2 * steps * (1 - steps) * ends[1] + steps**2 * ends[2]
    width = size_px * float(np.exp(rng.uniform(np.log(0.008), np.log(0.06))))
    for share, gain in ((1.0, 0.55), (0.7, 0.9), (0.25, 1.3 + rng.uniform(0, 0.5))):
        line = [tuple(p) for p in curve * 2]
        stroke = {"fill": 255, "width": max(1, round(2 * width * share)), "joint": "curve"}
        alpha = _mask(size_px, partial(_line, line, stroke))
        _paint(canvas, alpha, np.broadcast_to(np.clip(colour * gain, 0, 1), canvas.shape))


def _line(
    points: list[tuple[float, ...]], stroke: dict[str, Any], pen: ImageDraw.ImageDraw
) -> None:
    pen.line(points, **stroke)


def _ellipse(box: tuple[float, ...], pen: ImageDraw.ImageDraw) -> None:
    pen.ellipse(box, fill=255)


def _wheel(rng: Rng, canvas: Field, centre: Field, texture: _Texture, colour: Field) -> None:
    """Concentric rings, foreshortened."""
    size_px = len(canvas)
    radius, squash = size_px * rng.uniform(0.04, 0.22), rng.uniform(0.5, 1.0)
    for share in sorted(rng.uniform(0.15, 1.0, int(rng.integers(2, 6))))[::-1]:
        half = np.array([squash, 1.0]) * radius * share
        box = tuple(np.concatenate([centre - half, centre + half]) * 2)
        alpha = _mask(size_px, partial(_ellipse, box))
        _paint(canvas, alpha, texture.surface(colour * rng.uniform(0.2, 1.4), contrast=0.05))


def _people(rng: Rng, canvas: Field, texture: _Texture, palette: Field) -> None:
    """Upright blobs with heads along the lower edge."""
    size_px = len(canvas)
    for _ in range(int(rng.integers(0, 8))):
        height = size_px * rng.uniform(0.04, 0.2)
        x, y = rng.uniform(0, size_px), size_px * rng.uniform(0.75, 1.0)
        body = _window(size_px, x, y - height / 2, height * 0.15, height * 0.4, True)
        head = _window(size_px, x, y - height, height * 0.08, height * 0.1, True)
        _paint(
            canvas, body, texture.surface(palette[rng.integers(len(palette))] * rng.uniform(0.3, 1))
        )
        _paint(canvas, head, texture.surface(np.array([0.75, 0.55, 0.45], np.float32)))


def _power_law(rng: Rng, count: int, smallest: float, largest: float) -> Field:
    """Radii with density r^-3, the scale-invariant law of dead leaves. [count]"""
    u = rng.random(count)
    return ((smallest**-2 + u * (largest**-2 - smallest**-2)) ** -0.5).astype(np.float32)


def _perspective(rng: Rng, canvas: Field) -> Field:
    size_px = len(canvas)
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float)
    moved = corners * 0.8 + 0.1 + rng.uniform(-0.1, 0.1, (4, 2))
    rows = []
    for (u, v), (x, y) in zip(corners, moved, strict=True):
        rows.append([u, v, 1, 0, 0, 0, -x * u, -x * v])
        rows.append([0, 0, 0, u, v, 1, -y * u, -y * v])
    a = np.linalg.solve(np.array(rows), moved.reshape(-1))
    scale = np.array([1, 1, size_px, 1, 1, size_px, 1 / size_px, 1 / size_px])
    picture = Image.fromarray(to_bytes(canvas)).transform(
        (size_px, size_px), Image.Transform.PERSPECTIVE, tuple(a * scale), Image.Resampling.BICUBIC
    )
    return np.array(picture, np.float32) / 255


def _develop(rng: Rng, scene: Field) -> NDArray[np.uint8]:
    """Light, lens and sensor: what turns a drawing into a photograph. [H, W, 3]"""
    size_px = len(scene)
    if rng.random() < 0.5:
        shadow = _power_noise(rng, size_px, 1.8)[..., None]
        scene = scene * (1 + rng.uniform(0, 0.2) * np.clip(shadow, -2, 2))
    scene = np.clip(scene * rng.normal(1, 0.05, 3), 0, 1) ** rng.uniform(0.75, 1.3)
    lens = Image.fromarray(to_bytes(scene)).filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.0)))
    grain = rng.normal(0, rng.uniform(0, 0.012), scene.shape)
    return to_bytes(np.asarray(lens, np.float32) / 255 + grain)
