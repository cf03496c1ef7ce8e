"""Contact sheets: rows of captioned pictures on one page, for a person to look at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Tile = tuple[str, Tensor]
Row = tuple[str, Sequence[Tile]]

PAPER = (250, 249, 246)
INK = (34, 34, 38)
FAINT = (112, 112, 118)
RULE = (222, 220, 214)
CAPTION_PX = 13
HEADING_PX = 17
GAP_PX = 12
MARGIN_PX = 24


def contact_sheet(rows: Sequence[Row], tile_px: int = 192) -> Image.Image:
    """Draw rows of pictures, each row under its heading and each picture over its caption.

    Pictures keep their aspect ratio. The first line of a caption is dark, those after a line
    break are fainter; what is too wide is shortened.

    Args:
        rows: Heading (may be empty), then caption and picture in [0, 1] of each tile; a picture is
            [3, H, W], or a mask or a grey image [H, W].
        tile_px: Side of the square that each picture is fitted into.

    Returns:
        The sheet, as high and as wide as its rows need.

    Raises:
        ValueError: There is no picture, or one has another shape.
    """
    if not any(tiles for _, tiles in rows):
        raise ValueError("The sheet has no picture: give at least one row with a tile.")
    columns = max(len(tiles) for _, tiles in rows)
    pictures = [[_fitted(pixels, tile_px) for _, pixels in tiles] for _, tiles in rows]
    captions = [[caption.splitlines() for caption, _ in tiles] for _, tiles in rows]
    headings = [heading for heading, _ in rows]
    drawn = list(zip(headings, captions, pictures, strict=True))
    heights = [_row_height(*row) for row in drawn]
    width = 2 * MARGIN_PX + columns * (tile_px + GAP_PX) - GAP_PX
    height = 2 * MARGIN_PX + sum(heights) + 2 * GAP_PX * (len(rows) - 1)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    top = MARGIN_PX
    for number, (row, row_height) in enumerate(zip(drawn, heights, strict=True)):
        if number:
            pen.line((MARGIN_PX, top - GAP_PX, width - MARGIN_PX, top - GAP_PX), fill=RULE)
        _draw_row(sheet, pen, top, *row, tile_px)
        top += row_height + 2 * GAP_PX
    return sheet


def with_hole(target: Tensor, mask: Tensor) -> Tensor:
    """The target with its hole hatched, so that nobody takes it for content.

    Args:
        target: Pixels in [0, 1]. [3, H, W]
        mask: 1 where pixels are missing, else 0. [H, W]

    Returns:
        Pixels in [0, 1]. [3, H, W]
    """
    rows = torch.arange(mask.shape[0], device=mask.device)[:, None]
    columns = torch.arange(mask.shape[1], device=mask.device)[None, :]
    period = max(4, max(mask.shape) // 20)
    stripe = ((rows + columns) % period < period // 2).to(target.dtype)
    hatch = 0.86 + 0.08 * stripe
    return torch.where(mask > 0, hatch, target)


def _row_height(
    heading: str, captions: Sequence[list[str]], pictures: Sequence[Image.Image]
) -> int:
    lines = max(map(len, captions), default=0)
    below = lines * _line_px(CAPTION_PX) + GAP_PX // 2 if lines else 0
    tallest = max((picture.height for picture in pictures), default=0)
    return (_line_px(HEADING_PX) + GAP_PX // 2 if heading else 0) + tallest + below


def _draw_row(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    top: int,
    heading: str,
    captions: Sequence[list[str]],
    pictures: Sequence[Image.Image],
    tile_px: int,
) -> None:
    if heading:
        room = sheet.width - 2 * MARGIN_PX
        _write(pen, (MARGIN_PX, top), heading, HEADING_PX, INK, room)
        top += _line_px(HEADING_PX) + GAP_PX // 2
    bottom = top + max((picture.height for picture in pictures), default=0)
    for number, (lines, picture) in enumerate(zip(captions, pictures, strict=True)):
        left = MARGIN_PX + number * (tile_px + GAP_PX)
        # Pictures stand on their captions: low ones leave room above, not below.
        sheet.paste(picture, (left, bottom - picture.height))
        for k, line in enumerate(lines):
            corner = (left, bottom + GAP_PX // 2 + k * _line_px(CAPTION_PX))
            _write(pen, corner, line, CAPTION_PX, FAINT if k else INK, tile_px)


def _fitted(pixels: Tensor, tile_px: int) -> Image.Image:
    """A picture of any size, its long side at ``tile_px``."""
    if pixels.dim() == 2:
        pixels = pixels.expand(3, -1, -1)
    if pixels.dim() != 3 or pixels.shape[0] != 3:
        raise ValueError(
            f"A picture of the sheet is {list(pixels.shape)}: give [3, H, W] or [H, W]."
        )
    raw = (pixels.detach().float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray(raw.permute(1, 2, 0).contiguous().cpu().numpy())
    scale = tile_px / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def _write(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    line: str,
    size_px: int,
    ink: tuple[int, int, int],
    room_px: int,
) -> None:
    """One line of text, shortened to the room there is."""
    font = ImageFont.load_default(size_px)
    shown = line
    while shown and pen.textlength(shown, font=font) > room_px:
        line = line[:-1]
        shown = line.rstrip() + "..." if line else ""
    pen.text(corner, shown, fill=ink, font=font)


def _line_px(size_px: int) -> int:
    return round(1.3 * size_px)
