"""Samples as files: a PNG grid, a folder of PNGs, an animated GIF, or .npz."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from epsrt.errors import InputError
from epsrt.files import whole_directory, whole_file
from epsrt.images import to_images
from epsrt.manifest import Manifest, check_outside
from epsrt.types import Float32, UInt8

KINDS = {".png": ".png (a grid)", ".npz": ".npz", "": "none (a folder of PNGs)", ".gif": ".gif (animated)"}
FRAME = 0.1  # seconds
SMALL = 64  # pixels; smaller images are magnified to about this in pictures, by whole factors


def check_target(path: Path, m: Manifest, option: str = "--out", kinds: tuple[str, ...] = (".png", ".npz", "")) -> None:
    """Refuse, before any work is done, what could not be written after it."""
    if path.suffix.lower() not in kinds:
        known = " or ".join(", ".join(KINDS[kind] for kind in kinds).rsplit(", ", 1))
        raise InputError(f"{option} {path}: the suffix must be {known}")
    if path.suffix.lower() != ".npz" and (m.latents or m.shape[0] not in (1, 3, 4)):
        what = "latents of an autoencoder" if m.latents else f"{m.shape[0]} channels"
        decode = " and decode its samples with that autoencoder" if m.latents else ""
        way = f": write .npz{decode}" if ".npz" in kinds else ": leave it out"
        raise InputError(f"{option} {path}: {what} make no picture{way}")
    if path.suffix == "" and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{option} {path} exists and is not an empty folder: choose another name")
    if os.path.realpath(path) == os.getcwd():
        raise InputError(f"{option} {path} is the folder you are in: choose another name")
    check_writable(path, option)


def check_writable(path: Path, option: str = "--out") -> None:
    """Refuse a file where a directory is, and a place that cannot be written to."""
    if path.suffix and path.exists() and not path.is_file():
        raise InputError(f"{option} {path} is {'a directory' if path.is_dir() else 'no file'}: choose another name")
    check_outside(path, option)
    there = next(p for p in Path(os.path.realpath(path)).parents if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path}: {there} cannot be written to")


def save(path: Path, samples: Float32, m: Manifest, **more: Any) -> None:
    """Write float32 [n, C, H, W] by suffix: to PNGs, or to .npz with `more` and, of images, the same in uint8."""
    match path.suffix.lower():
        case ".npz":
            with whole_file(path) as beside, beside.open("wb") as file:  # given a name, savez may add to it
                pixels: dict[str, Any] = {} if m.latents else {"images": to_images(samples, m.value_range)}
                np.savez(file, samples=samples, **pixels, **more)
        case ".png":
            save_grid(path, to_images(samples, m.value_range))
        case _:
            images = to_images(samples, m.value_range)
            with whole_directory(path) as beside:
                for i, image in enumerate(images):
                    picture(image).save(beside / f"{i:0{len(str(len(images) - 1))}d}.png")


def save_grid(path: Path, images: UInt8, columns: int | None = None) -> None:
    """Write a grid of images as a PNG."""
    with whole_file(path) as beside:
        grid(images, columns).save(beside)


def animate(path: Path, frames: Sequence[Image.Image], hold: float = FRAME) -> None:
    """An animated GIF that loops, its last frame shown for `hold` seconds."""
    flat = [frame if frame.mode == "L" else _flat(frame).quantize() for frame in frames]
    seconds = [FRAME] * (len(frames) - 1) + [hold]
    with whole_file(path) as beside:
        flat[0].save(
            beside, format="GIF", save_all=True, append_images=flat[1:], duration=[1000 * s for s in seconds], loop=0
        )


def _flat(frame: Image.Image) -> Image.Image:
    """RGB, what is transparent on white: a GIF has no more than whole pixels of it."""
    if frame.mode != "RGBA":
        return frame
    return Image.alpha_composite(Image.new("RGBA", frame.size, "white"), frame).convert("RGB")


def picture(image: UInt8) -> Image.Image:
    """One image uint8 [H, W, C] at its own size."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def grid(images: UInt8, columns: int | None = None) -> Image.Image:
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
