"""Lanes on the GPU, whatever engine runs the step: device buffers, noise, CudaGraphs of chunks of steps, flags for NaN.

An engine brings a Runner, which enqueues one step. Nothing returns to the host before `read`.
"""

from __future__ import annotations

import ctypes
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from typing import Literal

import numpy as np

from epsrt.bundle import Bundle
from epsrt.engine import (
    Closing,
    Lanes,
    Sample,
    check_lane,
    check_lanes,
    check_rows,
    check_sample,
    check_whole,
    not_finite,
)
from epsrt.engines.gpu import cuda
from epsrt.engines.gpu.arrivals import Arrivals
from epsrt.engines.gpu.buffers import NOISES, Buffers
from epsrt.engines.gpu.peeks import Download, Peeks
from epsrt.engines.gpu.runner import MakeRunner
from epsrt.engines.gpu.table import Table
from epsrt.engines.moves import check_moves, kind_of
from epsrt.engines.signature import Signature
from epsrt.errors import EngineError, InputError, NotFiniteError
from epsrt.manifest import StepGraph
from epsrt.plan import idle_row
from epsrt.state import State
from epsrt.types import Float32, Shape

log = logging.getLogger("epsrt")

CHUNK = 10  # the most steps of one CudaGraph
KEPT_GRAPHS = 8  # CudaGraphs of a lanes object, one for each length and kind of chunk
TABLE_BYTES = 32 << 20  # rows that are uploaded at once: a thousand steps of a batch of 256 fit
ALIGNMENT = 256  # bytes: every address that TensorRT is given is a multiple

_i32, _pointer = ctypes.c_int32, ctypes.c_void_p


