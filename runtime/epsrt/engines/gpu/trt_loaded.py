"""An engine file in the GPU's memory, and the contexts that run its step."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from epsrt.bundle import Bundle
from epsrt.engines.gpu import cuda
from epsrt.engines.gpu.buffers import Buffers
from epsrt.engines.gpu.trt_build import source
from epsrt.engines.gpu.trt_library import Heard, Library
from epsrt.engines.signature import Signature, Tensor
from epsrt.errors import EngineError, OutOfMemoryError
from epsrt.manifest import StepGraph
from epsrt.part import FREE, Part

log = logging.getLogger("epsrt")


@dataclass(frozen=True)
class Compiled:
    """Kernels that a library compiles at run time: `kept` by an earlier engine, and `keep` them for a later one."""

    kept: bytes
    keep: Callable[[bytes], object]


class LoadedEngineFile:
    """An engine file, ready to run. Its memory is freed once nobody holds it: no engine, and no lanes' Context.

    runtime             the library's Runtime, which is used by one caller at a time
    data                what `library` built from `graph` of the bundle; native code, so it is trusted
    stripped            it has no weights and takes the bundle's
    version_compatible  it brings code of the version that built it
    compiled            where the library compiles kernels at run time
    command             what builds the engine file anew, for sentences

    Raises EngineError when it is not for this library, version or GPU, OutOfMemoryError when memory does not suffice.
    """

    def __init__(
        self,
        library: Library,
        runtime: Any,
        bundle: Bundle,
        graph: StepGraph | Part,
        data: bytes,
        *,
        stripped: bool,
        version_compatible: bool,
        compiled: Compiled | None,
        command: str,
    ):
        self.library, self.name, self._bundle, self._graph = library, bundle.path.name, bundle, graph
        self._lock = threading.Lock()  # contexts are made one at a time: TensorRT says only enqueues may be concurrent
        runtime.engine_host_code_allowed = version_compatible
        with library.logger.hearing() as heard:
            self.engine, self._runtime = runtime.deserialize_cuda_engine(data), runtime  # which outlives it
            if self.engine is None:
                size, free = len(data) >> 20, cuda.device().memory()[0] >> 20
                what = f"refuses the engine file of {self.name} (it has {size} MiB, {free} of the GPU's are free)"
                raise self.failure(what, heard, f'; run "{command}"')
            if stripped:
                self._take_weights(heard)
        self._check_signature(command)
        self._compiled, self._cache = compiled, self._runtime_cache(compiled)

    def information(self) -> str:
        """What the library says of the engine's layers, as JSON text."""
        form = self.library.module.LayerInformationFormat.JSON
        return str(self.engine.create_engine_inspector().get_engine_information(form))

    def context(
        self, profile: int, stream: cuda.Stream, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[Any, cuda.Memory]:
        """An execution context for shapes, and the device memory that it works in, which the caller closes after it."""
        trt = self.library.module
        with self._lock, self.library.logger.hearing() as heard:
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if self._cache is not None:
                config.set_runtime_cache(self._cache)
                # for the one shape that a context will see, and before it runs: a capture cannot wait for a compiler
                eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
                config.dynamic_shapes_kernel_specialization_strategy = eager
            context = self.engine.create_execution_context(config)
            if context is None or not context.set_optimization_profile_async(profile, stream.handle):
                raise self.failure(f"cannot make an execution context of {self.name}", heard)
            for name, shape in shapes.items():
                if not context.set_input_shape(name, shape):
                    raise self.failure(f"refuses {name} {list(shape)} of {self.name}", heard)
            memory = cuda.Memory(context.update_device_memory_size_for_shapes(), "an execution context of the engine")
            context.set_device_memory(memory.pointer, memory.size)
            return context, memory

    def failure(self, what: str, heard: Heard, way_out: str = "") -> EngineError:
        """What the library said, as an error to raise."""
        kind = OutOfMemoryError if heard.lacks_memory else EngineError
        return kind(f"{self.library} {what}: {heard}{way_out}")

    def keep_compiled(self) -> None:
        """Give away the kernels that contexts have compiled since the last time."""
        with self._lock:
            if self._cache is None or self._compiled is None:
                return
            data = bytes(self._cache.serialize())
            if data != self._compiled.kept:
                self._compiled = Compiled(data, self._compiled.keep)
                self._compiled.keep(data)

    def _take_weights(self, heard: Heard) -> None:
        trt, graph = self.library.module, self._graph
        refitter = trt.Refitter(self.engine, self.library.logger)
        weights = trt.OnnxParserRefitter(refitter, self.library.logger)
        with self._bundle.graph_file(graph) as read:
            if not weights.refit_from_file(str(read)) or not refitter.refit_cuda_engine():
                file = source(self._bundle, graph)
                raise self.failure(f"cannot put the weights of {file} into the engine file", heard)

    def _check_signature(self, command: str) -> None:
        trt, engine = self.library.module, self.engine
        words = {trt.DataType.FLOAT: "float32", trt.DataType.INT64: "int64", trt.DataType.BOOL: "bool"}
        found = {}
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            dtype, extents = engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name))
            # where the one profile has one batch alone, TensorRT may have made it static
            found[name] = Tensor(words.get(dtype, str(dtype)), (FREE, *extents[1:]))
        Signature.of(self._bundle, self._graph).check(found, f"the engine file of {self.name}", f'run "{command}"')

    def _runtime_cache(self, compiled: Compiled | None) -> Any:
        if compiled is None:
            return None
        cache = self.engine.create_runtime_config().create_runtime_cache()
        if compiled.kept and not cache.deserialize(compiled.kept):
            log.info("the kernels that an earlier run compiled do not fit this machine: compiling again")
        return cache


class Context:
    """runner.Runner: an execution context on the buffers of one lanes object. It keeps its engine file loaded."""

    capturable = True

    def __init__(self, loaded: LoadedEngineFile, profile: int, buffers: Buffers, stream: cuda.Stream):
        self._loaded: LoadedEngineFile | None = loaded
        self._buffers, self._handle = buffers, stream.handle
        shapes = {name: tensor.extents for name, tensor in buffers.signature.inputs.items()}
        self._context, self._memory = loaded.context(profile, stream, shapes)
        try:
            with loaded.library.logger.hearing() as heard:
                self._bind(loaded, buffers.fixed, heard)
        except BaseException:
            self.close()
            raise

    def enqueue(self, now: int, rows: int) -> None:
        loaded = self._loaded
        assert loaded is not None  # it is not closed
        with loaded.library.logger.hearing() as heard:
            self._bind(loaded, self._buffers.sources(now, rows), heard)
            self._bind(loaded, self._buffers.results(now), heard)
            if not self._context.execute_async_v3(self._handle):
                raise loaded.failure(f"refuses to enqueue a step of {loaded.name}", heard)

    def settle(self) -> None:
        """See runner.Runner. A context has nothing of a thread's own."""

    def without_capture(self) -> str:
        """See runner.Runner."""
        return "steps are enqueued one by one, which is"

    def _bind(self, loaded: LoadedEngineFile, addresses: Mapping[str, int], heard: Heard) -> None:
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise loaded.failure(f"refuses the address of {name} of {loaded.name}", heard)

    def close(self) -> None:
        self._context = self._loaded = None
        self._memory.close()
