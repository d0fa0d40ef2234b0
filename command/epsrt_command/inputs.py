"""What a user gives to be edited: images, latents and masks, of .npz files, pictures and folders of pictures."""

from __future__ import annotations

import logging
import math
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from epsrt.bundle import Bundle
from epsrt.editing import canvas
from epsrt.errors import EpsrtError, InputError
from epsrt.images import from_images, images_of, mask_of
from epsrt.manifest import AXES
from epsrt.types import Float32, Size, UInt8
from epsrt_command.foreign import reading

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # what else Pillow reads, it may run programs for
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
WAY_OUT = "give an .npz that epsrt sample wrote, a picture (PNG, JPEG, …) or a folder of pictures"
_SILENT = logging.NullHandler()
MOST_BYTES = 8 << 30  # of an array in a file


def images(path: Path, bundle: Bundle, size: Size | None = None, smaller: bool = False) -> Float32:
    """float32 [n, C, H, W] in the bundle's value range, of an .npz of samples, a picture, or a folder of them.

    size     height and width that they must have, or with `smaller` may not exceed; None: any that the bundle takes
    """
    m = bundle.manifest
    check_there(path)
    if path.suffix.lower() == ".npz" and not path.is_dir():
        found = samples(path, bundle)
        _check_size(path, found.shape[2:], bundle, size, smaller)
        within = None if m.clip is None else m.value_range
        given = images_of(str(path), found, len(found), (m.shape[0], *found.shape[2:]), within)
        assert given is not None
        return given
    if m.latents:
        raise InputError(
            f"{path} is a picture, and the bundle takes an autoencoder's latents: encode it, and give .npz"
        )
    return pixels(path, bundle, m.shape[0], size, smaller)


def pixels(path: Path, bundle: Bundle, channels: int, size: Size | None = None, smaller: bool = False) -> Float32:
    """float32 [n, channels, H, W] in the bundle's value range, of a picture or a folder of them; `size` as above."""
    m = bundle.manifest
    if len(m.shape) != 3 or channels not in MODES:
        axes = ", ".join(AXES[len(m.shape) - 1])
        what = f"images have {channels} channels" if len(m.shape) == 3 else f"samples have the axes {axes}"
        raise InputError(f"{path}: the bundle's {what}, a picture has not: give .npz")
    check_there(path)
    pictures = [picture_of(file, MODES[channels], bundle, size, smaller) for file in picture_files(path)]
    return from_images(stacked(picture_files(path), pictures), m.value_range)


def latents(path: Path, bundle: Bundle, size: Size | None = None) -> tuple[Float32, list[Any] | None]:
    """float32 [n, C, H, W] of an .npz, and its labels where it has any that are not all the null label."""
    if path.suffix.lower() != ".npz" or path.is_dir():
        raise InputError(f"{path} holds no latents: give the .npz that epsrt invert, or epsrt sample, wrote")
    found = samples(path, bundle)
    _check_size(path, found.shape[2:], bundle, size, smaller=False)
    shape = bundle.manifest.shape[0], *found.shape[2:]
    given = images_of(str(path), found, len(found), shape, None)
    assert given is not None
    return given, labels_in(path, bundle, len(found))


def labels_in(path: Path, bundle: Bundle, count: int) -> list[Any] | None:
    """The labels that an .npz keeps beside its samples, the null label as None; None where it has no others."""
    found = arrays_of(path, "label").get("label") if path.suffix.lower() == ".npz" and path.is_file() else None
    if found is None or found.size == 0 or not bundle.labelled:
        return None
    if found.dtype.kind not in "iu" or found.shape != (count,):
        raise InputError(f"{path} has labels {found.dtype} {list(found.shape)} for {count} samples: give --labels")
    labels = [None if label == bundle.manifest.null_label else label for label in found.tolist()]
    return None if set(labels) == {None} else labels


