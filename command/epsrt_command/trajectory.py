"""How samples form, as a picture: their x0 estimates in a strip, or an animated GIF."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from epsrt.errors import InputError
from epsrt.manifest import Manifest
from epsrt.types import UInt8
from epsrt_command import pictures

COLUMNS, FRAMES = 10, 50  # about, at most
MOST = 100  # images; all are in work at once
HOLD = 2.0  # seconds for the last frame


class Trajectory:
    """Collects the x0 estimates of n samples over a plan's rows, every `every` of them, and writes them to `path`.

    .png: a strip, a row an image, the last column the samples. .gif: a frame is a grid of all, the last the samples.
    """

    def __init__(self, path: Path, rows: int, n: int, m: Manifest):
        pictures.check_target(path, m, "--trajectory", (".png", ".gif"))
        if n > MOST:
            raise InputError(f"--trajectory shows {MOST} images at most, and {n} are asked for: draw fewer, or without")
        self.path, self.strip = path, path.suffix.lower() == ".png"
        self.every = max(1, round(rows / COLUMNS)) if self.strip else -(-rows // FRAMES)
        self._columns: list[UInt8] = []
        self._frames: list[Image.Image] = []

    def add(self, images: UInt8) -> None:
        """uint8 [n, H, W, C]."""
        if self.strip:
            self._columns.append(images)
        else:
            self._frames.append(pictures.grid(images))

    def save(self) -> None:
        if not self.strip:
            pictures.animate(self.path, self._frames, HOLD)
            return
        cells = np.stack(self._columns, axis=1)
        pictures.save_grid(self.path, cells.reshape(-1, *cells.shape[2:]), columns=cells.shape[1])
