"""Engines "onnxruntime-cuda" and "onnxruntime-tensorrt": onnxruntime's GPU providers on device-resident lanes."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path

from epsrt.bundle import Bundle
from epsrt.engine import Closing, check_batch
from epsrt.engines.cache.brought import Brought
from epsrt.engines.cache.key import Key, Options
from epsrt.engines.cache.store import EngineCache
from epsrt.engines.dialects import open_in_dialect
from epsrt.engines.gpu import cuda
from epsrt.engines.gpu.buffers import Buffers
from epsrt.engines.gpu.lanes import CHUNK, DeviceLanes
from epsrt.engines.gpu.ort_part import PartSession
from epsrt.engines.gpu.ort_session import Providers, Session
from epsrt.engines.gpu.parts import DeviceParts, PartBuffers
from epsrt.engines.ort_library import ort, refuse_both_packages
from epsrt.engines.parts import Call, OpenPart, OpenParts
from epsrt.engines.probe import installed
from epsrt.engines.proof import Kept, Proof
from epsrt.errors import EngineError, OutOfMemoryError
from epsrt.manifest import StepGraph
from epsrt.part import Part
from epsrt.raised import passed_over
from epsrt.types import OnProgress, Shape, Size

log = logging.getLogger("epsrt")

CUDA, TENSORRT = "onnxruntime-cuda", "onnxruntime-tensorrt"
PROVIDERS = {CUDA: "CUDAExecutionProvider", TENSORRT: "TensorrtExecutionProvider"}
LIBRARIES = {CUDA: "CUDA 13 and cuDNN 9", TENSORRT: "TensorRT 10, CUDA 13 and cuDNN 9"}
RECIPE = 1  # of how a session is made: proofs of another do not count
TRIALS = 20  # steps that a layout is timed over


class OnnxRuntimeCuda(Closing):
    """See epsrt.engine.Engine. Raises EngineError where the provider cannot run: it never falls back to the CPU.

    dialect  which file of the step graph it runs: of StepGraph.files
    others   others(graph) opens another step graph as this one was opened; by default in the same dialect, unproven
    options  more options of the CUDA provider, or others than ours
    nhwc     the layout of convolutions; None: NHWC in dialect "cuda", else the one that is faster here
    """

    batch_limit = "the bundle's largest"
    device = "cuda"
    most_kept = None

    def __init__(
        self,
        bundle: Bundle,
        graph: StepGraph,
        name: str = CUDA,
        dialect: str = "cpu",
        *,
        others: Callable[[StepGraph], OnnxRuntimeCuda] | None = None,
        options: dict[str, str] | None = None,
        nhwc: bool | None = None,
        trusted: bool = False,
    ):
        refuse_both_packages()
        if PROVIDERS[name] not in ort.get_available_providers():
            have = ", ".join(ort.get_available_providers())
            raise EngineError(
                f"engine {name} needs onnxruntime built for NVIDIA's GPUs, and this one has only {have}: "
                'pip uninstall -y onnxruntime, then pip install "epsrt[gpu]"'
            )
        if name == TENSORRT and graph.precision == "fp32" and not _exact():
            raise EngineError(
                f"engine {name} has no FP32: onnxruntime lets TensorRT compute it in TF32: use precision fp16, "
                f"engine {CUDA}, or set NVIDIA_TF32_OVERRIDE=0"
            )
        self.name, self.bundle, self.graph, self.dialect = name, bundle, graph.in_dialect(dialect), dialect
        self.precision: str = graph.precision
        self.columns = graph.columns
        self.max_batch = bundle.manifest.max_batch
        self.chunk = CHUNK
        self._others = others or (lambda graph: OnnxRuntimeCuda(bundle, graph, name, dialect, options=options))
        self._more, self._brought = options or {}, Brought(bundle, trusted)
        self._device, self._parts = cuda.device(), OpenParts(bundle, graph.precision)
        # TensorRT chooses layouts for itself; None: not timed yet
        self._nhwc = False if name == TENSORRT else True if nhwc is None and dialect == "cuda" else nhwc
        self._timing = threading.Lock()
        _load_libraries(name)

    def lanes(self, batch: int, size: Size | None = None) -> DeviceLanes:
        """See epsrt.engine.Engine. The first lanes of a step graph on a machine time both layouts."""
        check_batch(batch, self)
        shape = self.bundle.image_shape(size)
        with self._timing if self._nhwc is None else nullcontext():
            if self._nhwc is None:
                self._nhwc = self._faster_in_nhwc(batch, shape)
            nhwc = self._nhwc
        return self._lanes(batch, shape, bool(nhwc))

    def on(self, graph: StepGraph) -> OnnxRuntimeCuda:
        """See epsrt.engine.Engine."""
        return self._others(graph)

    def part(self, name: str) -> OpenPart:
        """See epsrt.engine.Engine."""
        return self._parts.get(name, self._open_part)

    def close(self) -> None:
        """Close the parts. Other sessions belong to the lanes."""
        self._parts.close()

    def proof(self) -> Proof:
        """Of what the engine is worth for this bundle, by this onnxruntime on this GPU."""
        gpu, digest = self._device.gpu, self.bundle.manifest.digest
        options: Options = {"proof": RECIPE, **self._more}
        if self.name == TENSORRT:
            options["tensorrt"] = installed("tensorrt")
        key = Key(
            digest, self.graph.file, self.name, ort.__version__, gpu.name, (gpu.arch,), self.precision, (), options
        )
        return Proof(key, f"{self.name} in dialect {self.dialect}", self._brought)

    def kept(self, batch: int, size: Size | None = None) -> Kept:
        """No file of a batch, and the proof of the engine's own dialect where it runs that."""
        self.lanes(batch, size).close()
        return Kept(None, () if self.dialect == "cpu" else (self.proof(),))

    def _lanes(self, batch: int, shape: Shape, nhwc: bool) -> DeviceLanes:
        make = lambda buffers, stream: self._session(buffers, stream, nhwc)  # noqa: E731
        return DeviceLanes(self._device, self.bundle, self.graph, shape, batch, batch, make, self.chunk)

    def _session(self, buffers: Buffers, stream: cuda.Stream, nhwc: bool) -> Session:
        providers = partial(self._providers, self.graph, nhwc, "x".join(map(str, (buffers.width, *buffers.shape[1:]))))
        records = self.name == CUDA
        return Session(self._device, buffers, stream, self.bundle, self.graph, providers, self._needs, records)

    def _open_part(self, name: str, part: Part) -> Call:
        def make(buffers: PartBuffers) -> PartSession:
            size = "-".join("x".join(map(str, tensor.extents)) for tensor in buffers.signature.inputs.values())
            providers = partial(self._providers, part, False, size)
            return PartSession(self._device, buffers, self.bundle, part, providers, self._needs)

        return DeviceParts(self._device, self.bundle, part, make)

    @contextmanager
    def _providers(self, graph: StepGraph | Part, nhwc: bool, size: str) -> Iterator[Providers]:
        """The context in which a session of a graph may be made for a batch and size."""
        on_cuda = PROVIDERS[CUDA], self._cuda_options(nhwc, graph.precision)
        if self.name == CUDA or (isinstance(graph, Part) and graph.precision == "fp32" and not _exact()):
            yield [on_cuda]
            return
        with EngineCache().kept_by(f"{TENSORRT}-{self._named(graph)}-{size}") as folder:
            yield [(PROVIDERS[TENSORRT], self._tensorrt_options(folder, graph.precision)), on_cuda]

    @property
    def _needs(self) -> str:
        """What the first provider needs, for a sentence."""
        return f'; {self.name} needs {LIBRARIES[self.name]}: pip install "epsrt[gpu]", and see "epsrt doctor"'

    def _named(self, graph: StepGraph | Part) -> str:
        """What holds for a graph, this GPU and onnxruntime has this name, and may not hold for others."""
        gpu, digest = self._device.gpu, self.bundle.manifest.digest[:16]
        return f"{ort.__version__}-{gpu.name}-{gpu.arch}-{digest}-{graph.file}"

    def _faster_in_nhwc(self, batch: int, shape: Shape) -> bool | None:
        """Whether convolutions run faster in NHWC, its transpositions included: timed once, then remembered.

        None where the memory for it is lacking: another time it may be there.
        """
        cache, name = EngineCache(), f"layout-{self._named(self.graph)}"
        known = cache.blob(name)
        if known not in (b"nchw", b"nhwc"):
            nchw = self._time(batch, shape, nhwc=False)
            try:
                nhwc = self._time(batch, shape, nhwc=True)
            except OutOfMemoryError:
                return None
            except EngineError as error:
                log.info("%s in NCHW, since NHWC fails: %s", self.graph.file, error)
                return False  # not remembered: another onnxruntime may have it
            log.info("%s at batch %d: NCHW %.3f ms a step, NHWC %.3f", self.graph.file, batch, nchw, nhwc)
            known = b"nhwc" if nhwc < nchw else b"nchw"
            cache.keep_blob(name, known)
        return known == b"nhwc"

    def _time(self, batch: int, shape: Shape, nhwc: bool) -> float:
        """Milliseconds a step."""
        with self._lanes(batch, shape, nhwc) as lanes:
            return lanes.time_steps(TRIALS)

    def _cuda_options(self, nhwc: bool, precision: str) -> dict[str, str]:
        return {
            "prefer_nhwc": str(int(nhwc)),
            # FP32 is a claim that the parity ladder checks; in FP16, "0" would take the tensor cores from convolutions
            "use_tf32": str(int(precision == "fp16")),
            # cuDNN's frontend, which onnxruntime calls, takes its best guess for this word too: nothing is benchmarked
            "cudnn_conv_algo_search": "EXHAUSTIVE",
            "fuse_conv_bias": "1",  # off by default: a kernel more for each convolution
            "arena_extend_strategy": "kSameAsRequested",
            **self._more,
        }

    def _tensorrt_options(self, folder: Path | None, precision: str) -> dict[str, str]:
        options = {"trt_fp16_enable": str(precision == "fp16"), "trt_cuda_graph_enable": "False"}
        for kept in () if folder is None else ("engine", "timing"):
            options |= {f"trt_{kept}_cache_enable": "True", f"trt_{kept}_cache_path": str(folder)}
        return options


