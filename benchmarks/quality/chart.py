"""Plots without a plotting library: points or lines over two axes, drawn by Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from realfill.sheet import FAINT, INK, PAPER, RULE

SIZE = (720, 480)
LEFT, TOP, RIGHT, BOTTOM = 84, 48, 20, 60
TICKS = 5
DOT_PX = 3
# Distinct to most eyes, in print too. Source: Okabe and Ito, 2008.
INKS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))

Points = Sequence[tuple[float, float]]


def chart(
    series: Mapping[str, Points], *, title: str, x_label: str, y_label: str, lines: bool
) -> Image.Image:
    """Draw series of points over common axes.

    Args:
        series: Name in the legend, and x and y of its points.
        title: Above the plot.
        x_label: Below it.
        y_label: Beside the title.
        lines: Whether the points of a series are joined, in their order.

    Raises:
        ValueError: There is no point, or one is not finite.
    """
    points = [point for line in series.values() for point in line]
    if not points or not all(math.isfinite(x) and math.isfinite(y) for x, y in points):
        raise ValueError(f"The chart {title!r} needs points, all finite; it has {len(points)}.")
    bounds = [_padded([point[axis] for point in points]) for axis in (0, 1)]
    sheet = Image.new("RGB", SIZE, PAPER)
    pen = ImageDraw.Draw(sheet)
    _axes(pen, bounds, title, x_label, y_label)
    for number, (name, line) in enumerate(series.items()):
        ink = INKS[number % len(INKS)]
        spots = [_spot(point, bounds) for point in line]
        if lines and len(spots) > 1:
            pen.line(spots, fill=ink, width=2)
        for x, y in spots:
            pen.ellipse((x - DOT_PX, y - DOT_PX, x + DOT_PX, y + DOT_PX), fill=ink)
        if len(series) > 1:
            top = TOP + 6 + 18 * number
            pen.rectangle((LEFT + 10, top + 3, LEFT + 22, top + 13), fill=ink)
            pen.text((LEFT + 28, top), name, font=ImageFont.load_default(13), fill=INK)
    return sheet


def _axes(
    pen: ImageDraw.ImageDraw,
    bounds: Sequence[tuple[float, float]],
    title: str,
    x_label: str,
    y_label: str,
) -> None:
    small, large = ImageFont.load_default(12), ImageFont.load_default(16)
    right, bottom = SIZE[0] - RIGHT, SIZE[1] - BOTTOM
    pen.text((LEFT, 8), title, font=large, fill=INK)
    pen.text((LEFT, 28), y_label, font=small, fill=FAINT)
    pen.text((right, SIZE[1] - 24), x_label, font=small, fill=FAINT, anchor="ra")
    for k in range(TICKS):
        share = k / (TICKS - 1)
        x, y = (low + share * (high - low) for low, high in bounds)
        across, down = _spot((x, y), bounds)
        pen.line((LEFT, down, right, down), fill=RULE)
        pen.text((LEFT - 8, down), f"{y:.3g}", font=small, fill=FAINT, anchor="rm")
        pen.text((across, bottom + 8), f"{x:.3g}", font=small, fill=FAINT, anchor="ma")
    pen.rectangle((LEFT, TOP, right, bottom), outline=FAINT)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of an axis: a twentieth beyond the values, and never without width."""
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or max(abs(low) * 0.05, 0.5)
    return low - pad, high + pad


def _spot(point: tuple[float, float], bounds: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Where a point lies on the sheet, in px."""
    across, along = (
        (value - low) / (high - low) for value, (low, high) in zip(point, bounds, strict=True)
    )
    width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM
    return LEFT + across * width, TOP + (1 - along) * height
