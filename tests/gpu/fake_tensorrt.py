"""A TensorRT in small: the same Python API, an engine file that names an ONNX file,
and onnxruntime's CPU for the work.

It runs on the stand-in driver: a context gives its stream a host function, so that a step runs when the stream does and
can be captured. Each class has exactly what epsrt uses, in slots: using another name fails. test_tensorrt_api.py holds
the names to TensorRT's own lists.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import weakref
from typing import Any

import numpy as np
import onnxruntime as ort

__version__ = "11.4.0.106"

knobs: dict[str, Any] = {
    "fail_in_capture": False, "fail_enqueue": False, "context": True, "enqueued": 0, "sleep": 0.0,
    "room": 1 << 40,  # bytes of weights that fit into the GPU's memory
}  # fmt: skip
deserialized: list[str] = []  # the ONNX file of each engine file that was loaded
loaded: weakref.WeakSet[ICudaEngine] = weakref.WeakSet()
_global: list[Any] = []  # the first logger, to which alone TensorRT talks


def _kept(logger: ILogger) -> ILogger:
    _global[:] = _global or [logger]
    return _global[0]  # type: ignore[no-any-return]


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT64 = 5
    BOOL = 6


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.Enum):
    TF32 = 0
    VERSION_COMPATIBLE = 1
    REFIT = 2
    STRIP_PLAN = 3


class HardwareCompatibilityLevel(enum.Enum):
    NONE = 0
    AMPERE_PLUS = 1
    SAME_COMPUTE_CAPABILITY = 2


class ProfilingVerbosity(enum.Enum):
    DETAILED = 2


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


class LayerInformationFormat(enum.Enum):
    JSON = 1


class ComputeCapability(enum.Enum):  # TensorRT-RTX alone
    SM86 = 86
    SM89 = 89
    SM120 = 120


class DynamicShapesKernelSpecializationStrategy(enum.Enum):  # TensorRT-RTX alone
    EAGER = 1


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        pass


class IProgressMonitor:
    def __init__(self) -> None:
        pass


class ITimingCache:
    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> bytes:
        return self._data + b"timed"


class IOptimizationProfile:
    __slots__ = ("_shapes",)

    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, name: str, least: Any, likely: Any, most: Any) -> None:
        self._shapes[name] = (least, likely, most)


class IBuilderConfig:
    __slots__ = (
        "_flags_set",
        "_profiles",
        "_targets",
        "_timing",
        "_workspace",
        "builder_optimization_level",
        "hardware_compatibility_level",
        "max_aux_streams",
        "num_compute_capabilities",
        "profiling_verbosity",
        "progress_monitor",
    )

    def __init__(self) -> None:
        self._profiles, self._flags_set, self._targets, self._timing = [], {BuilderFlag.TF32}, {}, None
        self.progress_monitor = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self._flags_set.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags_set.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self._workspace = size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile._shapes)
        return len(self._profiles) - 1

    def create_timing_cache(self, data: bytes) -> ITimingCache:
        return ITimingCache(data)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._timing = cache
        return True

    def set_compute_capability(self, capability: ComputeCapability, index: int) -> bool:
        self._targets[index] = capability
        return True


class ITensor:
    __slots__ = ("dtype", "name", "shape")

    def __init__(self, name: str, dtype: DataType, shape: tuple[int, ...]) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape


class ILayer:
    __slots__ = ("_outputs", "name", "num_outputs", "type")

    def __init__(self, name: str, kind: str, outputs: list[ITensor]) -> None:
        self.name, self.type, self._outputs, self.num_outputs = name, kind, outputs, len(outputs)

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]


def _tensors(values: Any) -> list[ITensor]:
    kinds = {"tensor(float)": DataType.FLOAT, "tensor(int64)": DataType.INT64, "tensor(bool)": DataType.BOOL}
    shapes = [tuple(d if isinstance(d, int) else -1 for d in v.shape) for v in values]
    return [ITensor(v.name, kinds[v.type], shape) for v, shape in zip(values, shapes, strict=True)]


class INetworkDefinition:
    __slots__ = ("_file", "_inputs", "_outputs")

    def __init__(self) -> None:
        self._file, self._inputs, self._outputs = "", [], []

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    @property
    def num_layers(self) -> int:
        return 1

    def get_layer(self, index: int) -> ILayer:
        return ILayer("step", "STEP", self._outputs)


class ParserError:
    __slots__ = ()

    def desc(self) -> str:
        return "this is no model"


class OnnxParser:
    __slots__ = ("_errors", "_network")

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._errors = network, 0
        _kept(logger)

    def parse_from_file(self, file: str) -> bool:
        try:
            session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        except Exception:
            self._errors = 1
            return False
        self._network._file = os.path.realpath(file)  # what it has read stays, whatever its name was
        self._network._inputs, self._network._outputs = _tensors(session.get_inputs()), _tensors(session.get_outputs())
        return True

    @property
    def num_errors(self) -> int:
        return self._errors

    def get_error(self, index: int) -> ParserError:
        return ParserError()


class Builder:
    __slots__ = ("logger",)

    def __init__(self, logger: ILogger) -> None:
        self.logger = _kept(logger)

    def create_network(self, flags: int) -> INetworkDefinition:
        assert flags == 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        import time

        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 2)
        monitor.phase_start("Choosing kernels", "Building engine", 4)
        for step in range(4):
            time.sleep(knobs["sleep"])
            if not monitor.step_complete("Choosing kernels", step):
                self.logger.log(ILogger.ERROR, "the build was cancelled")
                return None
        monitor.phase_finish("Choosing kernels")
        monitor.step_complete("Building engine", 1)
        monitor.phase_finish("Building engine")
        profiles = [{name: list(map(list, shapes)) for name, shapes in p.items()} for p in config._profiles]
        stripped = BuilderFlag.STRIP_PLAN in config._flags_set
        made = {"file": network._file, "profiles": profiles, "version": __version__, "stripped": stripped}
        return b"PLAN" + json.dumps(made).encode()


class IRuntimeCache:  # TensorRT-RTX alone
    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = b""

    def serialize(self) -> bytes:
        return self._data

    def deserialize(self, data: bytes) -> bool:
        self._data = bytes(data)
        return True


class IRuntimeConfig:
    __slots__ = ("_cache", "_strategy", "dynamic_shapes_kernel_specialization_strategy")

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        cache._data = cache._data or b"compiled"
        return True


class EngineInspector:
    __slots__ = ()

    def get_engine_information(self, form: LayerInformationFormat) -> str:
        return '{"Layers": []}'


class ICudaEngine:
    __slots__ = ("__weakref__", "_made", "_session", "_size", "_tensors")

    def __init__(self, made: dict[str, Any], size: int) -> None:
        self._made, self._session, self._size = made, None, size
        loaded.add(self)
        if not made["stripped"]:
            self._take(made["file"])
        session = ort.InferenceSession(made["file"], providers=["CPUExecutionProvider"])
        self._tensors = _tensors([*session.get_inputs(), *session.get_outputs()])

    def _take(self, file: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._made["profiles"])

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return self._tensors[index].name

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return next(t.shape for t in self._tensors if t.name == name)

    def get_tensor_dtype(self, name: str) -> DataType:
        return next(t.dtype for t in self._tensors if t.name == name)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._made["profiles"][profile][name]]

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector()

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, config: IRuntimeConfig) -> IExecutionContext | None:
        assert config._strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return IExecutionContext(self) if knobs["context"] else None


HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_alive: list[Any] = []  # what streams and graphs may still call


class IExecutionContext:
    __slots__ = ("_addresses", "_memory", "_profile", "_shapes", "engine")

    def __init__(self, engine: ICudaEngine) -> None:
        self.engine, self._addresses, self._shapes, self._profile, self._memory = engine, {}, {}, None, None

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine._made["profiles"][self._profile][name]
        self._shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))

    def update_device_memory_size_for_shapes(self) -> int:
        return 4096

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        assert size >= self.update_device_memory_size_for_shapes()
        self._memory = memory

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory % 256 == 0, f"{name} is not aligned"
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        driver = ctypes.CDLL("libcuda.so.1")
        capturing = ctypes.c_int()
        driver.cuStreamIsCapturing(ctypes.c_void_p(stream_handle), ctypes.byref(capturing))
        if knobs["fail_enqueue"] or (capturing.value and knobs["fail_in_capture"]):
            return False
        session, addresses = self.engine._session, dict(self._addresses)
        assert {t.name for t in self.engine._tensors} == set(addresses), "an address is missing"
        shapes = dict(self._shapes)

        whole = {t.name for t in self.engine._tensors if t.dtype is DataType.INT64}

        def array(name: str, shape: tuple[int, ...]) -> np.ndarray:
            kind = ctypes.c_int64 if name in whole else ctypes.c_float
            return np.ctypeslib.as_array((kind * int(np.prod(shape))).from_address(addresses[name])).reshape(shape)

        def run(_: Any) -> None:
            knobs["enqueued"] += 1
            names = [v.name for v in session.get_outputs()]
            inputs = {v.name: array(v.name, shapes[v.name]).copy() for v in session.get_inputs()}
            for name, value in zip(names, session.run(names, inputs), strict=True):
                array(name, value.shape)[...] = value

        _alive.append(HOST_FUNCTION(run))
        return driver.cuLaunchHostFunc(ctypes.c_void_p(stream_handle), _alive[-1], None) == 0


class Runtime:
    __slots__ = ("engine_host_code_allowed", "logger")

    def __init__(self, logger: ILogger) -> None:
        self.logger = _kept(logger)

    def deserialize_cuda_engine(self, data: bytes) -> ICudaEngine | None:
        if not data.startswith(b"PLAN"):
            self.logger.log(ILogger.ERROR, "the magic tag does not match")
            return None
        made = json.loads(data[4:])
        if made["version"] != __version__:
            self.logger.log(ILogger.ERROR, f"the engine file is of version {made['version']}")
            return None
        if sum(engine._size for engine in loaded) + len(data) > knobs["room"]:
            self.logger.log(ILogger.ERROR, "Error Code 2: OutOfMemory (Requested size was 9000 bytes.)")
            return None
        deserialized.append(made["file"])
        return ICudaEngine(made, len(data))


class Refitter:
    __slots__ = ("_engine",)

    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self._engine = engine

    def refit_cuda_engine(self) -> bool:
        return self._engine._session is not None


class OnnxParserRefitter:
    __slots__ = ("_refitter",)

    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter = refitter

    def refit_from_file(self, model: str) -> bool:
        self._refitter._engine._take(os.path.realpath(model))
        return True
