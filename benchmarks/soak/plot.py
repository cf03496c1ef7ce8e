"""Memory and latency over time as a picture, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from benchmarks.soak.memory import WARM_UP, MemorySample

WIDTH, PANEL = 960, 220
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 28, 24
GREY, BLUE, RED = (120, 120, 120), (40, 90, 200), (200, 60, 40)

Points = Sequence[tuple[float, float]]


def plot(memory: Sequence[MemorySample], answers: Points) -> Image.Image:
    """Two panels with one time axis: memory as a line, and a dot for each answer's latency.

    Args:
        memory: Samples by time.
        answers: When each answer came, and its latency, both in seconds.
    """
    resident = [(sample.at_s, sample.rss_bytes / 2**20) for sample in memory]
    end_s = max([1.0, *(at for at, _ in resident), *(at for at, _ in answers)])
    picture = Image.new("RGB", (WIDTH, 2 * PANEL), "white")
    draw = ImageDraw.Draw(picture)
    places = _panel(draw, 0, "memory of the server's processes, MiB", resident, end_s)
    if len(places) > 1:
        draw.line(places, fill=RED, width=2)
    if resident:
        warm = LEFT + (WIDTH - LEFT - RIGHT) * WARM_UP * resident[-1][0] / end_s
        draw.line([(warm, TOP), (warm, PANEL - BOTTOM)], fill=GREY)
        draw.text((warm + 4, PANEL - BOTTOM - 16), "warm-up ends", fill=GREY)
    for x, y in _panel(draw, PANEL, "latency of each answer, s", answers, end_s):
        draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=BLUE)
    return picture


def _panel(
    draw: ImageDraw.ImageDraw, top: int, title: str, points: Points, end_s: float
) -> list[tuple[float, float]]:
    """Frame and axes of a panel; the points in its pixels."""
    highest = max((value for _, value in points), default=1.0) * 1.05 or 1.0
    low, high = top + PANEL - BOTTOM, top + TOP
    draw.rectangle((LEFT, high, WIDTH - RIGHT, low), outline=GREY)
    draw.text((LEFT, top + 8), title, fill="black")
    draw.text((8, high), f"{highest:.4g}", fill=GREY)
    draw.text((8, low - 10), "0", fill=GREY)
    draw.text((LEFT, low + 4), "0 s", fill=GREY)
    draw.text((WIDTH - RIGHT - 48, low + 4), f"{end_s:.0f} s", fill=GREY)
    across = (WIDTH - LEFT - RIGHT) / end_s
    return [(LEFT + at * across, low - (low - high) * value / highest) for at, value in points]
