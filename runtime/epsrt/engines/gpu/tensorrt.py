"""Engines "tensorrt" and "tensorrt-rtx": a step graph's engine file on the GPU."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from epsrt.bundle import Bundle
from epsrt.engine import Closing, Engine, check_batch
from epsrt.engines.gpu import cuda
from epsrt.engines.gpu.buffers import Buffers
from epsrt.engines.gpu.lanes import CHUNK, DeviceLanes
from epsrt.engines.gpu.trt_build import build_command
from epsrt.engines.gpu.trt_library import Library, make_logger
from epsrt.engines.signature import FREE, Signature, Tensor
from epsrt.errors import EngineError
from epsrt.manifest import StepGraph
from epsrt.types import Size

log = logging.getLogger("epsrt")


class TensorRt(Closing):
    """See epsrt.engine.Engine.

    data                the engine file that `library` built from `graph` of the bundle; native code, so it is trusted
    others              others(graph) opens another step graph of the bundle as this one was opened
    stripped            the engine file has no weights and takes the bundle's
    version_compatible  the engine file brings code of the version that built it
    compiled            kernels that an earlier engine compiled at run time, where the library compiles any
    on_compiled         on_compiled(bytes) is given the kernels that this engine compiled

    Raises EngineError when the engine file is not for this library, version or GPU, or memory does not suffice.
    """

    device = "cuda"

    def __init__(
        self,
        library: Library,
        bundle: Bundle,
        graph: StepGraph,
        data: bytes,
        *,
        others: Callable[[StepGraph], Engine],
        stripped: bool = False,
        version_compatible: bool = False,
        compiled: bytes = b"",
        on_compiled: Callable[[bytes], object] | None = None,
    ):
        self.name, self.bundle, self.graph = library.engine, bundle, graph
        self.columns, self.chunk = graph.columns, CHUNK
        self.precision: str = graph.precision
        self._library, self._on_compiled, self._others = library, on_compiled, others
        self._device = cuda.device()
        self._device.use()
        self._lock = threading.Lock()  # contexts are made one at a time: TensorRT says only enqueues may be concurrent
        self._logger = make_logger(library.module)
        self._runtime = library.module.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = version_compatible
        self.engine = self._runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            size, free = len(data) >> 20, self._device.memory()[0] >> 20
            raise EngineError(
                f"{library} refuses the engine file of {bundle.path.name} (it has {size} MiB, {free} of the GPU's are "
                f'free): {self._logger.told()}; run "{build_command(bundle.path, self.name, graph)}"'
            )
        if stripped:
            self._take_weights()
        self._check_signature()
        profiles = range(self.engine.num_optimization_profiles)
        self.profiles = [tuple(shape[0] for shape in self.engine.get_tensor_profile_shape("x", i)) for i in profiles]
        self.max_batch = max(most for _, _, most in self.profiles)
        named = ", ".join(":".join(map(str, p)) for p in self.profiles)
        self.batch_limit = f'the largest of the engine file\'s batch profiles, {named} (another: "epsrt build --batch")'
        self._cache = self._runtime_cache(compiled)

    def lanes(self, batch: int, size: Size | None = None) -> DeviceLanes:
        """See epsrt.engine.Engine; below a profile's least batch, the lanes beyond it idle."""
        check_batch(batch, self)
        shape = self.bundle.image_shape(size)
        profile, width = choose_profile(self.profiles, batch)
        make = lambda buffers, stream: _Context(self, profile, buffers, stream)  # noqa: E731
        made = DeviceLanes(self._device, self.bundle, self.graph, shape, batch, width, make, self.chunk)
        self._keep_compiled()
        return made

    def on(self, graph: StepGraph) -> Engine:
        """See epsrt.engine.Engine."""
        return self._others(graph)

    def information(self) -> str:
        """What the library says of the engine's layers, as JSON text."""
        trt = self._library.module
        return str(self.engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))

    def close(self) -> None:
        """Release the engine. Its lanes are closed before it."""
        self._cache = self.engine = self._runtime = None

    def context(self, profile: int, stream: cuda.Stream, shapes: dict[str, tuple[int, ...]]) -> tuple[Any, cuda.Memory]:
        """An execution context for shapes, and the device memory that it works in, which the caller closes after it."""
        trt = self._library.module
        with self._lock:
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if self._cache is not None:
                config.set_runtime_cache(self._cache)
                # for the one shape that a context will see, and before it runs: a capture cannot wait for a compiler
                eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
                config.dynamic_shapes_kernel_specialization_strategy = eager
            context = self.engine.create_execution_context(config)
            if context is None or not context.set_optimization_profile_async(profile, stream.handle):
                raise self.failure("cannot make an execution context")
            for name, shape in shapes.items():
                if not context.set_input_shape(name, shape):
                    raise self.failure(f"refuses {name} {list(shape)}")
            memory = cuda.Memory(context.update_device_memory_size_for_shapes(), "an execution context of the engine")
            context.set_device_memory(memory.pointer, memory.size)
            return context, memory

    def failure(self, what: str) -> EngineError:
        """What the library said, as an error to raise."""
        return EngineError(f"{self._library} {what} of {self.bundle.path.name}: {self._logger.told()}")

    def _take_weights(self) -> None:
        trt, file = self._library.module, self.bundle.path / self.graph.file
        refitter = trt.Refitter(self.engine, self._logger)
        weights = trt.OnnxParserRefitter(refitter, self._logger)
        if not weights.refit_from_file(str(file)) or not refitter.refit_cuda_engine():
            told = self._logger.told()
            raise EngineError(f"{self._library} cannot put the weights of {file} into its engine file: {told}")

    def _check_signature(self) -> None:
        trt, engine = self._library.module, self.engine
        words = {trt.DataType.FLOAT: "float32", trt.DataType.INT64: "int64"}
        found = {}
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            dtype, extents = engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name))
            # where a profile has one batch alone, TensorRT may have made it static
            found[name] = Tensor(words.get(dtype, str(dtype)), (FREE, *extents[1:]))
        way_out = f'run "{build_command(self.bundle.path, self.name, self.graph)}"'
        Signature.of(self.bundle, self.graph).check(found, f"the engine file of {self.bundle.path.name}", way_out)

    def _runtime_cache(self, compiled: bytes) -> Any:
        if not self._library.compiles:
            return None
        cache = self.engine.create_runtime_config().create_runtime_cache()
        if compiled and not cache.deserialize(compiled):
            log.info("the kernels that an earlier run compiled do not fit this machine: compiling again")
        self._compiled = compiled
        return cache

    def _keep_compiled(self) -> None:
        if self._cache is not None and self._on_compiled is not None:
            compiled = bytes(self._cache.serialize())
            if compiled != self._compiled:
                self._compiled = compiled
                self._on_compiled(compiled)


