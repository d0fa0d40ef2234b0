"""Peeks: images that leave the device while steps go on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from epsrt.engines.gpu import cuda
from epsrt.engines.gpu.buffers import runs
from epsrt.types import Float32, Shape


class Download:
    """See epsrt.engine.Peek: images of `shape` on their way into pinned memory, there once `landed` has passed."""

    def __init__(self, device: cuda.Device, landed: cuda.Event, pinned: cuda.Pinned, shape: Shape):
        self._device, self._landed, self._pinned, self._shape = device, landed, pinned, shape
        self._images: Float32 | None = None

    def done(self) -> bool:
        self._device.use()
        return self._images is not None or self._landed.passed()

    def result(self) -> Float32:
        if self._images is None:
            self._device.use()
            self._landed.synchronize()
            landed = self._pinned.array.view(np.float32)[: int(np.prod(self._shape))]
            self._images = landed.reshape(self._shape).copy()
        return self._images


class Peeks:
    """Downloads of lanes' images, one at a time, by a stream of their own.

    The steps' stream copies the images aside, which takes no longer than the device's memory does; so the next steps
    need not wait until they are on the host. Raises OutOfMemoryError where there is no room for them.
    """

    def __init__(self, device: cuda.Device, steps: cuda.Stream, width: int, shape: Shape):
        self._device, self._steps, self._shape = device, steps, shape
        self._image = 4 * int(np.prod(shape))
        self._last: Download | None = None
        with ExitStack() as stack:
            made = cuda.Memory(width * self._image, f"a peek at {width} lanes")
            stack.callback(made.close)
            self._aside = made.pointer
            self._pinned = cuda.Pinned(width * self._image)
            stack.callback(self._pinned.close)
            self._landed = cuda.Event()
            stack.callback(self._landed.close)
            self._stream = cuda.Stream(device)
            stack.callback(self._stream.close)
            stack.callback(self._stream.synchronize)
            self._open = stack.pop_all()

    def take(self, images: int, lanes: Sequence[int]) -> Download:
        """Begin to download some lanes' images, which are at an address of the device."""
        self._settle()
        for run in runs(lanes):
            to, source = self._aside + run.start * self._image, images + lanes[run.start] * self._image
            self._steps.copy(to, source, (run.stop - run.start) * self._image)
        self._stream.wait_for(self._steps)
        self._stream.download(self._pinned.array[: len(lanes) * self._image], self._aside)
        self._landed.record(self._stream)
        self._last = Download(self._device, self._landed, self._pinned, (len(lanes), *self._shape))
        return self._last

    def _settle(self) -> None:
        """Let the last download keep its images: what they lie in is about to be written or freed."""
        if self._last is not None:
            self._last.result()
            self._last = None

    def close(self) -> None:
        with self._open:
            self._settle()
