"""Training images in memory, from where people keep them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from epsrt.errors import InputError
from epsrt_trainer import readers


@dataclass(frozen=True)
class Images:
    """A data set.

    images       [N, C, H, W], uint8 (0 … 255) or float32 in [−1, 1]
    labels       [N] int64 in [0, classes), or None
    class_names  one a class, or None
    skipped      what was left out, a sentence a file
    """

    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = list(self.images.shape)
        if self.images.ndim != 4 or not all(shape):
            raise InputError(f"images have shape {shape}: they must be [N, C, H, W], none of them 0")
        if self.images.dtype not in (torch.uint8, torch.float32):
            raise InputError(f"images are {self.images.dtype}: give uint8, or float32 in [−1, 1]")
        if self.images.dtype == torch.float32:
            low, high = float(self.images.min()), float(self.images.max())
            if not (low >= -1 and high <= 1):  # NaN too
                raise InputError(f"float images span {low:g} … {high:g}: scale them to [−1, 1]")
        if self.labels is not None:
            if self.labels.shape != (shape[0],) or self.labels.dtype != torch.int64:
                raise InputError(f"labels are {self.labels.dtype} {list(self.labels.shape)}: give int64 [{shape[0]}]")
            if int(self.labels.min()) < 0 or (self.class_names and int(self.labels.max()) >= len(self.class_names)):
                raise InputError(f"labels span {int(self.labels.min())} … {int(self.labels.max())}: count them from 0")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, c, h, w = self.images.shape
        return c, h, w

    @property
    def classes(self) -> int:
        """How many classes: as many as names, else the largest label + 1; 0 without labels."""
        if self.labels is None:
            return 0
        return len(self.class_names) if self.class_names else int(self.labels.max()) + 1

    def batch(self, index: Tensor, flip: Tensor | None = None) -> Tensor:
        """The images at `index` [B] int64 as float32 in [−1, 1]; those where `flip` [B] bool is set, mirrored."""
        x = self.images[index]
        x = x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x
        return x if flip is None else torch.where(flip[:, None, None, None], x.flip(3), x)

    def digest(self) -> str:
        """Hex SHA-256 of shape, pixels and labels: which data a run saw."""
        h = hashlib.sha256(f"{self.images.dtype} {list(self.images.shape)}".encode())
        h.update(self.images.contiguous().numpy().data)
        if self.labels is not None:
            h.update(self.labels.contiguous().numpy().data)
        return h.hexdigest()


def load(
    spec: str | Path, *, size: int | None = None, skip_broken: bool = False, log: Callable[[str], object] | None = None
) -> Images:
    """A data set by name or path.

    digits               scikit-learn's 1,797 handwritten digits, 1×8×8, 10 classes
    FILE.npz             arrays `images` ([N, C, H, W], [N, H, W, C] or [N, H, W]; uint8, or floats in [−1, 1])
                         and, optionally, `labels` [N], and with them `class_names` [classes]
    *-images-idx3-ubyte  MNIST's format, plain or .gz, with its labels beside it; or the folder of the training pair
    FOLDER               with data_batch_*.bin: CIFAR-10's binary version; else an image folder: a class is a
                         subfolder, a flat folder has no labels

    size         of an image folder: crop each image to its central square and resize it to size × size
    skip_broken  of an image folder: leave unreadable files out, each with a sentence in `.skipped` and to `log`,
                 where they would otherwise be refused
    Raises InputError naming the file that is missing, broken, of another size or not of its format.
    """
    path = Path(spec)
    if (size is not None or skip_broken) and not readers.is_image_folder(path):
        raise InputError(f"a size, and leaving out what is broken, are for image folders: {spec} is none")
    if str(spec) == "digits":
        found = readers.digits()
    elif not (path.is_file() or path.is_dir()):
        what = "is no file" if path.exists() else "does not exist"
        raise InputError(f"{spec} {what}: give digits, a folder, an .npz file or MNIST's IDX files")
    elif path.suffix == ".npz":
        found = readers.npz(path)
    elif readers.is_idx(path):
        found = readers.idx(path)
    elif readers.is_cifar10(path):
        found = readers.cifar10(path)
    elif path.is_dir():
        found = readers.image_folder(path, size, skip_broken)
    else:
        raise InputError(f"{path} is not a data set that epsrt reads: give a folder, an .npz file or MNIST's IDX files")
    for sentence in found.skipped:
        if log:
            log(sentence)
    labels = None if found.labels is None else torch.from_numpy(np.ascontiguousarray(found.labels, dtype=np.int64))
    images = torch.from_numpy(np.ascontiguousarray(found.images))
    return Images(images, labels, found.class_names, found.skipped)
