"""Parts on a GPU: arrays go to the device and come back, by memory that is kept for the batch and size met last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

import numpy as np

from epsrt.bundle import Bundle
from epsrt.engines.gpu import cuda
from epsrt.engines.proof import Kept
from epsrt.engines.signature import Signature, Tensor
from epsrt.part import Part
from epsrt.types import Arrays

KEPT = 2  # batches and sizes of a part that are ready to run


class Runner(Protocol):
    """A part bound to buffers: gives one run to their stream. Raises EngineError when the engine refuses."""

    def enqueue(self) -> None: ...

    def close(self) -> None: ...


class PartBuffers:
    """Memory of the device and of the host for the tensors of `signature`, whose extents are given, and a stream."""

    def __init__(self, device: cuda.Device, signature: Signature, purpose: str):
        self.signature, self.addresses = signature, dict[str, int]()
        self._pinned, self._stack = dict[str, cuda.Pinned](), ExitStack()
        try:
            self.stream = cuda.Stream(device)
            self._stack.callback(self.stream.close)
            for name, tensor in {**signature.inputs, **signature.outputs}.items():
                memory = cuda.Memory(tensor.nbytes, purpose)
                self._stack.callback(memory.close)
                self.addresses[name], self._pinned[name] = memory.pointer, cuda.Pinned(tensor.nbytes)
                self._stack.callback(self._pinned[name].close)
        except BaseException:
            self.close()
            raise

    def run(self, given: Arrays, found: Arrays, enqueue: Callable[[], None]) -> None:
        """Fill `found` with what one run makes of `given`."""
        for name, array in given.items():
            self._pinned[name].array[: array.nbytes] = array.view(np.uint8).ravel()
            self.stream.upload(self.addresses[name], self._pinned[name].array[: array.nbytes])
        enqueue()
        for name, array in found.items():
            self.stream.download(self._pinned[name].array[: array.nbytes], self.addresses[name])
        self.stream.synchronize()
        for name, array in found.items():
            array.view(np.uint8).ravel()[:] = self._pinned[name].array[: array.nbytes]

    def close(self) -> None:
        """Release them. Nothing may run on the stream any more."""
        self._stack.close()


class DeviceParts:
    """parts.Call: a part on the device; `make(buffers)` makes what runs it at a batch and size. Calls take turns.

    `kept` says what runs arrays, where the engine keeps files: see parts.OpenPart.
    """

    def __init__(
        self,
        device: cuda.Device,
        bundle: Bundle,
        part: Part,
        make: Callable[[PartBuffers], Runner],
        kept: Callable[[Arrays], Kept] | None = None,
    ):
        self._device, self._bundle, self._part, self._make, self.kept = device, bundle, part, make, kept
        self._ready: OrderedDict[tuple[tuple[int, ...], ...], tuple[PartBuffers, Runner]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, given: Arrays, found: Arrays) -> None:
        with self._lock:
            self._device.use()
            key = tuple(array.shape for array in given.values())
            if key not in self._ready:
                while len(self._ready) >= KEPT:
                    self._drop()
                self._ready[key] = self._opened(given, found)
            self._ready.move_to_end(key)
            buffers, runner = self._ready[key]
            try:
                buffers.run(given, found, runner.enqueue)
            except BaseException:
                self._drop(key)  # what is left of a run that failed is in its stream
                raise

    def close(self) -> None:
        """Release what is kept."""
        with self._lock:
            self._device.use()
            while self._ready:
                self._drop()

    def _opened(self, given: Arrays, found: Arrays) -> tuple[PartBuffers, Runner]:
        tensors = ({name: Tensor(str(a.dtype), a.shape) for name, a in arrays.items()} for arrays in (given, found))
        buffers = PartBuffers(self._device, Signature(*tensors), f"{self._part.file} of {self._bundle.name}")
        try:
            return buffers, self._make(buffers)
        except BaseException:
            buffers.close()
            raise

    def _drop(self, key: tuple[tuple[int, ...], ...] | None = None) -> None:
        """One, by default that which was met longest ago."""
        buffers, runner = self._ready.pop(next(iter(self._ready)) if key is None else key)
        with ExitStack() as stack:
            stack.callback(buffers.close)
            stack.callback(runner.close)
            stack.callback(buffers.stream.synchronize)
