"""The parts of a bundle on an engine's device: what is given to them is checked here, and each is opened once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from epsrt.bundle import Bundle
from epsrt.engine import Closing
from epsrt.engines.signature import Signature
from epsrt.errors import InputError, NotFiniteError, one_of
from epsrt.part import FREE, IMAGE, Part, Port
from epsrt.types import Arrays, Size

if TYPE_CHECKING:
    from epsrt.engines.proof import Kept

# fills the outputs from the inputs, [batch, …] each, C-contiguous; or puts arrays of its own in the outputs' place
Call = Callable[[Arrays, Arrays], None]
Open = Callable[[str, Part], Call]


class OpenPart(Closing):
    """A part on a device. Threads may share it. See epsrt.engine.RunningPart."""

    most_kept = None  # more than its engine's graphs are never asked for

    def __init__(self, bundle: Bundle, name: str, part: Part, call: Call):
        self.bundle, self.name, self.part, self._call = bundle, name, part, call
        self.precision: str = part.precision
        self.max_batch = bundle.manifest.max_batch

    def run(self, **arrays: NDArray[Any]) -> Arrays:
        """See epsrt.engine.RunningPart."""
        self.check_process()
        ports, m = {port.name: port for port in self.part.inputs}, self.bundle.manifest
        for name in {**ports, **arrays}:
            if name not in ports:
                raise InputError(f"{self.name} takes no {name!r}: {one_of(name, ports)}")
            if name not in arrays:
                raise InputError(f"{self.name} takes {name}, which is missing: give it")
        factor = m.latent.factor if m.latent else 1
        batch, extents = self._batch_of(arrays), m.shape[1:]
        for name, port in ports.items():
            extents = self._checked(port, arrays[name], batch, extents, factor)
        given = {name: np.require(arrays[name], None, ["C", "W"]) for name in ports}  # OpenVINO wants to write
        found = {p.name: np.zeros((batch, *p.of(extents, factor)), p.dtype) for p in self.part.outputs}
        self._call(given, found)
        for name, array in found.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                way = "" if self.precision == "fp32" else ": open the engine in fp32"
                raise NotFiniteError(f"{self.name} in {self.precision} gave an {name} that is not finite{way}")
        return found

    def kept(self, batch: int, size: Size | None = None) -> Kept:
        """What it runs from at a batch, beside samples of a size, made now if need be: it runs once, on zeros.

        Raises InputError for a batch or a size that it does not take, and EngineError where the cache does not keep it.
        """
        from epsrt.engines.proof import Kept  # with what no process needs that keeps nothing

        m = self.bundle.manifest
        self._check_batch(batch)
        factor, extents = m.latent.factor if m.latent else 1, self.bundle.image_shape(size)[1:]
        signature = Signature.of_part(self.part, factor, batch, extents)
        given, found = (
            {name: tensor.zeros() for name, tensor in side.items()} for side in (signature.inputs, signature.outputs)
        )
        self._call(given, found)
        keeps = getattr(self._call, "kept", None)  # of those that keep files
        return Kept(None, ()) if keeps is None else keeps(given)

    def close(self) -> None:
        """Nothing is run any more."""

        def closed(given: Arrays, found: Arrays) -> None:
            raise InputError(f"part {self.name} of {self.bundle.name} is closed: open its engine again")

        call, self._call = self._call, closed
        if release := getattr(call, "close", None):  # of those that hold what is not Python's
            release()

    def _batch_of(self, arrays: Mapping[str, Any]) -> int:
        lengths = {name: len(array) if np.ndim(array) else 0 for name, array in arrays.items()}
        (name, batch), *others = lengths.items()
        for other, length in others:
            if length != batch:
                raise InputError(f"{self.name} was given {batch} of {name} and {length} of {other}: give equally many")
        self._check_batch(batch)
        return batch

    def _check_batch(self, batch: int) -> None:
        if not 1 <= batch <= self.max_batch:
            raise InputError(f"a batch of {batch} is outside 1 … {self.max_batch}, the bundle's largest")

    def _checked(self, port: Port, array: Any, batch: int, extents: Size, factor: int) -> Size:
        """The latents' extents beside an input. Raises InputError where it is not what the port says."""
        if not isinstance(array, np.ndarray):
            raise self._refused(port, f"a {type(array).__name__}: give a NumPy array")
        if array.dtype != port.dtype:
            raise self._refused(port, f"{array.dtype}: convert it with {port.name}.astype({port.dtype!r})")
        shape = array.shape[1:]
        if shape != port.shape and not _fit(shape, port.shape):
            raise self._refused(port, f"{list(array.shape)}: {self._other(shape)}")
        if FREE in port.shape:
            times = factor if port.name == IMAGE else 1
            if any(n % times for n in shape[1:]):
                raise self._refused(port, f"{list(array.shape)}: its extents are multiples of {times} pixels")
            extents = self.bundle.image_shape([n // times for n in shape[1:]])[1:]
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"{self.name} was given an {port.name} with NaN or infinity in it: mend what made it")
        return extents

    def _refused(self, port: Port, found: str) -> InputError:
        words = ", ".join("?" if n == FREE else str(n) for n in port.shape)
        return InputError(f"{self.name} takes {port.name} as {port.dtype} [batch, {words}], not {found}")

    def _other(self, shape: tuple[int, ...]) -> str:
        """What an array of a wrong shape seems to be."""
        m = self.bundle.manifest
        if m.latent and shape == m.latent.shape != m.shape:
            return "that is a picture, which encode makes latents of"
        if m.latent and shape == m.shape != m.latent.shape:
            return "that is a latent, which decode makes pictures of"
        return "reshape it, or export the bundle with that shape"


class OpenParts:
    """The parts of a bundle that an engine has open; `precision` is the engine's graph's. It holds no engine."""

    def __init__(self, bundle: Bundle, precision: str):
        self._bundle, self._precision = bundle, precision
        self._lock, self._parts = threading.Lock(), dict[str, OpenPart]()

    def get(self, name: str, open: Open) -> OpenPart:
        """See Engine.part: `open(name, part)` opens it when it is first asked for."""
        part = self._bundle.part(name, self._precision)
        with self._lock:
            if name not in self._parts:
                self._parts[name] = OpenPart(self._bundle, name, part, open(name, part))
            return self._parts[name]

    def close(self) -> None:
        """Close them, and forget them."""
        with self._lock:
            for part in self._parts.values():
                part.close()
            self._parts.clear()


def _fit(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(b in (n, FREE) for n, b in zip(shape, wanted, strict=True))
