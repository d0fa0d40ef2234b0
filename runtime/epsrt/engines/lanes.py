"""Lanes on the GPU, whatever engine runs the step: device buffers, noise, captured chunks of steps, one flag a lane.

An engine brings a Runner, which enqueues one step. Nothing returns to the host before `read`.
"""

from __future__ import annotations

import ctypes
import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from epsrt.engines import cuda
from epsrt.engines.protocol import Closing, Images, Rows, Sample, check_lane, check_rows, check_sample, not_finite
from epsrt.errors import EngineError, NotFiniteError
from epsrt.plan import idle_row

log = logging.getLogger("epsrt")

CHUNK = 10  # steps in one captured graph, at most
KEPT_GRAPHS = 8  # of a lanes object: one for each length and kind of chunk that it met
TABLE_BYTES = 32 << 20  # of rows uploaded at once: a thousand steps of a batch of 256 fit
ALIGNMENT = 256  # what TensorRT wants of every address

BEGIN = np.dtype(
    [("seed", "u8"), ("label", "i8"), ("index", "u4"), ("lane", "i4"), ("signal", "f4"), ("scale", "f4"),
     ("init", "i4"), ("unused", "i4")]
)  # fmt: skip  # struct Begin of kernels.cu

_i32, _pointer = ctypes.c_int32, ctypes.c_void_p


@dataclass(frozen=True)
class Buffers:
    """Device addresses that a step reads and writes, for `width` lanes of images of `shape`. Two x and m alternate; z,
    label, x0 do not."""

    width: int
    shape: tuple[int, int, int]  # C, H, W
    x: tuple[int, int]
    m: tuple[int, int]
    z: int
    label: int
    x0: int


class Runner(Protocol):
    """An engine's execution context, bound to the buffers of one lanes object."""

    capturable: bool  # whether its work may be recorded in a graph of ours

    def enqueue(self, now: int, rows: int) -> None:
        """Give one step to the stream: from x[now], m[now] and the rows at an address to x[1 − now], m[1 − now], x0.

        Raises EngineError when the engine refuses.
        """

    def close(self) -> None: ...


MakeRunner = Callable[[Buffers, cuda.Stream], Runner]


