"""Engines "onnxruntime-cuda" and "onnxruntime-tensorrt": onnxruntime's GPU providers on device-resident lanes.

Each lanes object has a session of its own, on its own stream, because a session's stream is settled when it is made.
onnxruntime records a CUDA graph a binding: one from x[0] to x[1], one back. What it does with them (1.31): the first
run of each graph in a thread runs the step twice, then captures in CUDA's global mode, which an allocation in any other
thread would break; replays are one launch, without a synchronisation when told so.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np

from epsrt.bundle import Bundle, Graph
from epsrt.engines import cuda
from epsrt.engines.cache import EngineCache
from epsrt.engines.lanes import CHUNK, Buffers, DeviceLanes
from epsrt.engines.ort_library import check_signature, ort, refuse_both_packages
from epsrt.engines.protocol import check_batch
from epsrt.errors import EngineError

log = logging.getLogger("epsrt")

PROVIDERS = {"onnxruntime-cuda": "CUDAExecutionProvider", "onnxruntime-tensorrt": "TensorrtExecutionProvider"}
TRIALS = 20  # steps that a layout is timed over


class OnnxRuntimeCuda:
    """See protocol.Engine. Raises EngineError where the provider cannot run: it never falls back to the CPU."""

    batch_limit = "the bundle's largest"
    device = "cuda"

    def __init__(self, bundle: Bundle, graph: Graph, name: str = "onnxruntime-cuda"):
        refuse_both_packages()
        self.provider = PROVIDERS[name]
        if self.provider not in ort.get_available_providers():
            have = ", ".join(ort.get_available_providers())
            raise EngineError(
                f"engine {name} needs onnxruntime built for NVIDIA's GPUs, and this one has only {have}: "
                'pip uninstall -y onnxruntime, then pip install "epsrt[gpu]"'
            )
        self.name, self.bundle, self.graph = name, bundle, graph
        self.precision: str = graph.precision
        self.columns = graph.columns
        self.max_batch = bundle.manifest.max_batch
        self.chunk = CHUNK
        self._device = cuda.device()
        self._layouts: dict[int, bool] = {}  # batch -> whether NHWC is the faster
        self._tuning = threading.Lock()
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # of CUDA's pip packages, which the dynamic linker does not find

    def lanes(self, batch: int) -> DeviceLanes:
        """Lanes for `batch` samples, 1 … max_batch. The first of a batch size on a machine times both layouts."""
        check_batch(batch, self)
        return self._lanes(batch, self._nhwc(batch))

    def close(self) -> None:
        """Nothing to release: sessions belong to the lanes."""

    def _lanes(self, batch: int, nhwc: bool) -> DeviceLanes:
        make = lambda buffers, stream: _Session(self, buffers, stream, nhwc)  # noqa: E731
        return DeviceLanes(self._device, self.bundle.manifest.shape, self.columns, batch, batch, make, self.chunk)

    def _nhwc(self, batch: int) -> bool:
        """Whether convolutions run faster in NHWC, with the transpositions that it takes: measured once, remembered."""
        if self.name != "onnxruntime-cuda":
            return False  # TensorRT chooses for itself
        with self._tuning:
            if batch not in self._layouts:
                self._layouts[batch] = self._recalled(batch)
            return self._layouts[batch]

    def _recalled(self, batch: int) -> bool:
        gpu, digest = self._device.gpu, self.bundle.manifest.digest[:16]
        key = f"layout-{ort.__version__}-{gpu.name}-{gpu.arch}-{digest}-{self.precision}-{batch}".replace(" ", "-")
        cache = EngineCache()
        known = cache.blob(key)
        if known not in (b"nchw", b"nhwc"):
            seconds = {layout: self._time(batch, layout == b"nhwc") for layout in (b"nchw", b"nhwc")}
            known = min(seconds, key=lambda layout: seconds[layout])
            log.info("batch %d: %s", batch, ", ".join(f"{k.decode()} {v:.3f} ms a step" for k, v in seconds.items()))
            cache.keep_blob(key, known)
        return known == b"nhwc"

    def _time(self, batch: int, nhwc: bool) -> float:
        """Milliseconds a step; infinity where onnxruntime cannot run it so."""
        try:
            with self._lanes(batch, nhwc) as lanes:
                return lanes.time_steps(TRIALS)
        except EngineError as error:
            if not nhwc:
                raise
            log.info("onnxruntime refuses NHWC: %s", error)
            return float("inf")


class _Session:
    """lanes.Runner: a session on the buffers of one lanes object."""

    capturable = False  # it captures by itself

    def __init__(self, engine: OnnxRuntimeCuda, buffers: Buffers, stream: cuda.Stream, nhwc: bool):
        self._device, self._stream = engine._device, stream
        self._path = engine.bundle.path / engine.graph.file
        self._row_bytes = 4 * buffers.width * len(engine.columns)
        self._row = cuda.Memory(self._row_bytes, f"a batch of {buffers.width}")
        try:
            self._session = self._open(engine, buffers.width, stream, nhwc)
            self._bindings = [self._bind(engine, buffers, now) for now in (0, 1)]
        except BaseException:
            self._row.close()
            raise
        self._options = [_run_options(graph) for graph in ("1", "2")]  # 0 is onnxruntime's own
        self._threads: set[tuple[int, int]] = set()  # that captured a binding: graphs are a thread's own

    def enqueue(self, now: int, rows: int) -> None:
        self._stream.copy(self._row.pointer, rows, self._row_bytes)
        place = threading.get_ident(), now
        if place in self._threads:
            self._run(now)
            return
        with self._device.setup:  # nothing may be allocated beside a capture
            self._run(now)
        self._threads.add(place)

    def _run(self, now: int) -> None:
        try:
            self._session.run_with_iobinding(self._bindings[now], self._options[now])
        except Exception as error:  # onnxruntime's exceptions share no public base class
            free, total = (n >> 20 for n in self._device.memory())
            reason = " ".join(str(error).split())
            raise EngineError(
                f"onnxruntime failed in a step of {self._path} ({free} of {total} MiB of the GPU are free): {reason}"
            ) from None

    def _open(self, engine: OnnxRuntimeCuda, width: int, stream: cuda.Stream, nhwc: bool) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        providers = _providers(engine, width, stream, nhwc)
        try:
            with self._device.setup:
                session = ort.InferenceSession(self._path, options, providers=providers, enable_fallback=0)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise EngineError(f'{engine.name} cannot run {self._path}: {reason}; see "epsrt doctor"') from None
        if session.get_providers()[:1] != [engine.provider]:
            raise EngineError(
                f"{engine.name} fell back to {', '.join(session.get_providers())}: its provider's libraries (CUDA 13, "
                'cuDNN 9) do not load; pip install "epsrt[gpu]", and see "epsrt doctor"'
            )
        check_signature(session, engine.bundle, engine.graph)
        return session

    def _bind(self, engine: OnnxRuntimeCuda, b: Buffers, now: int) -> Any:
        image = [b.width, *engine.bundle.manifest.shape]
        binding = self._session.io_binding()
        inputs = {"x": b.x[now], "m": b.m[now], "z": b.z}
        for name, address in inputs.items():
            binding.bind_input(name, "cuda", 0, np.float32, image, address)
        binding.bind_input("rows", "cuda", 0, np.float32, [b.width, len(engine.columns)], self._row.pointer)
        if engine.bundle.labelled:
            binding.bind_input("label", "cuda", 0, np.int64, [b.width], b.label)
        for name, address in {"x_next": b.x[1 - now], "m_next": b.m[1 - now], "x0": b.x0}.items():
            binding.bind_output(name, "cuda", 0, np.float32, image, address)
        return binding

    def close(self) -> None:
        self._bindings.clear()
        self._session = None
        self._row.close()


def _run_options(graph: str) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph)
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def _providers(
    engine: OnnxRuntimeCuda, width: int, stream: cuda.Stream, nhwc: bool
) -> list[tuple[str, dict[str, str]]]:
    """The provider first, with every option that matters here said."""
    cuda_options = {
        "device_id": "0",
        "user_compute_stream": str(stream.handle),
        "enable_cuda_graph": "1",
        "prefer_nhwc": str(int(nhwc)),
        "use_tf32": "0",  # FP32 is a claim that the parity ladder checks
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "arena_extend_strategy": "kSameAsRequested",
    }
    if engine.name == "onnxruntime-cuda":
        return [("CUDAExecutionProvider", cuda_options)]
    directory = EngineCache().directory_for("onnxruntime-tensorrt")
    image = [width, *engine.bundle.manifest.shape]
    shapes = dict.fromkeys("xmz", image) | {"rows": [width, len(engine.columns)]}
    if engine.bundle.labelled:
        shapes["label"] = [width]
    profile = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
    tensorrt = {
        "device_id": "0",
        "user_compute_stream": str(stream.handle),
        "trt_fp16_enable": str(int(engine.precision == "fp16")),
        "trt_cuda_graph_enable": "1",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(directory),
        "trt_engine_cache_prefix": f"{engine.bundle.manifest.digest[:16]}-{engine.precision}-{width}",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(directory),
        "trt_auxiliary_streams": "0",
        **{f"trt_profile_{kind}_shapes": profile for kind in ("min", "opt", "max")},
    }
    plain = {k: v for k, v in cuda_options.items() if k != "enable_cuda_graph"}
    return [("TensorrtExecutionProvider", tensorrt), ("CUDAExecutionProvider", plain)]
