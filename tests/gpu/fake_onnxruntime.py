"""onnxruntime's GPU package in small: the part of its API that epsrt uses, and onnxruntime's CPU for the work.

It runs on the stand-in driver: a session gives its stream a host function a step. sys.modules["onnxruntime"] = this;
sessions on the CPU are the real ones. What it does with CUDA graphs, fallback and options, 1.31.1 does too: that was
seen with its wheel on a CUDA that only takes notes, and what is said of TensorRT was read in its source.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from typing import Any

import numpy as np
import onnx
import onnxruntime as real
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

__version__ = real.__version__
RunOptions = real.RunOptions
CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"

knobs: dict[str, Any] = {
    "providers": [TENSORRT, CUDA, CPU],  # what the package was built for
    "loads": {TENSORRT, CUDA},  # whose libraries are there
    "falls_back": False,  # TensorRT takes no part of the graph
    "nhwc": True,  # whether a whole graph can run in that layout
    "seconds": {"0": 0.0, "1": 0.0},  # of a step, by prefer_nhwc
    "weights": 1 << 16,  # bytes that a session takes
    "arena": 1 << 20,  # bytes that the first run of a thread takes
    "captured": True,  # whether a caller's capture holds it
    "norms": True,  # whether com.microsoft.GroupNorm runs
    "norms_off_by": 0.0,  # how wrong it is
    "fail": "",  # the next run to fail: "eager", "captured" by the caller, or its own "capture" or "replay"
    "capture": 0.0,  # seconds that a capture takes
}
sessions: list[tuple[dict[str, dict[str, str]], Any]] = []  # providers and SessionOptions of each one opened
runs: list[tuple[int, str]] = []  # (gpu_graph_id, "eager", "captured", "capture" or "replay")
steps = [0]  # that have run on the stream
engines: list[str] = []  # what TensorRT loaded from its cache

OPTIONS = {
    CUDA: {
        "user_compute_stream", "enable_cuda_graph", "prefer_nhwc", "use_tf32", "cudnn_conv_algo_search",
        "fuse_conv_bias", "arena_extend_strategy",
    },
    TENSORRT: {
        "user_compute_stream", "trt_fp16_enable", "trt_cuda_graph_enable", "trt_engine_cache_enable",
        "trt_engine_cache_path", "trt_timing_cache_enable", "trt_timing_cache_path",
    },
}  # fmt: skip
NO_FALLBACK = (
    "[ONNXRuntimeError] : 1 : FAIL : This session contains graph nodes that are assigned to the default CPU EP, but "
    "fallback to CPU EP has been explicitly disabled by the user."
)
NO_CAPTURE = (
    "[ONNXRuntimeError] : 1 : FAIL : This session cannot use the graph capture feature as requested by the user  as "
    "all compute graph nodes have not been partitioned to the CUDAExecutionProvider"
)
HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
GLOBAL = 0  # CU_STREAM_CAPTURE_MODE_GLOBAL
OUT_OF_MEMORY = 2

_driver = ctypes.CDLL("libcuda.so.1")
_alive: list[Any] = []  # what streams and graphs may still call


def get_available_providers() -> list[str]:
    return knobs["providers"]


def preload_dlls() -> None:
    print("Failed to load libcurand.so.10: so it says, on stdout")


class SessionOptions(real.SessionOptions):
    def __init__(self) -> None:
        super().__init__()
        self.batch: dict[str, int] = {}
        self.weights: Any = ()

    def add_free_dimension_override_by_name(self, name: str, size: int) -> None:
        self.batch[name] = size
        super().add_free_dimension_override_by_name(name, size)

    def add_external_initializers_from_files_in_memory(self, *weights: Any) -> None:
        self.weights = weights
        super().add_external_initializers_from_files_in_memory(*weights)


def InferenceSession(data: Any, options: Any = None, *, providers: Any, enable_fallback: int = 1) -> Any:
    if providers == [CPU]:
        return real.InferenceSession(data, options, providers=providers)
    return GpuSession(data, options, dict(providers), bool(enable_fallback))


class GpuSession:
    def __init__(self, data: Any, options: SessionOptions, providers: Any, enable_fallback: bool) -> None:
        self._graphs: list[ctypes.c_void_p] = []  # of all threads
        self._memory: list[ctypes.c_uint64] = []
        self._of_thread = threading.local()  # .graphs: those that it recorded, by gpu_graph_id
        sessions.append((providers, options))
        strict = options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        if strict and CPU in providers:
            raise InvalidArgument("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Conflicting session configuration")
        plain = real.SessionOptions()
        plain.intra_op_num_threads = 1
        for name, size in options.batch.items():
            plain.add_free_dimension_override_by_name(name, size)
        plain.add_external_initializers_from_files_in_memory(*options.weights)
        self._session = real.InferenceSession(*_in_standard(data, plain), providers=[CPU])
        try:
            for name, given in providers.items():
                _check_options(name, given)
        except RuntimeError:
            if not enable_fallback:
                raise
            providers = {}
        if TENSORRT in providers and TENSORRT not in knobs["loads"]:
            raise RuntimeError("Please install TensorRT libraries as mentioned in the GPU requirements page")
        self._providers = [name for name in providers if name in knobs["loads"]]
        self._given = providers.get(self._providers[0]) if self._providers else {}
        if knobs["falls_back"] and TENSORRT in self._providers:
            self._providers.remove(TENSORRT)
        free = any(isinstance(d, str) for v in self._session.get_inputs() for d in v.shape)
        if strict and (not self._providers or free):
            raise Fail(NO_FALLBACK)
        nhwc = self._given.get("prefer_nhwc") == "1"
        if nhwc and (free or not knobs["nhwc"]):
            raise Fail(NO_CAPTURE if self._recording else NO_FALLBACK)
        self._seconds = knobs["seconds"][str(int(nhwc))]
        self._shapes = {v.name: v.shape for v in [*self._session.get_inputs(), *self._session.get_outputs()]}
        self._stream = ctypes.c_void_p(int(self._given["user_compute_stream"])) if self._providers else None
        if self._providers:
            _set_device()
            _check(_driver.cuStreamIsCapturing(self._stream, ctypes.byref(ctypes.c_int())))
            self._allocate(knobs["weights"], Fail, "[ONNXRuntimeError] : 1 : FAIL : Exception in initialization")
        if TENSORRT in self._providers:
            _load_or_build(self._given.get("trt_engine_cache_path"))

    @property
    def _recording(self) -> bool:
        return self._given.get("enable_cuda_graph") == "1" or self._given.get("trt_cuda_graph_enable") == "True"

    def get_providers(self) -> list[str]:
        return [*self._providers, CPU]

    def get_inputs(self) -> Any:
        return self._session.get_inputs()

    def get_outputs(self) -> Any:
        return self._session.get_outputs()

    def io_binding(self) -> Binding:
        return Binding(self)

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        assert binding.session is self
        assert set(binding.inputs) == {v.name for v in self.get_inputs()}, "an input is not bound"
        assert set(binding.outputs) == {v.name for v in self.get_outputs()}, "an output is not bound"
        if set(binding.inputs.values()) & set(binding.outputs.values()):
            raise Fail("an input and an output in one buffer: one node's output may be another's input yet")
        graph = int(options.get_run_config_entry("gpu_graph_id"))
        assert graph, "0 is onnxruntime's own"
        _set_device()
        self._run(binding.inputs | binding.outputs, 0 if TENSORRT in self._providers else graph)
        if options.get_run_config_entry("disable_synchronize_execution_providers") != "1":
            _check(_driver.cuStreamSynchronize(self._stream))

    def _run(self, addresses: dict[str, int], graph: int) -> None:
        if not self._of_thread.__dict__.setdefault("ran", False):  # handles and the arena
            self._allocate(knobs["arena"], RuntimeError, "Error in execution: Non-zero status code returned")
            self._of_thread.ran = True
        if not self._recording or graph == -1:
            self._eager(addresses, graph)
            return
        graphs = self._of_thread.__dict__.setdefault("graphs", {})
        if graph in graphs:
            self._fail_if("replay")
            runs.append((graph, "replay"))
            _check(_driver.cuGraphLaunch(graphs[graph], self._stream))  # whatever is bound now
            return
        for _ in range(2):
            self._eager(addresses, graph)
        graphs[graph] = ctypes.c_void_p()
        self._capture(addresses, graphs[graph])
        runs.append((graph, "capture"))
        _check(_driver.cuGraphLaunch(graphs[graph], self._stream))

    def _eager(self, addresses: dict[str, int], graph: int) -> None:
        capturing = ctypes.c_int()
        _check(_driver.cuStreamIsCapturing(self._stream, ctypes.byref(capturing)))
        self._fail_if("captured" if capturing.value else "eager")
        if capturing.value and not knobs["captured"]:
            raise RuntimeException("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : not permitted when capturing")
        runs.append((graph, "captured" if capturing.value else "eager"))
        self._give(addresses)

    def _capture(self, addresses: dict[str, int], executable: ctypes.c_void_p) -> None:
        recorded = ctypes.c_void_p()
        _check(_driver.cuStreamBeginCapture_v2(self._stream, GLOBAL))
        try:
            time.sleep(knobs["capture"])
            self._fail_if("capture")
            self._give(addresses)
        finally:  # a run that fails ends its capture, and keeps what there is of it
            _check(_driver.cuStreamEndCapture(self._stream, ctypes.byref(recorded)))
            _check(_driver.cuGraphInstantiateWithFlags(ctypes.byref(executable), recorded, ctypes.c_uint64(0)))
            _check(_driver.cuGraphDestroy(recorded))
            self._graphs.append(executable)

    def _give(self, addresses: dict[str, int]) -> None:
        _alive.append(HOST_FUNCTION(_step(self._session, addresses, self._shapes, self._seconds)))
        _check(_driver.cuLaunchHostFunc(self._stream, _alive[-1], None))

    def _fail_if(self, kind: str) -> None:
        if knobs["fail"] == kind:
            knobs["fail"] = ""
            raise RuntimeException("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : a node does not\nrun")

    def _allocate(self, size: int, error: type[Exception], where: str) -> None:
        memory = ctypes.c_uint64()
        if code := _driver.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(size)):
            if code == OUT_OF_MEMORY:
                raise error(f"{where}: Failed to allocate memory for requested buffer of size {size}")
            _check(code)
        self._memory.append(memory)

    def __del__(self) -> None:
        if self._memory or self._graphs:
            _set_device()
        for graph in self._graphs:
            _driver.cuGraphExecDestroy(graph)
        for memory in self._memory:
            _driver.cuMemFree_v2(memory)


class Binding:
    def __init__(self, session: GpuSession) -> None:
        self.session, self.inputs, self.outputs = session, {}, {}

    def bind_input(self, name: str, device: str, number: int, kind: Any, shape: list[int], address: int) -> None:
        self._bind(self.inputs, self.session.get_inputs(), name, device, number, kind, shape, address)

    def bind_output(self, name: str, device: str, number: int, kind: Any, shape: list[int], address: int) -> None:
        self._bind(self.outputs, self.session.get_outputs(), name, device, number, kind, shape, address)

    def _bind(
        self, bound: Any, known: Any, name: str, device: str, number: int, kind: Any, shape: Any, at: int
    ) -> None:
        value = next(v for v in known if v.name == name)
        assert (device, number) == ("cuda", 0)
        assert at % 256 == 0
        assert kind == {"tensor(float)": np.float32, "tensor(int64)": np.int64}[value.type]
        assert shape == value.shape, (name, shape, value.shape)
        bound[name] = at


def _in_standard(data: bytes, options: Any) -> tuple[Any, Any]:
    """What a session on the CPU takes: it has no kernel for com.microsoft.GroupNorm, whose formula is written out."""
    model = onnx.load_from_string(data)
    if not any(node.op_type == "GroupNorm" for node in model.graph.node):
        return data, options
    if not knobs["norms"]:
        raise Fail("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for GroupNorm(1) node")
    nodes = []
    for node in model.graph.node:
        nodes += _group_norm(node) if node.op_type == "GroupNorm" else [node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model.SerializeToString(), options


def _group_norm(node: Any) -> list[Any]:
    """Mean and variance over the pixels and the channels of a group, in float; x is [N, H, W, C]."""
    (x, gamma, beta), (y,) = node.input, node.output
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert given["channels_last"] == 1
    make, at = onnx.helper.make_node, lambda name: f"{y}.{name}"

    def constant(name: str, value: Any, dtype: Any) -> Any:
        return make("Constant", [], [at(name)], value=onnx.numpy_helper.from_array(np.array(value, dtype)))

    nodes = [
        constant("axes", [1, 3], np.int64),
        constant("epsilon", given["epsilon"] + knobs["norms_off_by"], np.float32),
        make("Cast", [x], [at("x")], to=onnx.TensorProto.FLOAT),
        make("Shape", [x], [at("shape")]),
        make("Shape", [x], [at("pixels")], start=1, end=3),
        make("Shape", [gamma], [at("channels")]),
        constant("groups", [given["groups"]], np.int64),
        make("Div", [at("channels"), at("groups")], [at("wide")]),
        make("ReduceProd", [at("pixels")], [at("many")], keepdims=1),
        constant("zero", [0], np.int64),
        make("Concat", [at("zero"), at("many"), at("groups"), at("wide")], [at("four")], axis=0),
        make("Reshape", [at("x"), at("four")], [at("parts")]),
        make("ReduceMean", [at("parts"), at("axes")], [at("mean")]),
        make("Sub", [at("parts"), at("mean")], [at("centred")]),
        make("Mul", [at("centred"), at("centred")], [at("squares")]),
        make("ReduceMean", [at("squares"), at("axes")], [at("variance")]),
        make("Add", [at("variance"), at("epsilon")], [at("safe")]),
        make("Sqrt", [at("safe")], [at("deviation")]),
        make("Div", [at("centred"), at("deviation")], [at("unit")]),
        make("Reshape", [at("unit"), at("shape")], [at("normed")]),
        make("Mul", [at("normed"), gamma], [at("scaled")]),
        make("Add", [at("scaled"), beta], [at("shifted")]),
    ]
    last = at("shifted")
    if given["activation"]:
        nodes += [make("Sigmoid", [last], [at("gate")]), make("Mul", [last, at("gate")], [at("silu")])]
        last = at("silu")
    return [*nodes, make("CastLike", [last, x], [y])]


def _step(session: Any, addresses: dict[str, int], shapes: dict[str, list[int]], seconds: float) -> Any:
    """What a stream calls; it does not hold the GpuSession."""

    whole = {v.name for v in session.get_inputs() if v.type == "tensor(int64)"}

    def array(name: str) -> np.ndarray:
        kind = ctypes.c_int64 if name in whole else ctypes.c_float
        size = int(np.prod(shapes[name]))
        return np.ctypeslib.as_array((kind * size).from_address(addresses[name])).reshape(shapes[name])

    def run(_: Any) -> None:
        steps[0] += 1
        time.sleep(seconds)
        names = [v.name for v in session.get_outputs()]
        inputs = {v.name: array(v.name).copy() for v in session.get_inputs()}
        for name, value in zip(names, session.run(names, inputs), strict=True):
            array(name)[...] = value

    return run


def _check_options(provider: str, given: dict[str, str]) -> None:
    for key, value in given.items():
        if key not in OPTIONS[provider]:
            raise RuntimeError(f"Unknown provider option: {key}")
        assert isinstance(value, str), f"{key} is no string"
        flag = key.startswith(("enable_", "prefer_", "use_")), key.startswith("trt_") and key.endswith("_enable")
        if (flag[0] and value not in ("0", "1")) or (flag[1] and value not in ("True", "False")):
            raise RuntimeError(f"The value for the key '{key}' should be another")


def _load_or_build(folder: str | None) -> None:
    """TensorRT's cache, as onnxruntime keeps it: whatever has the name is native code, and is run."""
    if folder is None:
        return
    engine = os.path.join(folder, "TensorrtExecutionProvider_TRTKernel_0_sm89.engine")
    if os.path.exists(engine):
        with open(engine) as file:
            engines.append(file.read())
        return
    with open(engine, "w") as file, open(os.path.join(folder, "TensorrtExecutionProvider_cache_sm89.timing"), "w"):
        file.write("built")


def _set_device() -> None:
    context = ctypes.c_void_p()
    _check(_driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0))
    _check(_driver.cuCtxSetCurrent(context))
    _check(_driver.cuDevicePrimaryCtxRelease_v2(0))  # epsrt holds it


def _check(code: int) -> None:
    if code:
        raise Fail(f"[ONNXRuntimeError] : 1 : FAIL : CUDA failure {code}")