class _Context:
    """lanes.Runner: an execution context on the buffers of one lanes object."""

    capturable = True

    def __init__(self, engine: TensorRt, profile: int, buffers: Buffers, stream: cuda.Stream):
        self._engine, self._buffers, self._handle = engine, buffers, stream.handle
        shapes = {name: tensor.extents for name, tensor in buffers.signature.inputs.items()}
        self._context, self._memory = engine.context(profile, stream, shapes)
        try:
            self._bind(buffers.fixed)
        except BaseException:
            self.close()
            raise

    def enqueue(self, now: int, rows: int) -> None:
        self._bind(self._buffers.sources(now, rows))
        self._bind(self._buffers.results(now))
        if not self._context.execute_async_v3(self._handle):
            raise self._engine.failure("refuses to enqueue a step")

    def settle(self) -> None:
        """See lanes.Runner. A context has nothing of a thread's own."""

    def without_capture(self) -> str:
        """See lanes.Runner."""
        return "steps are enqueued one by one, which is"

    def _bind(self, addresses: Mapping[str, int]) -> None:
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise self._engine.failure(f"refuses the address of {name}")

    def close(self) -> None:
        self._context = None
        self._memory.close()


def choose_profile(profiles: list[tuple[int, ...]], batch: int) -> tuple[int, int]:
    """Which profile serves a batch, and how wide it then runs.

    Of the profiles that hold the batch, the narrowest, then that whose likely batch is nearest; where none does, the
    one that begins soonest above it, at its least batch.
    """
    holding = [i for i, (least, _, most) in enumerate(profiles) if least <= batch <= most]
    if holding:
        best = min(holding, key=lambda i: (profiles[i][2] - profiles[i][0], abs(profiles[i][1] - batch)))
        return best, batch
    above = min((i for i, p in enumerate(profiles) if p[0] > batch), key=lambda i: profiles[i][0])
    return above, profiles[above][0]
