"""safetensors files, read and written whole or not at all; nothing in them is unpickled."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from epsrt.errors import BundleError
from epsrt.files import whole_file


def read_safetensors(path: Path, weights: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file. Raises BundleError when it is missing or not safetensors."""
    if path.is_dir():
        raise BundleError(f"{path} is a directory, a bundle perhaps: give the checkpoint, *.safetensors")
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise BundleError(f"{path} {what}: train a network first, or check the path")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if weights}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise BundleError(f"{path} is not a whole safetensors file ({error}): copy or train it again") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file whole or not at all. Raises OSError where the disk is full or the place not writable."""
    with whole_file(path) as beside:
        try:
            save_file(dict(tensors), beside, dict(metadata))
        except safetensors.SafetensorError as error:
            if (number := re.search(r"os error ([0-9]+)", str(error))) is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
