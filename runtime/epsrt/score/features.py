"""Features of images, from an ONNX file that the user brings: Inception, or a classifier of their own data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsrt.engine import check_threads
from epsrt.errors import EngineError, InputError, one_line, whole
from epsrt.forks import Unforkable
from epsrt.raised import foreign
from epsrt.types import Float64, UInt8

try:
    from epsrt.engines.ort_library import ERRORS, ort
except EngineError as error:
    raise InputError(f"features come from an ONNX file: {error}") from error

KINDS = ("features", "logits", "probabilities")  # the kinds of output, and the names by which they are found
RANGE_KEY = "value_range"  # in the file's metadata, e.g. "-1,1"
BATCH = 64


@dataclass(frozen=True)
class Extracted:
    """features float64 [n, D]; probabilities float64 [n, K], None where the file has no classes."""

    features: Float64
    probabilities: Float64 | None


class Extractor(Unforkable):
    """An ONNX file with one image input [N, C, H, W] and an output of features [N, D], on the CPU.

    path         the file; N must be free, H and W may be
    value_range  what 0 and 255 become at its input, e.g. (-1, 1), (0, 1), (0, 255). None: what the file's metadata
                 says under "value_range" ("-1,1"); an input of uint8 is given 0 … 255
    names        which output is which kind, {"features": …, "logits": …, "probabilities": …}. A kind without a name is
                 the output that is called so, and a file's only output is its features. Classes are optional, as
                 logits or as probabilities
    threads      how many at most; None: all cores

    `shape` is (C, H, W) and `features` is D, as far as the file says them, else None.

    The file may be of any exporter, so it is not held to epsrt.operators: bring it from those whose code you would run.

    Images are never resized here. The way of resizing changes the figures, so it belongs into the file. Raises
    InputError where the file is no ONNX, has other inputs or outputs, or does not say its range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        value_range: tuple[float, float] | None = None,
        names: Mapping[str, str] | None = None,
        threads: int | None = None,
    ):
        self.path = Path(path)
        self._session = _session(self.path, threads)
        self._input = self._image_input()
        self.shape: tuple[int | None, ...] = tuple(d if isinstance(d, int) else None for d in self._input.shape[1:])
        self._bytes = self._input.type == "tensor(uint8)"
        self.value_range = self._range(value_range)
        self._outputs = self._named(dict(names or {}))
        wide = next(o for o in self._session.get_outputs() if o.name == self._outputs["features"]).shape[1]
        self.features: int | None = wide if isinstance(wide, int) else None

    def __call__(
        self, images: UInt8, batch: int = BATCH, on_batch: Callable[[int, int], object] = lambda done, total: None
    ) -> Extracted:
        """The features of images uint8 [n, H, W, C], `batch` at a time; on_batch(done, total) is called after each."""
        self.check_process()
        self.check(images)
        if whole("batch", batch) < 1:
            raise InputError(f"batch = {batch}: give at least 1")
        found: dict[str, list[NDArray[Any]]] = {kind: [] for kind in self._outputs}
        for first in range(0, len(images), batch):
            part = images[first : first + batch]
            try:
                out = self._session.run(list(self._outputs.values()), {self._input.name: self._scaled(part)})
            except ERRORS as error:
                if foreign(error, "onnxruntime"):
                    raise
                raise InputError(
                    f"{self.path} fails on {len(part)} images ({one_line(error)}): export it anew"
                ) from error
            for kind, values in zip(self._outputs, out, strict=True):
                if values.ndim != 2 or len(values) != len(part):
                    raise InputError(
                        f"{self.path}: its {kind} of {len(part)} images are {list(values.shape)}, not "
                        f"[{len(part)}, {'D' if kind == 'features' else 'K'}]: flatten them, and leave the batch free"
                    )
                bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
                if len(bad):
                    raise InputError(f"{self.path} gives NaN or infinity in the {kind} of image {first + bad[0]}")
                found[kind].append(values)
            on_batch(first + len(part), len(images))
        joined = {kind: np.concatenate(parts).astype(np.float64) for kind, parts in found.items()}
        probabilities = joined.get("probabilities")
        if "logits" in joined:
            probabilities = _softmax(joined["logits"])
        return Extracted(joined["features"], probabilities)

    def _scaled(self, images: UInt8) -> NDArray[Any]:
        planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        if self._bytes:
            return planes
        low, high = self.value_range
        return planes.astype(np.float32) * np.float32((high - low) / 255) + np.float32(low)

    def check(self, images: UInt8) -> None:
        """Raise InputError unless the extractor takes these images."""
        if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
            raise InputError(f"features are of uint8 images [n, H, W, C], not {images.dtype} {list(images.shape)}")
        height, width, channels = images.shape[1:]
        want_channels, want_height, want_width = self.shape
        if want_channels not in (None, channels):
            raise InputError(
                f"{self.path} takes images of {want_channels} channels, these have {channels}: bring an extractor of "
                f"{channels}"
            )
        if want_height not in (None, height) or want_width not in (None, width):
            raise InputError(
                f"{self.path} takes images of {want_height or 'any'} × {want_width or 'any'}, these are "
                f"{height} × {width}: bring an extractor of that size, or one that resizes them itself"
            )

    def _image_input(self) -> Any:
        inputs = self._session.get_inputs()
        words = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs) or "none"
        fits = len(inputs) == 1 and len(inputs[0].shape) == 4 and inputs[0].type in ("tensor(float)", "tensor(uint8)")
        if not fits:
            raise InputError(f"{self.path} has the inputs {words}: an extractor has one, float32 or uint8 [N, C, H, W]")
        if isinstance(inputs[0].shape[0], int):
            raise InputError(f"{self.path} takes batches of {inputs[0].shape[0]} only: export it with a free batch")
        return inputs[0]

    def _range(self, given: tuple[float, float] | None) -> tuple[float, float]:
        told = self._session.get_modelmeta().custom_metadata_map.get(RANGE_KEY)
        if self._bytes:
            if given not in (None, (0, 255)):
                raise InputError(f"{self.path} takes uint8, 0 … 255: leave the range out")
            return 0.0, 255.0
        if given is None and told is None:
            raise InputError(
                f"{self.path} does not say what range its images have: give it, 0,1 or -1,1 or 0,255, or write it into "
                f'the file\'s metadata as "{RANGE_KEY}"'
            )
        return range_of(told or "") if given is None else check_range(given)

    def _named(self, names: dict[str, str]) -> dict[str, str]:
        """kind -> output."""
        have = {o.name: o for o in self._session.get_outputs()}
        for kind, name in names.items():
            if kind not in KINDS:
                raise InputError(f"names say what {kind!r} is: they are of {', '.join(KINDS)}")
            if name not in have:
                raise InputError(f"{self.path} has no output {name!r} for its {kind}: it has {', '.join(have)}")
        found = {kind: names.get(kind, kind) for kind in KINDS if names.get(kind, kind) in have}
        if "features" not in found and len(have) == 1:
            found = {"features": next(iter(have))}
        if "features" not in found:
            raise InputError(
                f"{self.path} has the outputs {', '.join(have)}, and none is called features: say which is, "
                "features=NAME"
            )
        if "logits" in found and "probabilities" in found:
            del found["logits" if "probabilities" in names else "probabilities"]
        for kind, name in found.items():
            if len(have[name].shape) != 2 or have[name].type not in (
                "tensor(float)",
                "tensor(double)",
                "tensor(float16)",
            ):
                raise InputError(
                    f"{self.path}: its {kind} {name} are {have[name].type} {have[name].shape}, not floats [N, "
                    f"{'D' if kind == 'features' else 'K'}]: flatten them"
                )
        return found


def range_of(text: str) -> tuple[float, float]:
    """(low, high) of "-1,1"."""
    try:
        low, high = (float(word) for word in text.split(","))
    except ValueError as error:
        raise InputError(f"range {text!r} is not two numbers, LOW,HIGH: such as 0,1 or -1,1 or 0,255") from error
    return check_range((low, high))


def check_range(given: tuple[float, float]) -> tuple[float, float]:
    low, high = given
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise InputError(f"range {low:g},{high:g} does not ascend: it is what black and white become, such as 0,1")
    return float(low), float(high)


def _session(path: Path, threads: int | None) -> Any:
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}: give an ONNX file, images [N, C, H, W] to features [N, D]")
    check_threads(threads)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors come as exceptions
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except ERRORS as error:
        if foreign(error, "onnxruntime"):
            raise
        raise InputError(f"{path} is no ONNX file that onnxruntime can run ({one_line(error)})") from error


def _softmax(logits: Float64) -> Float64:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Float64 = shifted / shifted.sum(axis=1, keepdims=True)
    return shares
