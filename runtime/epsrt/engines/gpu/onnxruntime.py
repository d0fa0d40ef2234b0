"""Engines "onnxruntime-cuda" and "onnxruntime-tensorrt": onnxruntime's GPU providers on device-resident lanes.

Each lanes object has a session of its own, on its own stream, because a session's stream is settled when it is made.
The session has its own batch and size too: the shape arithmetic of free ones would run on the CPU, which no CUDA graph
can hold.

The CUDA provider records one CUDA graph a binding: one from x[0] to x[1], one back. In version 1.31 the first run of
each graph in a thread runs the step twice, then captures in CUDA's global mode. An allocation in a thread that has not
used cuda.Device would break that capture. A replay is one launch, without a synchronisation when told so. The TensorRT
provider records one graph alone, whatever the binding, so there it records none.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from contextlib import nullcontext, redirect_stdout, suppress
from typing import Any

import numpy as np

from epsrt.bundle import Bundle
from epsrt.engine import Closing, check_batch
from epsrt.engines.cache.store import EngineCache
from epsrt.engines.gpu import cuda
from epsrt.engines.gpu.buffers import Buffers
from epsrt.engines.gpu.lanes import CHUNK, DeviceLanes
from epsrt.engines.ort_library import check_signature, ort, refuse_both_packages
from epsrt.errors import EngineError, OutOfMemoryError, one_line
from epsrt.manifest import StepGraph
from epsrt.types import Shape, Size

log = logging.getLogger("epsrt")

CUDA, TENSORRT = "onnxruntime-cuda", "onnxruntime-tensorrt"
PROVIDERS = {CUDA: "CUDAExecutionProvider", TENSORRT: "TensorrtExecutionProvider"}
LIBRARIES = {CUDA: "CUDA 13 and cuDNN 9", TENSORRT: "TensorRT 10, CUDA 13 and cuDNN 9"}
FREE = ("batch", "height", "width")  # what the export calls the free dimensions
MEMORY = re.compile("failed to allocate|out of memory|alloc_failed", re.I)  # how onnxruntime says that it lacks some
TRIALS = 20  # steps that a layout is timed over


class OnnxRuntimeCuda(Closing):
    """See epsrt.engine.Engine. Raises EngineError where the provider cannot run: it never falls back to the CPU."""

    batch_limit = "the bundle's largest"
    device = "cuda"

    def __init__(self, bundle: Bundle, graph: StepGraph, name: str = CUDA):
        refuse_both_packages()
        self.provider = PROVIDERS[name]
        if self.provider not in ort.get_available_providers():
            have = ", ".join(ort.get_available_providers())
            raise EngineError(
                f"engine {name} needs onnxruntime built for NVIDIA's GPUs, and this one has only {have}: "
                'pip uninstall -y onnxruntime, then pip install "epsrt[gpu]"'
            )
        if name == TENSORRT and graph.precision == "fp32" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
            raise EngineError(
                f"engine {name} has no FP32: onnxruntime lets TensorRT compute it in TF32: use precision fp16, "
                f"engine {CUDA}, or set NVIDIA_TF32_OVERRIDE=0"
            )
        self.name, self.bundle, self.graph = name, bundle, graph
        self.precision: str = graph.precision
        self.columns = graph.columns
        self.max_batch = bundle.manifest.max_batch
        self.chunk = CHUNK
        self._device = cuda.device()
        self._layouts: dict[tuple[int, Shape], bool] = {}  # batch and shape -> whether NHWC is the faster
        self._tuning = threading.Lock()
        _load_libraries(name)

    def lanes(self, batch: int, size: Size | None = None) -> DeviceLanes:
        """See epsrt.engine.Engine. The first lanes of a batch and size on a machine time both layouts."""
        check_batch(batch, self)
        shape = self.bundle.image_shape(size)
        return self._lanes(batch, shape, self._nhwc(batch, shape))

    def on(self, graph: StepGraph) -> OnnxRuntimeCuda:
        """See epsrt.engine.Engine."""
        return OnnxRuntimeCuda(self.bundle, graph, self.name)

    def close(self) -> None:
        """Nothing to release: sessions belong to the lanes."""

    def key(self, batch: int, shape: Shape | None = None) -> str:
        """A name for what holds for this graph, batch, shape, GPU and onnxruntime, and may not for others."""
        gpu, digest = self._device.gpu, self.bundle.manifest.digest[:16]
        size = f"-{shape[1]}x{shape[2]}" if shape not in (None, self.bundle.manifest.shape) else ""
        return f"{ort.__version__}-{gpu.name}-{gpu.arch}-{digest}-{self.graph.file}-{batch}{size}"

    def _lanes(self, batch: int, shape: Shape, nhwc: bool) -> DeviceLanes:
        make = lambda buffers, stream: _Session(self, buffers, stream, nhwc)  # noqa: E731
        return DeviceLanes(self._device, self.bundle, self.graph, shape, batch, batch, make, self.chunk)

    def _nhwc(self, batch: int, shape: Shape) -> bool:
        """Whether convolutions run faster in NHWC, its transpositions included: measured once, then remembered."""
        if self.name == TENSORRT:
            return False  # TensorRT chooses for itself
        with self._tuning:
            if (batch, shape) not in self._layouts:
                self._layouts[batch, shape] = self._recalled(batch, shape)
            return self._layouts[batch, shape]

    def _recalled(self, batch: int, shape: Shape) -> bool:
        cache, name = EngineCache(), f"layout-{self.key(batch, shape)}"
        known = cache.blob(name)
        if known not in (b"nchw", b"nhwc"):
            nchw = self._time(batch, shape, nhwc=False)
            try:
                nhwc = self._time(batch, shape, nhwc=True)
            except EngineError as error:
                log.info("batch %d: NCHW, since NHWC fails: %s", batch, error)
                return False  # not remembered: another time there may be the memory for it
            log.info("batch %d: NCHW %.3f ms a step, NHWC %.3f", batch, nchw, nhwc)
            known = b"nhwc" if nhwc < nchw else b"nchw"
            cache.keep_blob(name, known)
        return known == b"nhwc"

    def _time(self, batch: int, shape: Shape, nhwc: bool) -> float:
        """Milliseconds a step."""
        with self._lanes(batch, shape, nhwc) as lanes:
            return lanes.time_steps(TRIALS)


class _Session:
    """lanes.Runner: a session on the buffers of one lanes object."""

    capturable = False  # it captures by itself

    def __init__(self, engine: OnnxRuntimeCuda, buffers: Buffers, stream: cuda.Stream, nhwc: bool):
        self._device, self._stream = engine._device, stream
        self._path = engine.bundle.path / engine.graph.file
        self._session: Any = None
        self._bindings: list[Any] = []
        self._options = [_run_options(graph) for graph in ("1", "2")]  # 0 is onnxruntime's own
        self._captured = threading.local()  # .graphs: which of them the calling thread has, as each records its own
        self._failed = False
        self._row_bytes = 4 * buffers.width * len(engine.columns)
        self._row = cuda.Memory(self._row_bytes, f"a batch of {buffers.width}")
        try:
            self._session = self._open(engine, buffers, stream, nhwc)
            self._bindings = [self._bind(buffers, now) for now in (0, 1)]
        except BaseException:
            self.close()
            raise

    def enqueue(self, now: int, rows: int) -> None:
        if self._failed:  # the graph that it recorded may be cut short, and replay without a word
            raise EngineError(f"onnxruntime failed in an earlier step of {self._path}: make new lanes")
        self._stream.copy(self._row.pointer, rows, self._row_bytes)
        graphs: set[int] = self._captured.__dict__.setdefault("graphs", set())
        with nullcontext() if now in graphs else self._device.setup:  # no session is made beside a capture
            self._run(now)
        graphs.add(now)

    def _run(self, now: int) -> None:
        try:
            self._session.run_with_iobinding(self._bindings[now], self._options[now])
            return
        except Exception as error:  # onnxruntime's exceptions share no public base class
            self._failed = True
            reason = one_line(error)
        raise self._failure("failed in a step of", reason)  # out of the handler: error's frames hold the session

    def _failure(self, what: str, reason: str) -> EngineError:
        kind, where = OutOfMemoryError if MEMORY.search(reason) else EngineError, str(self._path)
        with suppress(EngineError):  # where the GPU is lost, onnxruntime's words say more of it
            free, total = (n >> 20 for n in self._device.memory())
            where += f" ({free} of {total} MiB of the GPU are free)"
        return kind(f"onnxruntime {what} {where}: {reason}")

    def _open(self, engine: OnnxRuntimeCuda, buffers: Buffers, stream: cuda.Stream, nhwc: bool) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        width, shape = buffers.width, buffers.shape
        extents = (width,) if engine.bundle.manifest.sizes is None else (width, *shape[1:])
        for name, extent in zip(FREE, extents, strict=False):
            options.add_free_dimension_override_by_name(name, extent)
        on_cuda = "CUDAExecutionProvider", _cuda_options(engine, stream, nhwc)
        with self._device.setup:
            if engine.name == CUDA:
                session = self._make(engine, options, [on_cuda])
            else:
                with EngineCache().kept_by(f"{TENSORRT}-{engine.key(width, shape)}") as folder:
                    on_tensorrt = engine.provider, _tensorrt_options(engine, stream, str(folder))
                    session = self._make(engine, options, [on_tensorrt, on_cuda])
        check_signature(session, buffers.signature, self._path)
        return session

    def _make(self, engine: OnnxRuntimeCuda, options: Any, providers: list[tuple[str, dict[str, str]]]) -> Any:
        try:
            session = ort.InferenceSession(self._path, options, providers=providers, enable_fallback=0)
            if session.get_providers()[:1] == [engine.provider]:
                return session
            reason = f"it fell back to {session.get_providers()[0]}"
        except Exception as error:
            reason = one_line(error)
        needs = f'; {engine.name} needs {LIBRARIES[engine.name]}: pip install "epsrt[gpu]", and see "epsrt doctor"'
        raise self._failure("cannot run", reason if MEMORY.search(reason) else reason + needs)

    def _bind(self, buffers: Buffers, now: int) -> Any:
        binding = self._session.io_binding()
        addresses = {**buffers.fixed, **buffers.sources(now, self._row.pointer)}
        addresses |= buffers.results(now)
        takes = buffers.signature
        for tensors, bind in ((takes.inputs, binding.bind_input), (takes.outputs, binding.bind_output)):
            for name, tensor in tensors.items():
                bind(name, "cuda", 0, np.dtype(tensor.dtype).type, list(tensor.extents), addresses[name])
        return binding

    def close(self) -> None:
        with self._device.setup:
            self._bindings.clear()
            self._session = None
        self._row.close()


def _load_libraries(name: str) -> None:
    """Load libraries from pip's packages, where the dynamic linker does not look."""
    if hasattr(ort, "preload_dlls"):
        with redirect_stdout(sys.stderr):  # it prints
            ort.preload_dlls()
    if name == TENSORRT:
        with suppress(ImportError, OSError):
            import tensorrt  # noqa: F401


def _run_options(graph: str) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph)
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def _cuda_options(engine: OnnxRuntimeCuda, stream: cuda.Stream, nhwc: bool) -> dict[str, str]:
    return {
        "user_compute_stream": str(stream.handle),
        "enable_cuda_graph": str(int(engine.name == CUDA)),
        "prefer_nhwc": str(int(nhwc)),
        # FP32 is a claim that the parity ladder checks; in FP16, "0" would take the tensor cores from convolutions too
        "use_tf32": str(int(engine.precision == "fp16")),
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "arena_extend_strategy": "kSameAsRequested",
    }


def _tensorrt_options(engine: OnnxRuntimeCuda, stream: cuda.Stream, folder: str) -> dict[str, str]:
    return {
        "user_compute_stream": str(stream.handle),
        "trt_fp16_enable": str(engine.precision == "fp16"),
        "trt_cuda_graph_enable": "False",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": folder,
    }