def masked(
    known: Path | None, mask: str | None, at: tuple[int, int] | None, size: Size | None, bundle: Bundle
) -> tuple[Float32 | None, NDArray[Any] | None]:
    """`known` and `mask` of Sampler.sample; where `at` says where the known images lie, on a canvas of `size`."""
    if known is None:
        for option, value in (("--mask", mask), ("--at", at)):
            if value is not None:
                raise InputError(f"{option} is about known pixels: give --known, the images that have them")
        return None, None
    if at is None:
        if mask is None:
            raise InputError(
                "--known has no --mask: give one, white where pixels are kept, or --at for a canvas around them"
            )
        whole = images(known, bundle, size)
        return whole, _mask(mask, bundle, whole.shape[2:])
    if len(bundle.manifest.shape) != 3:
        raise InputError("--at is a place on pictures, and the bundle's samples are none: leave it out")
    height, width = bundle.image_shape(size)[1:]
    small = images(known, bundle, (height, width), smaller=True)
    try:
        placed, lies = canvas(small, (height, width), at)
    except EpsrtError as error:
        raise InputError(f"{known}: {error}: choose another --at, or --size") from None
    if mask is not None:
        lies = lies[:1] * _mask(mask, bundle, (height, width)).astype(np.float32)  # the canvas has nothing to keep
    return placed, lies


def _mask(text: str, bundle: Bundle, size: tuple[int, ...]) -> NDArray[Any]:
    """Of a region in pixels, an .npz, a picture or a folder of them: [H, W] or [n, c, H, W]."""
    region = re.fullmatch(r"(-?\d{0,6}):(-?\d{0,6}),(-?\d{0,6}):(-?\d{0,6})", text.replace(" ", ""))
    if region is not None and len(size) == 2:
        return _region(text, region.groups(), size)
    path = Path(text)
    if not (path.is_file() or path.is_dir()):
        raise InputError(f"--mask {text} is no file, and no region such as 0:4,: (the upper four rows)")
    found: NDArray[Any]
    if path.suffix.lower() == ".npz" and not path.is_dir():
        arrays = arrays_of(path, "mask", "samples")
        if not arrays:
            raise InputError(f"{path} holds no mask: give an .npz with an array mask, or a black and white picture")
        found = next(arrays[name] for name in ("mask", "samples") if name in arrays)
    else:
        if len(size) != 2:
            raise InputError(f"--mask {path}: a picture is a mask of pictures: give an .npz with an array mask")
        pictures = [picture_of(file, "L", bundle, size, smaller=False) for file in picture_files(path)]
        found = stacked(picture_files(path), pictures).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    count = len(found) if found.ndim == len(size) + 2 else 1
    try:
        mask_of(found, count, (bundle.manifest.shape[0], *size))
    except EpsrtError as error:
        raise InputError(f"{path}: {error}") from None
    return found


