"""Files of tensors: what torch.save and safetensors wrote, read without running code of the file."""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from epsrt.errors import BundleError

SAVE_TENSORS = (
    "in the project that wrote it, save the weights alone: torch.save(model.state_dict(), path) or "
    "safetensors.torch.save_file(model.state_dict(), path)"
)
# of torch's refusals: the class or function that the pickle names
_NAMED = re.compile(r"(?:GLOBAL|global:?|class) ([A-Za-z_][\w.]*\.\w+)")
# what trainers write beside the weights, and plain data all of it: command lines, Lightning's dicts and the class that
# is a key among its callbacks, NumPy's numbers
_LIGHTNING = (
    "lightning.fabric.utilities.data",
    "lightning_fabric.utilities.data",
    "pytorch_lightning.utilities.parsing",
)
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_SCALAR = np.float64(0).__reduce__()[0]
_PLAIN: list[Any] = [
    argparse.Namespace,
    *((OrderedDict, f"{module}.AttributeDict") for module in _LIGHTNING),
    ("ModelCheckpoint", "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"}),
]


def load(path: str | Path) -> Any:
    """What torch.save or safetensors wrote: tensors on the CPU and plain values, nested as they are.

    Files of torch.save in the zip format, and safetensors, are mapped, not read.
    Raises BundleError for a path that is no file, and for a file that is damaged or holds more than tensors and plain
    values: no code of the file is ever run.
    """
    with _reading(path):
        if kind_of(path) == "safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a plain pickle's protocol, which the error says better
            # what torch saved before its version 1.6 is no zip, and cannot be mapped; by another's name, it is not read
            if zipfile.is_zipfile(path) and Path(path).suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with Path(path).open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)


def kind_of(path: str | Path) -> str:
    """safetensors, torch or "", by a file's first bytes, whatever its name; by its name where it is too short."""
    path = Path(path)
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        head = file.read(9)
    if len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size:
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return "torch"
    return "safetensors" if path.suffix == ".safetensors" else ""


def outline(path: str | Path) -> tuple[Any, dict[str, str]]:
    """What `load` would return, and the metadata of *.safetensors, whose tensors are without values: its header alone
    is read.
    """
    if Path(path).is_dir() or kind_of(path) != "safetensors":
        return load(path), {}
    with _reading(path), safe_open(path, "pt") as file:
        found = {}
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            part = file.get_slice(name)
            found[name] = torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype()), device="meta")
        return found, dict(file.metadata() or {})


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Around whatever reads a file: its errors as sentences."""
    path = Path(path)
    if path.is_dir():
        raise BundleError(f"{path} is a directory: give the file of weights in it")
    if not path.is_file():
        raise BundleError(f"{path} does not exist: check the path")
    try:
        yield
    except SafetensorError as error:
        raise BundleError(f"{path} is not a whole safetensors file ({error}): copy it again") from None
    except Exception as error:  # of a damaged file torch raises whatever the bytes lead to, KeyError and EOFError too
        if named := _NAMED.search(str(error)):
            raise BundleError(
                f"{path} holds {named[1]}, which loading would run, and nothing but tensors is unpickled here: "
                f"{SAVE_TENSORS}"
            ) from None
        raise BundleError(
            f"{path} is not a whole file of torch.save with tensors and plain values alone: copy it again, or "
            f"{SAVE_TENSORS}"
        ) from error
