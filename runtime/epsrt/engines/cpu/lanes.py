"""Lanes in the host's memory for every CPU engine: NumPy buffers, noise, and the check for NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from epsrt import noise
from epsrt.engine import (
    Closing,
    Engine,
    Lanes,
    Sample,
    check_lane,
    check_lanes,
    check_rows,
    check_sample,
    check_whole,
    not_finite,
)
from epsrt.engines.moves import check_moves, kind_of
from epsrt.engines.signature import Signature
from epsrt.errors import InputError, NotFiniteError
from epsrt.plan import idle_row
from epsrt.state import State
from epsrt.types import Arrays, Float32, Shape

NOISE_BLOCK = 1 << 16  # normals drawn at once: enough to hide NumPy's call overhead, small enough for a cache

Run = Callable[[], None]
Bind = Callable[[Arrays, Arrays], Run]  # inputs and outputs by name, [batch, …] each -> what runs a step on them


class HostLanes(Closing):
    """See epsrt.engine.Lanes. Owns its NumPy buffers; two bindings of them alternate, so that x and x' only swap.

    `bind` binds the engine to buffers that live as long as the lanes; what it returns may raise EngineError.
    """

    def __init__(self, engine: Engine, batch: int, image: Shape, bind: Bind):
        self.batch, self.shape, self._graph, self._manifest = batch, image, engine.graph, engine.bundle.manifest
        self._kind = kind_of(engine.bundle, engine.graph, image, "the host's lanes")
        self._columns = {name: i for i, name in enumerate(engine.columns)}
        shape = (batch, *image)
        self._x = [np.zeros(shape, np.float32) for _ in range(2)]
        self._m = [np.zeros(shape, np.float32) for _ in range(2)]
        self._x0 = np.zeros(shape, np.float32)
        self._size = self._x0[0].size
        self._row = np.tile(idle_row(engine.columns), (batch, 1))
        signature = Signature.of(engine.bundle, engine.graph, batch, image)
        self._fixed: Arrays = {name: tensor.zeros() for name, tensor in signature.fixed.items()}
        self._now = 0  # which of the two x holds the state
        self._runs = [
            bind(
                {"x": self._x[now], "m": self._m[now], "rows": self._row, **self._fixed},
                {"x_next": self._x[1 - now], "m_next": self._m[1 - now], "x0": self._x0},
            )
            for now in range(2)
        ]
        self._samples = [Sample() for _ in range(batch)]
        self._seeds = np.zeros(batch, np.uint64)
        self._indices = np.zeros(batch, np.int64)
        self._steps = np.zeros(batch, np.int64)
        self._broken: dict[int, tuple[int, float]] = {}  # lane -> since which step, and its t
        self._whole = True  # False while steps run, and for good where one of them did not end

    def write(self, index: int, sample: Sample, state: State | None = None) -> None:
        check_lane(index, self.batch)
        check_sample(sample, self.shape, self._graph, self._manifest)
        x, m = self._x[self._now][index], self._m[self._now][index]
        if state is None:
            self._start(x, sample)
            m[...] = 0
        else:
            state.check(self.shape)
            x[...], m[...] = state.x, state.m
        self._x0[index] = 0
        for name, value in sample.inputs(self._manifest, self._graph, self.shape).items():
            self._fixed[name][index] = value
        for name in ("target", "known", "mask"):
            if name in self._fixed:
                given = getattr(sample, name)
                self._fixed[name][index] = 0 if given is None else given
        self._samples[index] = sample
        self._seeds[index], self._indices[index] = sample.seed, sample.index
        self._steps[index] = 0 if state is None else state.row
        self._broken.pop(index, None)

    def _start(self, x: Float32, sample: Sample) -> None:
        signal, scale = sample.start
        x.fill(0)
        if scale:
            x += np.float32(scale) * noise.normals(sample.seed, sample.index, sample.stream, 0, x.size).reshape(x.shape)
        if sample.init is not None and signal:
            x += np.float32(signal) * sample.init

    def advance(self, rows: Float32) -> None:
        check_rows(rows, *self._row.shape)
        check_whole(self._whole)
        self.check_process()
        self._whole = False
        block = max(1, NOISE_BLOCK // (self.batch * self._size))
        for first in range(0, len(rows), block):
            part = rows[first : first + block]
            drawn = {"z": self._draw(part, noise.STEP, "d")}
            if "mask" in self._fixed:
                drawn["z2"] = self._draw(part, noise.KNOWN, "kb", self._masked)
            for i, row in enumerate(part):
                np.copyto(self._row, row)
                for name, z in drawn.items():
                    if z is not None:
                        np.copyto(self._fixed[name], z[i])
                self._runs[self._now]()
                self._now ^= 1
                self._steps += 1
                if not np.isfinite(self._x[self._now].sum()):
                    self._note_broken()
        self._whole = True

    def wait(self, ahead: int = 0) -> None:
        """Steps have run when `advance` returns."""

    def read(self, index: int, what: Literal["x", "x0"] = "x") -> Float32:
        check_lane(index, self.batch)
        check_whole(self._whole)
        if index in self._broken:
            raise NotFiniteError(not_finite(index, self._samples[index], *self._broken[index]))
        return self._images(what)[index].copy()  # type: ignore[no-any-return]

    def save(self, index: int) -> State:
        return State(self.read(index), self._m[self._now][index].copy(), int(self._steps[index]))

    def move(self, source: Lanes, pairs: Iterable[tuple[int, int]]) -> None:
        if not isinstance(source, HostLanes) or source._kind != self._kind:
            alike = source._kind if isinstance(source, HostLanes) else f"a {type(source).__name__}"
            raise InputError(f"{self._kind} take none from {alike}: move samples between lanes that are alike")
        for lanes in (self, source):
            check_whole(lanes._whole)
        moved = check_moves(pairs, source.batch, self.batch, source is not self)
        if not moved:
            return
        there, here = map(list, zip(*moved, strict=True))
        for mine, theirs in zip(self._lanewise(), source._lanewise(), strict=True):
            mine[here] = theirs[there]
        for left, entered in moved:
            self._samples[entered] = source._samples[left]
            self._broken.pop(entered, None)
            if left in source._broken:
                self._broken[entered] = source._broken[left]

    def peek(self, indices: Sequence[int], what: Literal["x", "x0"] = "x0") -> Future[Float32]:
        lanes = check_lanes(indices, self.batch)
        check_whole(self._whole)
        copied: Future[Float32] = Future()
        copied.set_result(self._images(what)[lanes])
        return copied

    def _images(self, what: Literal["x", "x0"]) -> Float32:
        return self._x[self._now] if what == "x" else self._x0

    def _lanewise(self) -> list[NDArray[Any]]:
        """What each lane has its part of, and keeps from row to row."""
        now = self._x[self._now], self._m[self._now], self._x0
        return [*now, *self._fixed.values(), self._seeds, self._indices, self._steps]

    @property
    def _masked(self) -> NDArray[np.bool_]:
        return np.array([sample.mask is not None for sample in self._samples])

    def _draw(self, rows: Float32, stream: int, column: str, lanes: NDArray[np.bool_] | bool = True) -> Float32 | None:
        """Noise [steps, batch, C, …] for rows [steps, batch, columns], where a column is not 0, in some lanes.

        None where that is nowhere.
        """
        noisy = (rows[:, :, self._columns[column]] != 0) & lanes
        if not noisy.any():
            return None
        n = rows[:, :, self._columns["n"]].astype(np.int64)
        shape = (*noisy.shape, *self.shape)
        if noisy.all():
            return noise.normals(self._seeds, self._indices, stream, n, self._size).reshape(shape)
        z = np.zeros((*noisy.shape, self._size), np.float32)
        step, lane = np.nonzero(noisy)
        z[step, lane] = noise.normals(self._seeds[lane], self._indices[lane], stream, n[step, lane], self._size)
        return z.reshape(shape)

    def _note_broken(self) -> None:
        for lane, x in enumerate(self._x[self._now]):
            if lane not in self._broken and not np.isfinite(x).all():
                t = float(self._row[lane, self._columns["t"]])
                self._broken[lane] = int(self._steps[lane]), t

    def close(self) -> None:
        self._runs.clear()