def open_onnxruntime(
    bundle: Bundle,
    graph: StepGraph,
    name: str,
    *,
    trust_engines: bool = False,
    may_build: bool = True,
    on_progress: OnProgress | None = None,
) -> OnnxRuntimeCuda:
    """The engine in its own dialect, where the bundle has it and the golden file proves it here; else the plain graph.

    The proof is epsrt.verify's, once a bundle, library and GPU; with may_build=False only a kept one counts. With
    `trust_engines` one that the bundle brings does too.
    """

    def on(graph: StepGraph) -> OnnxRuntimeCuda:
        return open_onnxruntime(
            bundle, graph, name, trust_engines=trust_engines, may_build=may_build, on_progress=on_progress
        )

    def make(dialect: str) -> OnnxRuntimeCuda:
        return OnnxRuntimeCuda(bundle, graph, name, dialect, others=on, trusted=trust_engines)

    return open_in_dialect(name, bundle, graph, make, may_build=may_build, on_progress=on_progress)


def _exact() -> bool:
    """Whether TensorRT computes FP32 in FP32: onnxruntime has no option for it."""
    return os.environ.get("NVIDIA_TF32_OVERRIDE") == "0"


def _load_libraries(name: str) -> None:
    """Load libraries from pip's packages, where the dynamic linker does not look."""
    if hasattr(ort, "preload_dlls"):
        with redirect_stdout(sys.stderr):  # it prints
            ort.preload_dlls()
    if name == TENSORRT:
        with passed_over(ImportError, OSError):
            import tensorrt  # noqa: F401
