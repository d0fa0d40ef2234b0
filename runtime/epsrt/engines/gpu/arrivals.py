"""Samples on their way into their lanes: written on the host, begun on the device."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsrt.condition import LABEL
from epsrt.engine import Sample
from epsrt.engines.gpu.buffers import Buffers, runs
from epsrt.engines.gpu.cuda import Stream
from epsrt.engines.gpu.table import Table
from epsrt.state import State
from epsrt.types import Arrays, Float32

BEGIN = np.dtype(
    [
        ("seed", "u8"),
        ("label", "i8"),
        ("target", "i8"),
        ("index", "u4"),
        ("stream", "u4"),
        ("lane", "i4"),
        ("signal", "f4"),
        ("scale", "f4"),
        ("init", "i4"),
        ("known", "i4"),
        ("unused", "i4"),
    ]
)  # struct Begin of kernels.cu


class Arrivals:
    """Samples by lane that are not on the device yet. They go there together, in one launch."""

    def __init__(self, stream: Stream, table: Table, buffers: Buffers):
        self._stream, self._table, self._buffers = stream, table, buffers
        self._samples: dict[int, Sample] = {}
        self._states: dict[int, State] = {}  # of those that go on from one

    def write(self, lane: int, sample: Sample, inputs: Arrays, state: State | None) -> None:
        """Keep a sample, whose conditions are these inputs, and its state: copies, for the caller's may change."""
        given = ((name, getattr(sample, name)) for name in ("init", "known", "mask"))
        kept: dict[str, Any] = {name: np.array(image, np.float32) for name, image in given if image is not None}
        kept["conditions"] = {name: np.array(value) for name, value in inputs.items()}
        self._states.pop(lane, None)
        if state is not None:
            kept["start"] = 0.0, 0.0
            self._states[lane] = State(state.x.copy(), state.m.copy(), state.row)
        self._samples[lane] = replace(sample, **kept)

    def begin(self) -> None:
        """Put them all into their lanes."""
        if not self._samples:
            return
        begins, images = pack(self._samples)
        at, b, size = self._table.upload(begins, *images), self._buffers, int(np.prod(self._buffers.shape))
        own = b.x[0], b.m[0], b.x0, b.seeds, b.indices, b.broken
        addresses = (*own, *b.optional("label", "target", "known", "mask"), at, at + begins.nbytes)
        self._stream.launch("begin", len(begins), size, *map(ctypes.c_void_p, addresses), ctypes.c_int32(size))
        self._place()
        self._samples, self._states = {}, {}

    def _place(self) -> None:
        """Copy into the lanes what the kernel does not fill: conditions, but for the label, and states."""
        b, lanes, resumed = self._buffers, sorted(self._samples), sorted(self._states)
        given: list[Any] = [self._samples[lane].conditions for lane in lanes]
        placed: list[tuple[int, list[int], NDArray[Any]]] = [
            (b.fixed[name], lanes, np.array([one[name] for one in given], b.signature.inputs[name].dtype))
            for name in given[0]
            if name != LABEL
        ]
        if resumed:
            placed.append((b.x[0], resumed, np.array([self._states[lane].x for lane in resumed])))
            placed.append((b.m[0], resumed, np.array([self._states[lane].m for lane in resumed])))
        if not placed:
            return
        at = self._table.upload(*(values for _, _, values in placed))
        for address, chosen, values in placed:
            lane = values[0].nbytes
            for run in runs(chosen):
                size = (run.stop - run.start) * lane
                self._stream.copy(address + chosen[run.start] * lane, at, size)
                at += size


def pack(samples: Mapping[int, Sample]) -> tuple[NDArray[Any], list[Float32]]:
    """Samples by lane, as the kernel `begin` takes them: BEGIN [len(samples)], and the images that it numbers."""
    begins, images = np.zeros(len(samples), BEGIN), list[Float32]()

    def placed(*given: Float32 | None) -> int:
        if given[0] is None:
            return -1
        images.extend(image.ravel() for image in given if image is not None)
        return len(images) - len(given)

    for i, (lane, s) in enumerate(samples.items()):
        init = placed(s.init if s.start[0] != 0 else None)
        known = placed(s.known, s.mask)
        label = int(np.asarray(s.conditions.get(LABEL, 0)))
        begins[i] = (s.seed, label, s.target, s.index, s.stream, lane, *s.start, init, known, 0)
    return begins, images
