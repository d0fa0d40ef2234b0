"""Rows of small pictures beside their names, as one image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Tiles = Sequence[NDArray[np.uint8] | None]  # [H, W] or [H, W, 3] each; None leaves a gap
GAP, HEAD, BLANK = 4, 26, 8  # pixels: between tiles, of the line of captions, of a gap


def sheet(
    rows: Sequence[tuple[str, Tiles]], heads: Sequence[tuple[int, str]] = (), left: int = 110, times: int = 6
) -> Image.Image:
    """Rows of tiles beside their names, magnified; `heads` are captions, each above the tile of that column."""
    top, font = HEAD if heads else 6, ImageFont.load_default(size=15)
    tall = [max(t.shape[0] for t in tiles if t is not None) * times for _, tiles in rows]
    wide = [[(BLANK if t is None else t.shape[1] * times) + GAP for t in tiles] for _, tiles in rows]
    coloured = any(t is not None and t.ndim == 3 for _, tiles in rows for t in tiles)
    size = left + max(map(sum, wide)) + GAP, top + sum(tall) + GAP * (len(rows) + 1)
    made = Image.new("RGB" if coloured else "L", size, "white")
    pen, y = ImageDraw.Draw(made), top
    for column, head in heads:
        pen.text((left + sum(wide[0][:column]), 5), head, fill="black", font=font)
    for (name, tiles), height, widths in zip(rows, tall, wide, strict=True):
        pen.text((8, y + height // 2 - 9), name, fill="black", font=font)
        for i, tile in enumerate(tiles):
            if tile is not None:
                picture = Image.fromarray(tile)
                enlarged = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
                made.paste(enlarged, (left + sum(widths[:i]), y))
        y += height + GAP
    return made