class DeviceLanes(Closing):
    """See epsrt.engine.Lanes. Owns its stream, its buffers and the runner that `make` returns.

    The caller sees `batch` lanes. The engine runs `width` ≥ batch, where its profiles begin higher: the rest stay idle.
    Raises OutOfMemoryError when the device's memory does not suffice, and releases everything.
    """

    def __init__(
        self,
        device: cuda.Device,
        bundle: Bundle,
        graph: StepGraph,
        shape: Shape,
        batch: int,
        width: int,
        make: MakeRunner,
        chunk: int = CHUNK,
    ):
        self.batch, self.shape, self.graph, self._manifest = batch, shape, graph, bundle.manifest
        self._kind = kind_of(bundle, graph, shape, "the device's lanes")
        self.capturing = True  # until a capture fails
        self._whole = True  # False while steps are given to the stream, and for good where that failed
        self._device, self._columns, self._width, self._chunk = device, graph.columns, width, chunk
        self._at = {name: i for i, name in enumerate(graph.columns)}
        self._size = int(np.prod(shape))
        device.use()
        with ExitStack() as stack:
            self._allocate(stack, bundle, make)
            self._open = stack.pop_all()

    def _allocate(self, stack: ExitStack, bundle: Bundle, make: MakeRunner) -> None:
        width, image = self._width, 4 * self._width * self._size

        self._stream = cuda.Stream(self._device)
        stack.callback(self._stream.close)

        def memory(size: int) -> int:
            made = cuda.Memory(size, f"a batch of {width}")
            stack.callback(made.close)
            self._stream.zero(made.pointer, size)
            return made.pointer

        signature = Signature.of(bundle, self.graph, width, self.shape)
        self._row_bytes = -(-4 * width * (len(self._columns) + 1) // ALIGNMENT) * ALIGNMENT  # a step's rows and numbers
        self._slots = memory(self._chunk * self._row_bytes)  # where CudaGraphs find their rows
        fixed = {name: memory(tensor.nbytes) for name, tensor in signature.fixed.items()}
        self._state = Buffers(
            width,
            self.shape,
            signature,
            (memory(image), memory(image)),
            (memory(image), memory(image)),
            memory(image),
            fixed,
            memory(8 * width),
            memory(4 * width),
            memory(8 * width),
            tuple(self._slots + i * self._row_bytes for i in range(self._chunk)),
        )
        self._noises = {name: made for name, made in NOISES.items() if name in fixed}
        self._table = Table(self._stream, f"a batch of {width}")
        stack.callback(self._table.close)
        self._images: dict[str, Float32] = {}  # what was read since the state last changed
        self._landing = cuda.Pinned(image + 8 * width)
        stack.callback(self._landing.close)
        self._graphs: OrderedDict[tuple[int, ...], cuda.CudaGraph] = OrderedDict()
        stack.callback(self._drop_graphs)
        self._arrivals = Arrivals(self._stream, self._table, self._state)
        self._peeks: Peeks | None = None
        self._samples = [Sample() for _ in range(width)]
        self._masked = np.zeros(self.batch, np.bool_)
        self._steps = np.zeros(width, np.int32)
        self._runner = make(self._state, self._stream)
        stack.callback(self._runner.close)
        stack.callback(self._stream.synchronize)  # the first to run at the end: nothing is freed in use
        # The engine sets itself up in its first run, which must not happen in a capture.
        rows = self._table.upload(self._idle(1))
        for now in (0, 1):
            self._runner.enqueue(now, rows)
        self._stream.synchronize()

    def write(self, index: int, sample: Sample, state: State | None = None) -> None:
        check_lane(index, self.batch)
        check_sample(sample, self.shape, self.graph, self._manifest)
        if state is not None:
            state.check(self.shape)
        self._arrivals.write(index, sample, sample.inputs(self._manifest, self.graph, self.shape), state)
        self._masked[index] = sample.mask is not None
        self._samples[index] = sample
        self._steps[index] = 0 if state is None else state.row
        self._images.clear()

    def advance(self, rows: Float32) -> None:
        check_rows(rows, self.batch, len(self._columns))
        self.check_process()
        check_whole(self._whole)
        self._device.use()
        self._arrivals.begin()
        self._images.clear()
        self._whole = False
        most = max(1, TABLE_BYTES // self._row_bytes)
        for first in range(0, len(rows), most):
            part = rows[first : first + most]
            table = self._table_of(part)
            cells, at = self._cells(table), self._table.upload(table)
            noisy = [(cells[:, :, self._at[column]] != 0).any(axis=1) for _, column in self._noises.values()]
            for i in range(0, len(part), self._chunk):
                count = min(self._chunk, len(part) - i)
                self._run(at + i * self._row_bytes, count, *(bool(steps[i : i + count].any()) for steps in noisy))
        self._whole = True

    def wait(self, ahead: int = 0) -> None:
        self._device.use()
        if ahead:
            self._table.wait()  # its rows came after all earlier steps
        else:
            self._stream.synchronize()

    def read(self, index: int, what: Literal["x", "x0"] = "x") -> Float32:
        return self._read(index, what)

    def save(self, index: int) -> State:
        return State(self._read(index, "x"), self._read(index, "m"), int(self._steps[index]))

    def _read(self, index: int, what: Literal["x", "m", "x0"]) -> Float32:
        check_lane(index, self.batch)
        check_whole(self._whole)
        self._device.use()
        self._arrivals.begin()
        if what not in self._images:
            self._fetch(what)
        step, t = self._flags[0].view(np.int32)[index], self._flags[1][index]
        if step:
            raise NotFiniteError(not_finite(index, self._samples[index], int(step), float(t)))
        return self._images[what][index].copy()  # type: ignore[no-any-return]

    def move(self, source: Lanes, pairs: Iterable[tuple[int, int]]) -> None:
        if not isinstance(source, DeviceLanes) or source._kind != self._kind:
            alike = source._kind if isinstance(source, DeviceLanes) else f"a {type(source).__name__}"
            raise InputError(f"{self._kind} take none from {alike}: move samples between lanes that are alike")
        for lanes in (self, source):
            check_whole(lanes._whole)
        moved = check_moves(pairs, source.batch, self.batch, source is not self)
        if not moved:
            return
        self._device.use()
        self._arrivals.begin()
        source._arrivals.begin()
        self._stream.wait_for(source._stream)
        self._state.take(self._stream, source._state, moved)
        source._stream.wait_for(self._stream)  # before it changes what is copied
        for left, entered in moved:
            self._samples[entered], self._steps[entered] = source._samples[left], source._steps[left]
            self._masked[entered] = source._masked[left]
        self._images.clear()

    def peek(self, indices: Sequence[int], what: Literal["x", "x0"] = "x0") -> Download:
        lanes = check_lanes(indices, self.batch)
        check_whole(self._whole)
        self._device.use()
        self._arrivals.begin()
        if self._peeks is None:
            self._peeks = Peeks(self._device, self._stream, self.batch, self.shape)
            self._open.callback(self._peeks.close)
        return self._peeks.take(self._state.shown(what), lanes)

    def time_steps(self, steps: int) -> float:
        """Milliseconds that a step of the engine alone takes with idle rows, on the device's clock.

        The steps are captured as those of `advance` are. The lanes keep what they hold, except that x becomes what is
        known where a mask is 1: idle rows do that.
        """
        self._device.use()
        self._arrivals.begin()
        self._stream.copy(self._slots, self._table.upload(self._idle(1)), self._row_bytes)

        def both() -> None:
            for now in (0, 1):  # back to x[0]
                self._runner.enqueue(now, self._slots)

        with ExitStack() as stack:
            begin, end = (stack.enter_context(closing(cuda.Event(timing=True))) for _ in range(2))
            graph = self._captured(both) if self.capturing and self._runner.capturable else None
            if graph is not None:
                stack.callback(graph.close)
            pairs = -(-steps // 2)
            for event in (None, begin):  # the first round warms up
                if event:
                    event.record(self._stream)
                for _ in range(pairs):
                    both() if graph is None else self._stream.replay(graph)
            end.record(self._stream)
            self._stream.synchronize()
            return end.since(begin) / (2 * pairs)

    def _fetch(self, what: Literal["x", "m", "x0"]) -> None:
        image = 4 * self._width * self._size
        self._stream.download(self._landing.array[:image], self._state.shown(what))
        self._stream.download(self._landing.array[image:], self._state.broken)
        self._stream.synchronize()
        host = self._landing.array.copy()
        self._images[what] = host[:image].view(np.float32).reshape(self._width, *self.shape)
        self._flags = host[image:].view(np.float32).reshape(2, self._width)

    def _table_of(self, rows: Float32) -> Float32:
        """Rows for the device, float32 [steps, row_bytes / 4]: a step has its rows [width, columns], then numbers."""
        table, wide = self._idle(len(rows)), len(self._columns)
        own = self._cells(table)[:, : self.batch]
        own[...] = rows
        if "kb" in self._at:  # where nothing is known, no noise need be drawn for it
            own[:, ~self._masked, self._at["kb"]] = 0
        numbers = table[:, self._width * wide : self._width * (wide + 1)].view(np.int32)
        numbers[...] = self._steps + np.arange(1, len(rows) + 1, dtype=np.int32)[:, None]
        self._steps += len(rows)
        return table

    def _cells(self, table: Float32) -> Float32:
        """The rows of a table, float32 [steps, width, columns], a view."""
        wide = len(self._columns)
        return table[:, : self._width * wide].reshape(len(table), self._width, wide)

    def _idle(self, steps: int) -> Float32:
        table = np.zeros((steps, self._row_bytes // 4), np.float32)
        table[:, : self._width * len(self._columns)] = np.tile(idle_row(self._columns), self._width)
        return table

    def _run(self, rows: int, count: int, *noisy: bool) -> None:
        graph = self._graph(count, *noisy) if self.capturing and self._runner.capturable else None
        if graph is None:
            self._enqueue(rows, count, *noisy)
            return
        self._stream.copy(self._slots, rows, count * self._row_bytes)
        self._stream.replay(graph)

    def _graph(self, count: int, *noisy: bool) -> cuda.CudaGraph | None:
        """The CudaGraph of `count` steps on the rows in the slots; None once a capture has failed."""
        key = count, *noisy
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        graph = self._captured(lambda: self._enqueue(self._slots, count, *noisy))
        if graph is None:
            return None
        if len(self._graphs) == KEPT_GRAPHS:
            self._stream.synchronize()  # it may be running
            self._graphs.popitem(last=False)[1].close()
        self._graphs[key] = graph
        return graph

    def _captured(self, work: Callable[[], None]) -> cuda.CudaGraph | None:
        """Steps from x[0] as a CudaGraph; None where that fails, and for good."""
        self._runner.settle()
        try:
            return self._stream.capture(work)
        except EngineError as error:
            reason = str(error)
        self.capturing = False
        how = self._runner.without_capture()  # out of the handler, whose frames hold what the runner releases
        log.warning("%s slower: CUDA cannot capture whole chunks of steps (%s)", how, reason)
        return None

    def _enqueue(self, rows: int, count: int, *noisy: bool) -> None:
        """Give `count` steps to the stream, from x[0] to x[0]; `noisy` says which of the noises are drawn."""
        s, wide = self._state, len(self._columns)
        size, columns = _i32(self._size), _i32(wide)
        drawn = [(name, *made) for (name, made), wanted in zip(self._noises.items(), noisy, strict=False) if wanted]
        for i in range(count):
            now, row = i % 2, rows + i * self._row_bytes
            for name, number, column in drawn:
                addresses = (s.fixed[name], row, s.seeds, s.indices)
                places = (_i32(self._at[column]), _i32(self._at["n"]), ctypes.c_uint32(number))
                self._stream.launch("noise", s.width, self._size, *map(_pointer, addresses), size, columns, *places)
            self._runner.enqueue(now, row)
            checked = (s.x[1 - now], row, row + 4 * s.width * wide, s.broken, s.broken + 4 * s.width)
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
