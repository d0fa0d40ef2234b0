"""File formats of training data -> NumPy arrays. One function a format; see data.load."""

from __future__ import annotations

import gzip
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from epsrt.errors import EpsrtError, InputError
from epsrt.types import UInt8

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Found:
    """images [N, C, H, W] uint8 or float32; labels [N] or None."""

    images: NDArray[Any]
    labels: NDArray[Any] | None = None
    class_names: tuple[str, ...] | None = None
    skipped: tuple[str, ...] = ()


def digits() -> Found:
    """scikit-learn's copy of the UCI digits: 0 … 16 becomes −1 … 1."""
    try:
        from sklearn.datasets import load_digits  # of the [train] extra; no other data set needs it
    except ImportError as error:
        raise InputError('the digits come with scikit-learn: pip install "epsrt[train]"') from error
    data = load_digits()
    images = (data.images[:, None] / 8 - 1).astype(np.float32)
    return Found(images, data.target, tuple(str(name) for name in data.target_names))


def npz(path: Path) -> Found:
    """NumPy's archive, without pickles."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise InputError(f"{path} is a single array, not an .npz archive: save it with np.savez(images=…)")
            if "images" not in file:
                raise InputError(f"{path} has no array `images` (it has {', '.join(file.files) or 'none'})")
            images, labels, names = file["images"], file.get("labels"), file.get("class_names")
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path} is not a whole .npz file ({error}): copy or make it again") from error
    except ValueError as error:
        if isinstance(error, EpsrtError):
            raise
        raise InputError(f"{path} holds pickled objects, which epsrt never loads: save plain arrays") from error
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4:
        raise InputError(f"{path}: images have shape {list(images.shape)}, not [N, C, H, W]")
    if images.dtype != np.uint8:
        if not np.issubdtype(images.dtype, np.floating):
            raise InputError(f"{path}: images are {images.dtype}; save uint8, or floats in [−1, 1]")
        images = images.astype(np.float32)
    if labels is not None and (labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer)):
        raise InputError(f"{path}: labels are {labels.dtype} {list(labels.shape)}; save integers [{len(images)}]")
    if names is not None and (labels is None or names.ndim != 1 or not np.issubdtype(names.dtype, np.str_)):
        raise InputError(f"{path}: class_names are {names.dtype} {list(names.shape)}; save words [classes] and labels")
    return Found(images, labels, None if names is None else tuple(names.tolist()))


def is_idx(path: Path) -> bool:
    """Whether `path` is an IDX image file, or a folder with the training pair."""
    return _idx_images(path) is not None


def idx(path: Path) -> Found:
    """MNIST's format (yann.lecun.com/exdb/mnist): big-endian magic 0x00 0x00 0x08 ndim, sizes, bytes."""
    images_path = _idx_images(path)
    assert images_path is not None
    images = _read_idx(images_path, 3)[:, None]
    name = images_path.name.replace("images", "labels").replace("idx3", "idx1")
    stem = name.removesuffix(".gz")
    labels_path = next((p for p in (images_path.with_name(n) for n in (name, stem, stem + ".gz")) if p.exists()), None)
    if labels_path is None:
        return Found(images)
    labels = _read_idx(labels_path, 1)
    if len(labels) != len(images):
        raise InputError(f"{labels_path} has {len(labels)} labels for {len(images)} images: take both from one set")
    return Found(images, labels)


def is_cifar10(path: Path) -> bool:
    """Whether `path` is a folder with CIFAR-10's binary batches."""
    return path.is_dir() and any(path.glob("data_batch_*.bin"))


def cifar10(path: Path) -> Found:
    """CIFAR-10's binary version (cs.toronto.edu/~kriz/cifar.html): a label byte and 3,072 CHW bytes an image."""
    parts = []
    for file in sorted(path.glob("data_batch_*.bin")):
        raw = np.fromfile(file, np.uint8)
        if not len(raw) or len(raw) % 3073:
            raise InputError(f"{file} has {len(raw):,} bytes, not a multiple of 3,073: download it again")
        parts.append(raw.reshape(-1, 3073))
    rows = np.concatenate(parts)
    if rows[:, 0].max() > 9:
        raise InputError(f"{path} has the label {rows[:, 0].max()}: this is not CIFAR-10's binary version")
    return Found(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0], CIFAR10)


