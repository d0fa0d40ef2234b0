"""The step graph on onnxruntime's CPU provider."""

from __future__ import annotations

import os
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from epsrt import noise
from epsrt.bundle import Bundle
from epsrt.engines.ort_library import check_signature, ort, refuse_both_packages
from epsrt.engines.protocol import (
    Closing,
    Images,
    Rows,
    Sample,
    Size,
    check_batch,
    check_lane,
    check_rows,
    check_sample,
    image_shape,
    not_finite,
)
from epsrt.errors import EngineError, NotFiniteError
from epsrt.manifest import Graph
from epsrt.plan import idle_row

NOISE_BLOCK = 1 << 16  # normals drawn at once: enough to hide NumPy's call overhead, small enough for a cache


class OnnxRuntimeCpu:
    """Engine "onnxruntime"; see protocol.Engine."""

    name = "onnxruntime"
    batch_limit = "the bundle's largest"
    device = "cpu"

    def __init__(self, bundle: Bundle, graph: Graph, threads: int | None = None):
        refuse_both_packages()
        cores = os.cpu_count() or 1
        if threads is not None and not 1 <= threads <= cores:  # more would only wait for each other
            raise EngineError(f"threads = {threads} is outside 1 … {cores}, this machine's cores: leave it out for all")
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors come as exceptions; warnings about fusions are nobody's news
        if threads is not None:
            options.intra_op_num_threads = threads
        file = bundle.path / graph.file
        try:
            self.session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no public base class
            reason = " ".join(str(error).split())
            raise EngineError(f"onnxruntime refuses {file}: {reason}; export the bundle again") from None
        self.bundle, self.graph, self._threads = bundle, graph, threads
        self.precision: str = graph.precision
        self.columns = graph.columns
        self.max_batch = bundle.manifest.max_batch
        check_signature(self.session, bundle, graph)

    def lanes(self, batch: int, size: Size | None = None) -> OnnxRuntimeLanes:
        """See protocol.Engine."""
        check_batch(batch, self)
        return OnnxRuntimeLanes(self, batch, image_shape(self.bundle, size))

    def on(self, graph: Graph) -> OnnxRuntimeCpu:
        """See protocol.Engine."""
        return OnnxRuntimeCpu(self.bundle, graph, self._threads)

    def close(self) -> None:
        """Nothing to release before the object goes."""


class OnnxRuntimeLanes(Closing):
    """See protocol.Lanes. Owns its NumPy buffers; two bindings of them alternate, so that x and x' only swap."""

    def __init__(self, engine: OnnxRuntimeCpu, batch: int, image: tuple[int, int, int]):
        self.batch, self.shape = batch, image
        self._engine = engine
        self._columns = {name: i for i, name in enumerate(engine.columns)}
        shape = (batch, *image)
        self._x = [np.zeros(shape, np.float32) for _ in range(2)]
        self._m = [np.zeros(shape, np.float32) for _ in range(2)]
        self._x0 = np.zeros(shape, np.float32)
        self._size = self._x0[0].size
        self._row = np.tile(idle_row(engine.columns), (batch, 1))
        self._fixed: dict[str, NDArray[Any]] = {  # what else the graph takes: z, label, target, known, mask, z2
            name: np.zeros(shape, np.float32) if kind == "image" else np.zeros(batch, np.int64)
            for name, kind in engine.bundle.inputs(engine.graph).items()
            if name not in ("x", "m", "rows")
        }
        self._now = 0  # which of the two x holds the state
        self._bindings = [self._bind(0), self._bind(1)]
        self._samples = [Sample() for _ in range(batch)]
        self._seeds = np.zeros(batch, np.uint64)
        self._indices = np.zeros(batch, np.int64)
        self._steps = np.zeros(batch, np.int64)
        self._broken: dict[int, str] = {}  # lane -> since when

    def _bind(self, now: int) -> Any:
        binding = self._engine.session.io_binding()
        inputs = {"x": self._x[now], "m": self._m[now], "rows": self._row, **self._fixed}
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
        for name, array in (("x_next", self._x[1 - now]), ("m_next", self._m[1 - now]), ("x0", self._x0)):
            binding.bind_output(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
        return binding

    def write(self, index: int, sample: Sample) -> None:
        check_lane(index, self.batch)
        x, (signal, scale) = self._x[self._now][index], sample.start
        check_sample(sample, x.shape, self._engine.graph)
        x.fill(0)
        if scale:
            x += np.float32(scale) * noise.normals(sample.seed, sample.index, sample.stream, 0, x.size).reshape(x.shape)
        if sample.init is not None and signal:
            x += np.float32(signal) * sample.init
        self._m[self._now][index] = 0
        self._x0[index] = 0
        for name in ("label", "target", "known", "mask"):
            if name in self._fixed:
                given = getattr(sample, name)
                self._fixed[name][index] = 0 if given is None else given
        self._samples[index] = sample
        self._seeds[index], self._indices[index], self._steps[index] = sample.seed, sample.index, 0
        self._broken.pop(index, None)

    def advance(self, rows: Rows) -> None:
        check_rows(rows, *self._row.shape)
        block = max(1, NOISE_BLOCK // (self.batch * self._size))
        run, session = self._engine.session.run_with_iobinding, self._engine.bundle.path
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
                try:
                    run(self._bindings[self._now])
                except Exception as error:
                    reason = " ".join(str(error).split())
                    raise EngineError(f"onnxruntime failed in a step of {session}: {reason}") from None
                self._now ^= 1
                self._steps += 1
                if not np.isfinite(self._x[self._now].sum()):
                    self._note_broken()

    def wait(self) -> None:
        """Steps have run when `advance` returns."""

    def read(self, index: int, what: Literal["x", "x0"] = "x") -> Images:
        check_lane(index, self.batch)
        if index in self._broken:
            raise NotFiniteError(self._broken[index])
        source: Images = self._x[self._now] if what == "x" else self._x0
        return source[index].copy()  # type: ignore[no-any-return]

    @property
    def _masked(self) -> NDArray[np.bool_]:
        return np.array([sample.mask is not None for sample in self._samples])

    def _draw(
        self, rows: Rows, stream: int, column: str, lanes: NDArray[np.bool_] | bool = True
    ) -> NDArray[np.float32] | None:
        """Noise for rows [steps, batch, columns], as [steps, batch, C, H, W]: where a column is not 0, in some lanes.

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
                self._broken[lane] = not_finite(lane, self._samples[lane], int(self._steps[lane]), t)

    def close(self) -> None:
        self._bindings.clear()
