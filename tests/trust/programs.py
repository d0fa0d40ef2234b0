"""The commands that are killed, and what is wrong with what stands in their folder after a kill."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from epsrt import Bundle
from epsrt.errors import EpsrtError

TINY = [
    *("train.steps=4", "train.batch=8", "train.checkpoint_every=1", "train.warmup=1", "train.lr_decay=constant"),
    *("train.sample_every=2", "train.label_drop=0", "schedule.T=10", "network.depth=1", "network.width=16"),
    *("network.heads=1", "network.classes=0", "network.null_label=false"),
]


@dataclass(frozen=True)
class Program:
    """A command, run in a folder of its own.

    words   what is typed behind `epsrt`
    needs   programs whose results it takes
    old     what may stand there before it runs: it makes that anew
    faults  what is wrong with what stands in the folder after a kill; `known` are the results of whole runs
    """

    name: str
    words: tuple[str, ...]
    results: tuple[str, ...]
    faults: Callable[[Path, dict[str, bytes]], list[str]]
    needs: tuple[str, ...] = ()
    old: bool = False


def contents(path: Path) -> bytes:
    """A file's bytes, or those of a folder's files with their names; b"" where there is nothing."""
    if not path.is_dir():
        return path.read_bytes() if path.exists() else b""
    return b"".join(f"{p.name}\0".encode() + p.read_bytes() for p in sorted(path.iterdir()))


def _differs(name: str) -> Callable[[Path, dict[str, bytes]], list[str]]:
    def faults(place: Path, known: dict[str, bytes]) -> list[str]:
        there = contents(place / name)
        return [f"{name} is half there"] if there and there != known[name] else []

    return faults


def _of_training(place: Path, known: dict[str, bytes]) -> list[str]:
    from epsrt_trainer.tensors import read_safetensors  # which takes torch

    found = _differs("net.safetensors")(place, known)
    for file in place.glob("net*.safetensors"):
        try:
            read_safetensors(file)
        except EpsrtError as error:
            found.append(str(error))
    for file in place.glob("net.*.png"):
        with Image.open(file) as image:
            image.load()
    return found


def _of_export(place: Path, known: dict[str, bytes]) -> list[str]:
    """A bundle that was there must not be gone; what is there must open."""
    path = place / "net.epsrt"
    if not path.exists():
        return ["no bundle is left at its path"] if (place / "had-one").exists() else []
    try:
        Bundle.open(path)
    except EpsrtError as error:
        return [str(error)]
    return []


SAMPLE = ("sample", "tiny.epsrt", "--threads", "1", "--steps", "2")
PROGRAMS = {
    p.name: p
    for p in (
        Program(
            "train",
            ("train", "--preset", "digits-dit", *(w for s in TINY for w in ("--set", s)), "--out", "net.safetensors"),
            ("net.safetensors",),
            _of_training,
        ),
        Program(
            "export",
            ("export", "net.safetensors", "net.epsrt", "--precision", "fp32", "--max-batch", "2"),
            ("net.epsrt",),
            _of_export,
            needs=("train",),
            old=True,
        ),
        Program(
            "compile",
            (*SAMPLE, "-n", "2", "--engine", "openvino", "--precision", "fp32", "--out", "two.npz"),
            ("two.npz",),
            _differs("two.npz"),
        ),
        Program(
            "sample",
            (*SAMPLE, "-n", "20", "--engine", "onnxruntime", "--out", "pictures"),
            ("pictures",),
            _differs("pictures"),
        ),
    )
}


LIGHT = ("numpy", "typer", "rich.progress", "PIL.Image", "epsrt_command.app", "epsrt.sampler")
HEAVY = (
    *("torch", "onnx", "onnxscript", "sklearn.datasets", "safetensors.torch", "torch.export", "torch._dynamo"),
    *("torch.onnx._internal.exporter._core", "onnxscript.optimizer", "onnx_ir.passes.common", "pydantic", "networkx"),
    *("epsrt_trainer.train", "epsrt_trainer.data"),
)


def warm(program: str) -> None:
    """Import what a command imports, but for what starts threads: onnxruntime, and OpenVINO."""
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", COLUMNS="100")
    for name in LIGHT + (HEAVY if program in ("export", "train") else ()):
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1  # a fork of several threads would not be sound
