"""Samples as files: a PNG grid, a folder of PNGs, an animated GIF, a .wav, or .npz."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from epsrt.errors import InputError
from epsrt.files import whole_directory, whole_file
from epsrt.images import to_images
from epsrt.manifest import Manifest, check_outside
from epsrt.types import Float32, UInt8
from epsrt_command import sounds

KINDS = {
    ".png": ".png (a grid)", ".npz": ".npz", "": "none (a folder of PNGs)", ".gif": ".gif (animated)", ".wav": ".wav",
}  # fmt: skip
FRAME = 0.1  # seconds
SMALL = 64  # pixels; smaller images are magnified to about this in pictures, by whole factors


def check_target(path: Path, m: Manifest, option: str = "--out", kinds: tuple[str, ...] = (".png", ".npz", "")) -> None:
    """Refuse, before any work is done, what could not be written after it."""
    form = form_of(m)
    if ".npz" in kinds:  # where samples go: a trajectory is of pictures alone
        kinds += {"sound": (".wav",), "volume": (".gif",)}.get(form, ())
    if path.suffix.lower() not in kinds:
        known = " or ".join(", ".join(KINDS[kind] for kind in kinds).rsplit(", ", 1))
        raise InputError(f"{option} {path}: the suffix must be {known}")
    shown = {"picture": (".png", ".gif", ""), "sound": (".wav", ""), "volume": (".png", ".gif", ""), "numbers": ()}[
        form
    ]
    if path.suffix.lower() not in (".npz", *(shown if ".npz" in kinds or form == "picture" else ())):
        what = f"{m.shape[0]} channels" if len(m.shape) == 3 else f"samples [{', '.join(map(str, m.shape))}]"
        what = "latents of an autoencoder" if m.latents else what
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


def form_of(m: Manifest) -> Literal["picture", "sound", "volume", "numbers"]:
    """What samples are shown as: [1, 3 or 4, H, W], [1 or 2, L], [1, 3 or 4, D, H, W], or nothing that can be."""
    if m.latents:
        return "numbers"
    if len(m.shape) == 2:
        return "sound" if m.shape[0] in (1, 2) else "numbers"
    if m.shape[0] not in (1, 3, 4):
        return "numbers"
    return "picture" if len(m.shape) == 3 else "volume"


def default_target(m: Manifest) -> Path:
    """Where samples go if nobody says."""
    return Path({"sound": "samples.wav", "numbers": "samples.npz"}.get(form_of(m), "samples.png"))


def save(path: Path, samples: Float32, m: Manifest, rate: int = sounds.RATE, **more: Any) -> None:
    """Write float32 [n, C, …] by suffix: as they are shown, or to .npz with `more` and, of images, the same in uint8.

    A volume's depths are a row of a .png, or frames of a .gif. `rate` is of sounds.
    """
    suffix, form = path.suffix.lower(), form_of(m)
    if suffix == ".npz":
        with whole_file(path) as beside, beside.open("wb") as file:  # given a name, savez may add to it
            pixels: dict[str, Any] = {"images": to_images(samples, m.value_range)} if form == "picture" else {}
            np.savez(file, samples=samples, **pixels, **more)
    elif form == "sound":
        sounds.save(path, samples, m.value_range, rate)
    elif form == "volume":
        _save_volumes(path, samples, m)
    elif suffix == ".png":
        save_grid(path, to_images(samples, m.value_range))
    else:
        images = to_images(samples, m.value_range)
        with whole_directory(path) as beside:
            for i, image in enumerate(images):
                picture(image).save(beside / f"{_numbered(i, len(images))}.png")


def _save_volumes(path: Path, samples: Float32, m: Manifest) -> None:
    """Slices uint8 [D, n, H, W, C] as a strip, as frames, or in a folder with a .gif each."""
    slices = np.stack([to_images(samples[:, :, d], m.value_range) for d in range(samples.shape[2])])
    if path.suffix.lower() == ".png":
        save_grid(path, slices.swapaxes(0, 1).reshape(-1, *slices.shape[2:]), columns=len(slices))
    elif path.suffix:
        animate(path, [grid(images) for images in slices])
    else:
        with whole_directory(path) as beside:
            for i in range(len(samples)):
                name = f"{_numbered(i, len(samples))}.gif"
                animate(beside / name, [grid(images[i : i + 1]) for images in slices])


def _numbered(i: int, count: int) -> str:
    return f"{i:0{len(str(count - 1))}d}"


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