class DeviceLanes(Closing):
    """See protocol.Lanes. Owns its stream, its buffers and the runner that `make` returns.

    `batch` lanes for the caller; `width` ≥ batch for the engine, where its profiles begin higher: the rest stay idle.
    Raises EngineError, with everything released, when the device's memory does not suffice.
    """

    def __init__(
        self, device: cuda.Device, shape: tuple[int, int, int], columns: tuple[str, ...], batch: int, width: int,
        make: MakeRunner, chunk: int = CHUNK,
    ):  # fmt: skip
        self.batch, self.shape = batch, shape
        self.capturing = True  # until a capture fails
        self._whole = True  # False while steps are given to the stream, and for good where that failed
        self._device, self._columns, self._width, self._chunk = device, columns, width, chunk
        self._at = {name: i for i, name in enumerate(columns)}
        self._size = int(np.prod(shape))
        device.use()
        with ExitStack() as stack:
            self._allocate(stack, make)
            self._open = stack.pop_all()

    def _allocate(self, stack: ExitStack, make: MakeRunner) -> None:
        width, image = self._width, 4 * self._width * self._size

        self._stream = cuda.Stream(self._device)
        stack.callback(self._stream.close)

        def memory(size: int) -> int:
            made = cuda.Memory(size, f"a batch of {width}")
            stack.callback(made.close)
            self._stream.zero(made.pointer, size)
            return made.pointer

        self._state = Buffers(
            width, self.shape, (memory(image), memory(image)), (memory(image), memory(image)), memory(image),
            memory(8 * width), memory(image),
        )  # fmt: skip
        self._seeds, self._indices = memory(8 * width), memory(4 * width)
        self._broken = memory(8 * width)  # step [width] int32, then t [width] float32
        self._row_bytes = -(-4 * width * (len(self._columns) + 1) // ALIGNMENT) * ALIGNMENT  # a step's rows and numbers
        self._slots = memory(self._chunk * self._row_bytes)  # where captured graphs find their rows
        self._table = cuda.Table(self._stream, f"a batch of {width}")
        stack.callback(self._table.close)
        self._images: dict[str, Images] = {}  # what was read since the state last changed
        self._landing = cuda.Pinned(image + 8 * width)
        stack.callback(self._landing.close)
        self._graphs: OrderedDict[tuple[int, bool], cuda.Graph] = OrderedDict()
        stack.callback(self._drop_graphs)
        self._pending: dict[int, Sample] = {}  # written, not yet on the device
        self._samples = [Sample() for _ in range(width)]
        self._steps = np.zeros(width, np.int32)
        self._runner = make(self._state, self._stream)
        stack.callback(self._runner.close)
        stack.callback(self._stream.synchronize)  # the first to run at the end: nothing is freed in use
        # The engine sets itself up in its first run, which must not happen in a capture.
        rows = self._table.upload(self._idle(1))
        for now in (0, 1):
            self._runner.enqueue(now, rows)
        self._stream.synchronize()

    def write(self, index: int, sample: Sample) -> None:
        check_lane(index, self.batch)
        check_sample(sample, self.shape)
        init = None if sample.init is None else np.array(sample.init, np.float32)  # the caller's may change
        self._pending[index] = Sample(sample.seed, sample.index, sample.start, init, sample.label)
        self._samples[index] = sample
        self._steps[index] = 0
        self._images.clear()

    def advance(self, rows: Rows) -> None:
        check_rows(rows, self.batch, len(self._columns))
        self._check_whole()
        self._device.use()
        self._begin()
        self._images.clear()
        self._whole = False
        most = max(1, TABLE_BYTES // self._row_bytes)
        for first in range(0, len(rows), most):
            part = rows[first : first + most]
            table = self._table.upload(self._table_of(part))
            noisy = (part[:, :, self._at["d"]] != 0).any(axis=1)
            for i in range(0, len(part), self._chunk):
                count = min(self._chunk, len(part) - i)
                self._run(table + i * self._row_bytes, count, bool(noisy[i : i + count].any()))
        self._whole = True

    def wait(self) -> None:
        self._device.use()
        self._stream.synchronize()

    def read(self, index: int, what: Literal["x", "x0"] = "x") -> Images:
        check_lane(index, self.batch)
        self._check_whole()
        self._device.use()
        self._begin()
        if what not in self._images:
            self._fetch(what)
        step, t = self._flags[0].view(np.int32)[index], self._flags[1][index]
        if step:
            raise NotFiniteError(not_finite(index, self._samples[index], int(step), float(t)))
        return self._images[what][index].copy()  # type: ignore[no-any-return]

    def time_steps(self, steps: int) -> float:
        """Milliseconds a step of the engine alone, idle rows, on the device's clock; what the lanes hold is kept."""
        self._device.use()
        self._begin()
        table = self._table.upload(self._idle(1))
        begin, end = cuda.Event(timing=True), cuda.Event(timing=True)
        steps += steps % 2  # back to x[0]
        try:
            for event in (None, begin):  # the first round warms up
                if event:
                    event.record(self._stream)
                for i in range(steps):
                    self._runner.enqueue(i % 2, table)
            end.record(self._stream)
            self._stream.synchronize()
            return end.since(begin) / steps
        finally:
            begin.close()
            end.close()

    def _check_whole(self) -> None:
        if not self._whole:
            raise EngineError("an earlier advance of these lanes failed: what they hold is lost, make new lanes")

    def _fetch(self, what: str) -> None:
        image = 4 * self._width * self._size
        self._stream.download(self._landing.array[:image], self._state.x[0] if what == "x" else self._state.x0)
        self._stream.download(self._landing.array[image:], self._broken)
        self._stream.synchronize()
        host = self._landing.array.copy()
        self._images[what] = host[:image].view(np.float32).reshape(self._width, *self.shape)
        self._flags = host[image:].view(np.float32).reshape(2, self._width)

    def _begin(self) -> None:
        """Put what was written into its lanes, all in one launch."""
        if not self._pending:
            return
        samples = self._pending
        begins = np.zeros(len(samples), BEGIN)
        inits: list[Images] = []
        for i, (lane, sample) in enumerate(samples.items()):
            place = -1
            if sample.init is not None and sample.start[0] != 0:
                place = len(inits)
                inits.append(sample.init.ravel())
            begins[i] = (sample.seed, sample.label, sample.index, lane, *sample.start, place, 0)
        at = self._table.upload(begins, *inits)
        s = self._state
        addresses = (s.x[0], s.m[0], s.x0, self._seeds, self._indices, s.label, self._broken, at, at + begins.nbytes)
        self._stream.launch("begin", len(begins), self._size, *map(_pointer, addresses), _i32(self._size))
        self._pending = {}

    def _table_of(self, rows: Rows) -> Rows:
        """Rows for the device, float32 [steps, row_bytes / 4]: each step's rows [width, columns], then its numbers."""
        table = self._idle(len(rows))
        wide = len(self._columns)
        table[:, : self._width * wide].reshape(len(rows), self._width, wide)[:, : self.batch] = rows
        numbers = table[:, self._width * wide : self._width * (wide + 1)].view(np.int32)
        numbers[...] = self._steps + np.arange(1, len(rows) + 1, dtype=np.int32)[:, None]
        self._steps += len(rows)
        return table

    def _idle(self, steps: int) -> Rows:
        table = np.zeros((steps, self._row_bytes // 4), np.float32)
        table[:, : self._width * len(self._columns)] = np.tile(idle_row(self._columns), self._width)
        return table

    def _run(self, rows: int, count: int, noisy: bool) -> None:
        graph = self._graph(count, noisy) if self.capturing and self._runner.capturable else None
        if graph is None:
            self._enqueue(rows, count, noisy)
            return
        self._stream.copy(self._slots, rows, count * self._row_bytes)
        self._stream.replay(graph)

    def _graph(self, count: int, noisy: bool) -> cuda.Graph | None:
        """The captured graph of `count` steps on the rows in the slots; None once a capture has failed."""
        key = count, noisy
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        try:
            graph = self._stream.capture(lambda: self._enqueue(self._slots, count, noisy))
        except EngineError as error:
            self.capturing = False
            log.warning("steps are enqueued one by one, which is slower: CUDA cannot capture them (%s)", error)
            return None
        if len(self._graphs) == KEPT_GRAPHS:
            self._stream.synchronize()  # it may be running
            self._graphs.popitem(last=False)[1].close()
        self._graphs[key] = graph
        return graph

    def _enqueue(self, rows: int, count: int, noisy: bool) -> None:
        """Give `count` steps to the stream, from x[0] to x[0]."""
        s, wide = self._state, len(self._columns)
        size, columns = _i32(self._size), _i32(wide)
        for i in range(count):
            now, row = i % 2, rows + i * self._row_bytes
            if noisy:
                addresses = (s.z, row, self._seeds, self._indices)
                places = (_i32(self._at["d"]), _i32(self._at["n"]))
                self._stream.launch("noise", s.width, self._size, *map(_pointer, addresses), size, columns, *places)
            self._runner.enqueue(now, row)
            checked = (s.x[1 - now], row, row + 4 * s.width * wide, self._broken, self._broken + 4 * s.width)
            place = _i32(self._at["t"])
            self._stream.launch("check", s.width, self._size, *map(_pointer, checked), size, columns, place)
        if count % 2:
            for state in (s.x, s.m):
                self._stream.copy(state[0], state[1], 4 * s.width * self._size)

    def _drop_graphs(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

    def close(self) -> None:
        """Wait for the stream and release everything. A second call does nothing."""
        self._device.use()
        self._open.close()