def _region(text: str, ends: tuple[str, ...], size: tuple[int, ...]) -> Float32:
    kept = np.zeros(size, np.float32)
    for i, end in enumerate(ends):
        if end == "-" or (end and abs(int(end)) > size[i // 2]):
            raise InputError(f"--mask {text} is beyond images of {size[0]} × {size[1]} pixels")
    top, bottom, left, right = (int(end) if end else None for end in ends)
    kept[top:bottom, left:right] = 1
    if not kept.any():
        raise InputError(f"--mask {text} keeps no pixel: it is TOP:BOTTOM,LEFT:RIGHT, such as 0:4,:")
    return kept


def check_there(path: Path, way_out: str = WAY_OUT) -> None:
    """Refuse what is neither a file nor a folder; a named pipe would be waited for."""
    if not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} {'is no file' if path.exists() else 'does not exist'}: {way_out}")


def samples(path: Path, bundle: Bundle) -> NDArray[Any]:
    """The samples of an .npz of epsrt's, as they are. Raises InputError when it is another file."""
    axes = [name[0].upper() for name in AXES[len(bundle.manifest.shape) - 1]]
    found = arrays_of(path, "samples").get("samples")
    if found is None:
        raise InputError(f"{path} holds no samples: give an .npz that epsrt sample wrote")
    if found.ndim != len(axes) + 2 or not len(found):
        wanted = ", ".join(["n", "C", *axes])
        raise InputError(f"{path} holds samples {list(found.shape)}, not [{wanted}]: give epsrt sample's own")
    return found


def names_in(path: Path) -> list[str]:
    """The names of an .npz's arrays."""
    with reading(path, "is no .npz that can be read", WAY_OUT), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def arrays_of(path: Path, *names: str) -> dict[str, NDArray[Any]]:
    """Those of the arrays that an .npz has."""
    check_there(path, "give an .npz that epsrt sample wrote")
    found = {}
    with reading(path, "is no .npz that can be read", WAY_OUT), zipfile.ZipFile(path) as archive:
        for name in names:
            if f"{name}.npy" not in archive.namelist():
                continue
            if archive.getinfo(f"{name}.npy").file_size > MOST_BYTES:
                raise InputError(f"{path}: its {name} are over {MOST_BYTES >> 30} GiB: give fewer at once")
            with archive.open(f"{name}.npy") as file:
                found[name] = np.lib.format.read_array(file, allow_pickle=False)
    return found


def picture_files(path: Path) -> list[Path]:
    """The pictures of a folder by name, 2 before 10, or the one file."""
    if not path.is_dir():
        return [path]
    found = [p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()]
    found.sort(
        key=lambda p: [(int(part), "") if part.isdigit() else (-1, part) for part in re.split("([0-9]+)", p.name)]
    )
    if not found:
        raise InputError(f"{path} is a folder without pictures ({', '.join(SUFFIXES)})")
    return found


def picture_of(path: Path, mode: str, bundle: Bundle | None, size: Size | None, smaller: bool) -> UInt8:
    """uint8 [H, W, C]; the bundle is asked for a size where none is given.

    What is wrong is found before its pixels are unpacked, where the header tells.
    """
    with decoding(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of small damage, which is no sentence of ours; nor are its logs
        logging.getLogger("PIL").addHandler(_SILENT)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > _most_pixels(bundle, size):
                _check_size(path, image.size[::-1], bundle, size, smaller)
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise InputError(f"{path} is animated, or has pages: give one picture, or a folder of them")
            if image.mode.startswith(("I", "F")) or any("16" in str(tile[3]) for tile in image.tile):
                raise InputError(f"{path} has more than 8 bits a channel: save it with 8")
            upright = ImageOps.exif_transpose(image)  # as phones turn them
            _check_size(path, upright.size[::-1], bundle, size, smaller)
            if mode != "RGBA" and upright.has_transparency_data:
                if np.asarray(upright.convert("RGBA").getchannel("A")).min() < 255:
                    raise InputError(f"{path} is transparent in places, and nothing here knows of that: flatten it")
                upright = upright.convert("RGBA").convert("RGB")
            pixels = np.asarray(upright.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def stacked(files: list[Path], pictures: list[UInt8]) -> UInt8:
    for file, picture in zip(files, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            (h, w), (height, width) = picture.shape[:2], pictures[0].shape[:2]
            raise InputError(f"{file} is {h} × {w}, but {files[0].name} {height} × {width}: give all one size")
    return np.stack(pictures)


def _most_pixels(bundle: Bundle | None, size: Size | None) -> int:
    """Of an image of `size`, or of any that the bundle takes."""
    if size is not None:
        return math.prod(size)
    assert bundle is not None
    m = bundle.manifest
    return math.prod(m.shape[1:]) if m.sizes is None else math.prod(most for _, most in m.sizes.axes(len(m.shape) - 1))


def _check_size(path: Path, found: Size, bundle: Bundle | None, size: Size | None, smaller: bool) -> None:
    what = f"{path} is {' × '.join(map(str, found))}"
    if size is None:
        assert bundle is not None
        try:
            bundle.image_shape(found)
        except EpsrtError as error:
            raise InputError(f"{path}: {error}") from None
    elif smaller and not all(0 < n <= most for n, most in zip(found, size, strict=True)):
        raise InputError(f"{what}, more than its canvas of {' × '.join(map(str, size))}: give a larger --size")
    elif not smaller and tuple(found) != tuple(size):
        raise InputError(f"{what}, not {' × '.join(map(str, size))}: crop or resize it")


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Around Pillow: InputError for what is no picture, and for a picture that is a trap."""
    with reading(path, "is no picture that can be read", WAY_OUT):
        try:
            yield
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            many = "says it has more pixels than any picture should"
            raise InputError(f"{path} {many}: it is damaged, or hostile") from None
