"""The GPU's own clock: CUDA events around steps, as requests run them."""

from __future__ import annotations

from epsrt.engine import Closing
from epsrt.engines.gpu import cuda
from epsrt.engines.gpu.lanes import CHUNK, DeviceLanes
from epsrt.types import Float32


class DeviceClock(Closing):
    """Of one lanes object. What it times is all that the lanes give to their stream: rows, noise, engine and check."""

    def __init__(self, lanes: DeviceLanes):
        self._lanes, self._stream = lanes, lanes._stream  # nothing but a clock needs the stream
        self._events: list[cuda.Event] = []

    def steps(self, rows: Float32, each: bool) -> list[float]:
        """Seconds a step, of every CudaGraph's worth of rows [steps, batch, columns]; `each`: of every row."""
        length = 1 if each else CHUNK
        parts = [rows[i : i + length] for i in range(0, len(rows), length)]
        while len(self._events) <= len(parts):
            self._events.append(cuda.Event(timing=True))
        begin, *ends = self._events[: len(parts) + 1]
        begin.record(self._stream)
        for part, end in zip(parts, ends, strict=True):
            self._lanes.advance(part)
            end.record(self._stream)
        self._lanes.wait()
        marks = zip([begin, *ends], ends, parts, strict=False)
        return [1e-3 * end.since(start) / len(part) for start, end, part in marks]

    def close(self) -> None:
        for event in self._events:
            event.close()
        self._events = []
