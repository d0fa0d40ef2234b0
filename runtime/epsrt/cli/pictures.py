"""Samples as files: a PNG grid, a folder of PNGs, or .npz."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from epsrt.errors import EpsrtError
from epsrt.files import whole_directory, whole_file

SMALL = 64  # pixels; smaller images are magnified to about this in pictures, by whole factors


def check_target(path: Path, channels: int) -> None:
    """Refuse, before any work is done, what could not be written after it."""
    if path.suffix.lower() not in ("", ".png", ".npz"):
        raise EpsrtError(f"--out {path}: the suffix must be .png (a grid), .npz, or none (a folder of PNGs)")
    if path.suffix.lower() != ".npz" and channels not in (1, 3, 4):
        raise EpsrtError(f"--out {path}: {channels} channels make no picture; write .npz")
    if path.suffix == "" and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise EpsrtError(f"--out {path} exists and is not an empty folder: choose another name")
    if path.resolve() == Path.cwd():
        raise EpsrtError(f"--out {path} is the folder you are in: choose another name")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Refuse a file where a directory is, and a place that cannot be written to."""
    if path.suffix and path.is_dir():
        raise EpsrtError(f"--out {path} is a directory: choose another name")
    there = next(p for p in path.resolve().parents if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise EpsrtError(f"--out {path}: {there} cannot be written to")


def save(path: Path, samples: NDArray[np.float32], images: NDArray[np.uint8], **more: Any) -> None:
    """Write by suffix. `samples` float32 [n, C, H, W] and `more` go to .npz; `images` uint8 [n, H, W, C] to PNGs."""
    match path.suffix.lower():
        case ".npz":
            with whole_file(path) as beside, beside.open("wb") as file:  # given a name, savez may add to it
                np.savez(file, samples=samples, images=images, **more)
        case ".png":
            with whole_file(path) as beside:
                grid(images).save(beside)
        case _:
            with whole_directory(path) as beside:
                for i, image in enumerate(images):
                    picture(image).save(beside / f"{i:0{len(str(len(images) - 1))}d}.png")


def read_samples(path: Path) -> NDArray[Any]:
    """The samples of an .npz that `save` wrote. Raises EpsrtError when it is another file."""
    if not path.exists():
        raise EpsrtError(f"{path} does not exist: give the .npz that epsrt sample --out wrote")
    try:
        with zipfile.ZipFile(path) as archive, archive.open("samples.npy") as file:
            found = np.lib.format.read_array(file, allow_pickle=False)
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise EpsrtError(f"{path} holds no samples ({error}): give the .npz that epsrt sample --out wrote") from None
    if found.ndim != 4 or not len(found):
        raise EpsrtError(f"{path} holds samples {list(found.shape)}, not [n, C, H, W]: give epsrt sample's own")
    return found


def picture(image: NDArray[np.uint8]) -> Image.Image:
    """One image uint8 [H, W, C] at its own size."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def grid(images: NDArray[np.uint8], columns: int | None = None) -> Image.Image:
    """[n, H, W, C] in rows of `columns` (default: ten at most, else about square), small ones magnified."""
    n, height, width, _ = images.shape
    columns = columns or (n if n <= 10 else max(10, math.ceil(math.sqrt(n))))
    factor, gap = max(1, SMALL // max(height, width)), 2
    h, w = height * factor + gap, width * factor + gap
    sheet = Image.new(picture(images[0]).mode, (columns * w + gap, -(-n // columns) * h + gap), "white")
    for i, image in enumerate(images):
        magnified = picture(image).resize((width * factor, height * factor), Image.Resampling.NEAREST)
        sheet.paste(magnified, (gap + i % columns * w, gap + i // columns * h))
    return sheet
