"""Table: what goes up to the device with every call of advance."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from epsrt.engines.gpu.cuda import Event, Memory, Pinned, Stream


class Table:
    """Device memory that grows to what is uploaded into it, by way of two pinned buffers that take turns."""

    def __init__(self, stream: Stream, purpose: str):
        self._stream, self._purpose, self._turn = stream, purpose, 0
        self._memory: Memory | None = None
        self._pinned: list[Pinned | None] = [None, None]
        self._uploaded: list[Event] = []
        try:
            for _ in self._pinned:
                self._uploaded.append(Event())
        except BaseException:
            self.close()
            raise

    def upload(self, *arrays: NDArray[np.generic]) -> int:
        """Copy arrays one behind the other to the device; their address, valid until the next upload has run.

        The arrays may be reused at once.
        """
        size = sum(a.nbytes for a in arrays)
        if self._memory is None or self._memory.size < size:
            if self._memory is not None:
                self._stream.synchronize()
                self._memory.close()
                self._memory = None
            self._memory = Memory(size, self._purpose)
        self._turn ^= 1
        self._uploaded[self._turn].synchronize()
        pinned = self._pinned[self._turn]
        if pinned is None or pinned.size < size:
            if pinned is not None:
                pinned.close()
                self._pinned[self._turn] = None
            pinned = self._pinned[self._turn] = Pinned(size)
        end = 0
        for array in arrays:
            begin, end = end, end + array.nbytes
            pinned.array[begin:end] = np.ascontiguousarray(array).view(np.uint8).ravel()
        self._stream.upload(self._memory.pointer, pinned.array[:size])
        self._uploaded[self._turn].record(self._stream)
        return self._memory.pointer

    def wait(self) -> None:
        """Wait until the last upload has run, and so all that the stream was given before it."""
        self._uploaded[self._turn].synchronize()

    def close(self) -> None:
        for resource in (self._memory, *self._pinned, *self._uploaded):
            if resource is not None:
                resource.close()
        self._memory, self._pinned = None, [None, None]
