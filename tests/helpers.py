"""What the tests share without torch: ways to damage a bundle, and new interpreters.

Functions that edit a graph need onnx; a test that calls one is skipped where onnx is not installed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from epsrt import Schedule

if TYPE_CHECKING:
    import onnx

DIALECTS = ["dialect tensorrt", "dialect cuda"]  # the rungs of a step graph that has a norm
AT_EXPORT = [*DIALECTS, "optimisation"]  # the rungs after those that `epsrt verify` has too
DATA = Path(__file__).parent / "data"
EXAMPLES = Path(__file__).parents[1] / "examples"
MANIFEST = "manifest.json"
T = 100  # of most schedules here: the golden DDPM trajectory has T steps
SCHEDULE = Schedule(T=T, beta_start=1e-3, beta_end=0.2)  # the linear schedule of 1,000 steps, in 100
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def forge(bundle: Path, edit: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Make a damaged bundle consistent again: right sizes, hashes and digest. `edit` changes the manifest first."""
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    manifest["files"] = {
        p.name: {"sha256": hashlib.sha256(p.read_bytes()).hexdigest(), "size": p.stat().st_size}
        for p in sorted(bundle.iterdir())
        if p.name != MANIFEST
    }
    edit(manifest)
    manifest.pop("digest", None)
    canonical = msgspec.json.encode(manifest, order="sorted")
    manifest["digest"] = hashlib.sha256(canonical).hexdigest()
    raw = msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=2) + b"\n"
    (bundle / MANIFEST).write_bytes(raw)


def edit_graph(path: Path, edit: Callable[[onnx.ModelProto], object]) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path, load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())


def move_weights(model: onnx.ModelProto, location: str) -> None:
    """Point every external initializer at another place."""
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location


def externals(model: onnx.ModelProto) -> dict[str, dict[str, str]]:
    """name -> external data entries of each initializer outside the graph."""
    external = pytest.importorskip("onnx").TensorProto.EXTERNAL
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.data_location == external
    }


def weights(bundle: Path, name: str, precision: str = "fp32") -> np.memmap:
    """A writable view of one external initializer of a bundle, by the end of its name."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundle / f"step-{precision}.onnx", load_external_data=False)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith(name)]
    place = externals(model)[tensor.name]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(bundle / place["location"], dtype, "r+", int(place["offset"]), tuple(tensor.dims))


def write_keys(folder: Path, key: Any = None, password: bytes = b"") -> tuple[Path, Path]:
    """A new key's private.pem, under a password if one is given, and its public.pem."""
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import ec

    key = key or ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "private.pem", folder / "public.pem"
    lock = forms.BestAvailableEncryption(password) if password else forms.NoEncryption()
    private.write_bytes(key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, lock))
    public.write_bytes(key.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def run_python(
    code: str,
    *args: object,
    blocked: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    without: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, in which the `blocked` packages cannot be imported, `without` some variables."""
    code = BLOCKER.format(blocked=set(blocked)) + code if blocked else code
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        env={name: value for name, value in {**os.environ, **(env or {})}.items() if name not in without},
        check=False,
    )


@contextmanager
def opens_of(path: Path) -> Iterator[list[int]]:
    """The times that any code of this process, native code too, opens `path` (inotify); filled at the end."""
    libc, opened = ctypes.CDLL(None, use_errno=True), []
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    assert descriptor >= 0
    in_open = 0x20
    assert libc.inotify_add_watch(descriptor, str(path).encode(), in_open) >= 0
    try:
        yield opened
        try:
            raw = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            raw = b""
        while raw:
            _, mask, _, length = struct.unpack_from("iIII", raw)
            opened.append(mask)
            raw = raw[16 + length :]
    finally:
        os.close(descriptor)