def is_image_folder(path: Path) -> bool:
    """Whether `path` is a folder of none of the other formats."""
    return path.is_dir() and not is_cifar10(path) and not is_idx(path)


def image_folder(path: Path, size: int | None, skip_broken: bool) -> Found:
    """Subfolders are classes in the order of their names; without any, the images have no labels."""
    if size is not None and size < 1:
        raise InputError(f"size = {size} is no image size: give at least 1")
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [(file, label) for label, folder in enumerate(folders) for file in _files(folder)]
    flat = _files(path)
    if folders and flat:
        raise InputError(f"{path} has both class folders and images ({flat[0].name}): use one or the other")
    files = files or [(file, -1) for file in flat]
    if not files:
        raise InputError(f"{path} holds no images: epsrt reads {', '.join(SUFFIXES)}")
    kept, labels, skipped = [], [], []
    for file, label in files:
        try:
            kept.append((file, _read_image(file, size)))
            labels.append(label)
        except EpsrtError as error:
            if not skip_broken:
                raise
            skipped.append(f"skipped: {error}")
    if not kept:
        raise InputError(f"{path} holds no readable image: {len(skipped)} were skipped")
    channels = max(pixels.shape[2] for _, pixels in kept)
    first, like = kept[0]
    for file, pixels in kept:
        if pixels.shape[:2] != like.shape[:2]:
            raise InputError(
                f"{file} is {pixels.shape[1]}×{pixels.shape[0]} but {first.name} is {like.shape[1]}×{like.shape[0]}: "
                "give size to crop and resize them all"
            )
    images = np.stack([np.broadcast_to(p, (*p.shape[:2], channels)) for _, p in kept]).transpose(0, 3, 1, 2)
    names = tuple(folder.name for folder in folders)
    return Found(images, np.array(labels) if names else None, names or None, tuple(skipped))


BROKEN = (UnidentifiedImageError, OSError, SyntaxError, EOFError, struct.error)  # what Pillow raises on a bad file


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES and p.name[0] != ".")


def _read_image(path: Path, size: int | None) -> UInt8:
    """[H, W, 1 or 3]."""
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise InputError(f"{path} has more than 8 bits a channel ({image.mode}): convert it to 8 bits")
            grey = image.mode in ("1", "L", "LA")
            pixels = image.convert("L" if grey else "RGB")
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path} is not a readable image ({error}): mend or remove it, or skip broken files"
        ) from error
    if size is not None:
        side = min(pixels.size)
        left, top = (pixels.width - side) // 2, (pixels.height - side) // 2
        box = (left, top, left + side, top + side)
        pixels = pixels.resize((size, size), Image.Resampling.LANCZOS, box=box)
    out = np.asarray(pixels)
    return out[:, :, None] if grey else out


def _idx_images(path: Path) -> Path | None:
    if path.is_dir():
        names = ("train-images-idx3-ubyte", "train-images-idx3-ubyte.gz", "train-images.idx3-ubyte")
        return next((path / name for name in names if (path / name).is_file()), None)
    return path if "idx3-ubyte" in path.name and path.is_file() else None


def _read_idx(path: Path, ndim: int) -> UInt8:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a whole gzip file ({error}): download it again") from error
    head = 4 + 4 * ndim
    if raw[:4] != bytes([0, 0, 8, ndim]) or len(raw) < head:
        raise InputError(f"{path} starts with {raw[:4].hex(' ')}, not IDX's 00 00 08 0{ndim}: download it again")
    shape = np.frombuffer(raw, ">u4", ndim, offset=4).tolist()
    if len(raw) - head != int(np.prod(shape)):
        raise InputError(f"{path} holds {len(raw) - head:,} bytes where its header says {shape}: download it again")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape).copy()
