"""The bundles that are tried, and what one draws: the same request of all, with the features of a step graph."""

from __future__ import annotations

import random
import shutil
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from epsrt import Sampler
from epsrt.condition import LABEL
from epsrt.errors import EpsrtError
from epsrt.machine import has_bf16
from epsrt.manifest import Manifest
from epsrt.types import Float32
from helpers import DATA, EXAMPLES, forge

ENGINES = ("onnxruntime", "openvino")
# by how often each is tried: those with most features, and the smallest, most
SEEDS = {
    "format-6": 6, "latent": 4, "tiny": 4, "small": 4, "learned": 3, "sized": 3, "format-5": 2, "format-4": 2,
    "plain": 1, "digits": 1,
}  # fmt: skip
MOST = 2000  # characters of a sentence
FULL = "format-6"  # it has every kind of step graph, and a condition


def path_of(name: str) -> Path:
    return EXAMPLES / "digits.epsrt" if name == "digits" else DATA / f"{name}.epsrt"


def chosen(rng: random.Random) -> str:
    return rng.choices(list(SEEDS), list(SEEDS.values()))[0]


def precision(rng: random.Random, engine: str, name: str = FULL) -> str | None:
    """What an FP32 graph is opened in. OpenVINO takes bf16 in a third of the cases, if the processor has it.

    Now and then it is None, for which the engine asks the golden file: that takes a second, and 10 with "digits".
    """
    share = rng.random()
    if engine != "openvino" or share > 1 / 3 or not has_bf16():
        return "fp32"
    return None if share < 0.03 and name != "digits" else "bf16"


def other(source: Path, out: Path, seed: int = 1) -> Path:
    """Another whole bundle of the same kind, with other weights and therefore other images: made at `out`."""
    shutil.copytree(source, out)
    generator = np.random.default_rng(seed)
    for file in sorted(out.glob("weights-*.bin")):
        values = np.fromfile(file, np.float16 if "fp16" in file.name else np.float32)
        weights = (np.abs(values) > 1e-3) & (np.abs(values) < 4)  # what else lies there may be of another type
        values[weights] *= (1 + 0.2 * generator.standard_normal(weights.sum())).astype(values.dtype)
        values.tofile(file)
    forge(out)
    return out


def runnable(m: Manifest, engine: str) -> list[tuple[str, tuple[str, ...]]]:
    """The precision and the features of each step graph that an engine runs; an FP32 graph runs in bf16 too."""
    known = ("fp32",) if engine == "openvino" else ("fp32", "fp16")
    return [(g.precision, g.features) for g in m.graphs if g.precision in known]


def request(m: Manifest, features: Iterable[str] = (), n: int = 2) -> dict[str, Any]:
    """The arguments of a small request that needs a step graph with these features."""
    asked: dict[str, Any] = {"n": n, "steps": 3, "seed": 7}
    if m.classes:
        asked["labels"] = min(3, m.classes - 1)
    asked["conditions"] = {c.name: np.full(c.shape, 0.5, c.dtype) for c in m.takes if c.name != LABEL}
    if "guidance" in features:
        asked["guidance"] = 2.0
    if "classifier" in features:
        asked |= {"classifier": 1.0, "targets": 1}
    if "mask" in features:
        mask = np.zeros(m.shape[1:], bool)
        mask[: m.shape[1] // 2] = True
        asked |= {"known": np.zeros((1, *m.shape), np.float32), "mask": mask}
    return asked


def draw(sampler: Sampler, features: Iterable[str] = (), n: int = 2) -> Float32:
    return sampler.sample(**request(sampler.bundle.manifest, features, n))


def opened(path: Path, engine: str, precision: str | None = "fp32") -> Sampler:
    """A sampler on one thread: two on two cores would only wait for each other."""
    return Sampler.open(path, engine, precision=precision, threads=1)


def images(
    path: Path, engine: str, precision: str | None = "fp32", features: Iterable[str] = (), n: int = 2
) -> Float32:
    """What a bundle draws, opened for it and closed again."""
    with opened(path, engine, precision) as sampler:
        return draw(sampler, features, n)


def says(error: BaseException) -> str:
    """ "" for an error of epsrt's, in one sentence that any terminal shows; else what is wrong with it."""
    text = f"{type(error).__name__}: {str(error)[:400]!r}"
    if not isinstance(error, EpsrtError):
        return text
    if len(str(error)) > MOST:
        return f"{len(str(error))} characters: {text}"
    unseen = {unicodedata.category(letter) for letter in str(error)} & {"Cc", "Cs", "Zl", "Zp"}
    return f"control characters: {text}" if unseen else ""
