"""The stand-in for the CUDA driver is a judge of GPU code: these tests judge the judge."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu.stand_in.build import NoCompiler, build, environment
from helpers import run_python

pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")

KERNELS = """
// extern "C" __global__ void not_this_one(int i) {}
__device__ __forceinline__ float twice(float x) { return __fadd_rn(x, __fmul_rn(1.0f, x)); }

extern "C" __global__ void __launch_bounds__(256) saxpy(float a, const float* __restrict__ x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a * x[i] + y[i];
}
extern "C" __global__ void __launch_bounds__(128, 2) turn(const float4* x, float4* y, int n) {
  const int i = (blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float4 v = x[i];
  y[i] = make_float4(v.w, v.z, v.y, twice(v.x));
}
extern "C" __global__ void spill(float* y, int n) {
  for (int i = 0; i < n; ++i) y[i] = 1.0f;
}
extern "C" __global__ void nothing() {}
extern "C" __global__ void arithmetic(const float* x, float* out, unsigned a, unsigned long long b, int* flag) {
  sincospif(x[0], &out[0], &out[1]);
  out[2] = logf(x[1]);
  out[3] = sqrtf(x[1]);
  out[4] = isfinite(x[2]);
  reinterpret_cast<unsigned*>(out)[5] = __umulhi(a, static_cast<unsigned>(b >> 32));
  out[6] = atomicCAS(flag, -1, 7);
  out[7] = atomicCAS(flag, -1, 8);
}
"""

# What every program here starts with: the context is made and current after start().
PRELUDE = """
import ctypes, functools, os, threading
import numpy as np
from cuda.bindings import driver as cu

lib = ctypes.CDLL("libcuda.so.1")
for name in ("stand_in_launches", "stand_in_count", "stand_in_live", "stand_in_live_bytes"):
    getattr(lib, name).restype = ctypes.c_longlong

def ok(result):
    assert result[0] == cu.CUresult.CUDA_SUCCESS, result
    return result[1] if len(result) == 2 else result[1:]

def code(result):
    return int(result[0])

def start():
    ok(cu.cuInit(0))
    context = ok(cu.cuDevicePrimaryCtxRetain(ok(cu.cuDeviceGet(0))))
    ok(cu.cuCtxSetCurrent(context))
    return context

def seen(pointer, n, dtype=ctypes.c_float):
    return np.ctypeslib.as_array((dtype * n).from_address(int(pointer)))

def device(n):
    return ok(cu.cuMemAlloc(4 * n))

def pinned(n):
    return seen(ok(cu.cuMemHostAlloc(4 * n, 0)), n)

def stream(flags=1):
    return ok(cu.cuStreamCreate(flags))

@functools.cache
def kernel(name):
    return ok(cu.cuModuleGetFunction(ok(cu.cuModuleLoadData(b"an image")), name.encode()))

def launch(function, on, values, types, grid=1, block=128):
    return cu.cuLaunchKernel(function, grid, 1, 1, block, 1, 1, 0, on, (values, types), 0)

f32, i32, u32, u64, address = ctypes.c_float, ctypes.c_int, ctypes.c_uint, ctypes.c_ulonglong, ctypes.c_void_p

def saxpy(on, a, x, y, n):
    return launch(kernel("saxpy"), on, (a, int(x), int(y), n), (f32, address, address, i32), -(-n // 128))

def host_function(body):
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body)
    return function, ctypes.cast(function, ctypes.c_void_p).value

def begin(on, mode=1):  # thread-local
    ok(cu.cuStreamBeginCapture(on, cu.CUstreamCaptureMode(mode)))

def instantiate(graph):
    return ok(cu.cuGraphInstantiate(graph, 0))
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand_in")
    source = folder / "kernels.cu"
    source.write_text(KERNELS)
    try:
        return build(folder, [source])
    except NoCompiler as e:
        pytest.skip(str(e))


def run(library: Path, code: str, gpus: int = 1, env: dict[str, str] | None = None, **knobs: object) -> str:
    """Run code in a process whose CUDA driver is the stand-in, and return what it says on stderr."""
    done = run_python(PRELUDE + code, env=environment(library.parent, gpus, **knobs) | (env or {}))
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_copies_run_as_late_as_they_may(library: Path) -> None:
    run(
        library,
        """
start()
s, d, staging = stream(), device(4), pinned(4)
assert np.isnan(seen(d, 4)).all() and int(d) % 256 == 0
staging[:] = 1
ok(cu.cuMemcpyHtoDAsync(d, staging.ctypes.data, 16, s))
staging[:] = 2  # too early: the copy has not run
assert code(cu.cuStreamQuery(s)) == 600 and np.isnan(seen(d, 4)).all()
ok(cu.cuStreamSynchronize(s))
assert (seen(d, 4) == 2).all() and code(cu.cuStreamQuery(s)) == 0
pageable = np.full(4, 3, np.float32)
ok(cu.cuMemcpyHtoDAsync(d, pageable.ctypes.data, 16, s))
pageable[:] = 4  # the driver has read it
back = pinned(4)
back[:] = 0
ok(cu.cuMemcpyDtoHAsync(back.ctypes.data, d, 16, s))
assert (back == 0).all()
ok(cu.cuStreamSynchronize(s))
assert (back == 3).all()
ok(cu.cuMemsetD8Async(d, 0, 16, s))
ok(cu.cuMemcpyDtoH(back.ctypes.data, d, 16))  # on the legacy stream, which does not wait for s
assert (back == 3).all()
ok(cu.cuCtxSynchronize())
assert (seen(d, 4) == 0).all()
blocking = stream(0)
ok(cu.cuMemsetD32Async(d, 0x40000000, 4, blocking))
ok(cu.cuMemcpyDtoH(back.ctypes.data, d, 16))  # it does wait for a blocking one
assert (back == 2).all()
while code(cu.cuStreamQuery(s)):
    pass
ok(cu.cuMemsetD8Async(d, 0, 16, s))
while code(cu.cuStreamQuery(s)):  # a loop of queries comes to an end
    pass
assert (seen(d, 4) == 0).all()
ok(cu.cuMemsetD32Async(d, 0, 4, s))
ok(cu.cuStreamDestroy(s))
assert (seen(d, 4) == 0).all()
""",
    )


def test_kernels(library: Path) -> None:
    run(
        library,
        """
start()
s, n = stream(), 1000
x, y = device(n), device(n)
seen(x, n)[:] = np.arange(n)
seen(y, n)[:] = 1
ok(saxpy(s, 2.0, x, y, n))
assert lib.stand_in_launches(b"saxpy") == 0 and seen(y, n)[1] == 1
ok(cu.cuStreamSynchronize(s))
assert lib.stand_in_launches(b"saxpy") == 1 and (seen(y, n) == 2 * np.arange(n) + 1).all()

v, w = device(40), device(40)
seen(v, 40)[:] = np.arange(40)
turn = kernel("turn")
ok(cu.cuLaunchKernel(turn, 3, 2, 1, 2, 1, 1, 0, s, ((int(v), int(w), 10), (address, address, i32)), 0))
ok(cu.cuLaunchKernel(kernel("nothing"), 1, 1, 1, 1, 1, 1, 0, s, 0, 0))
ok(cu.cuStreamSynchronize(s))
want = np.arange(40, dtype=np.float32).reshape(10, 4)[:, ::-1] * [1, 1, 1, 2]
assert (seen(w, 40).reshape(10, 4) == want).all()

bounds = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK
assert ok(cu.cuFuncGetAttribute(bounds, turn)) == 128 and ok(cu.cuFuncGetAttribute(bounds, kernel("spill"))) == 1024
for grid, block in ((0, 1), (1, 0), (1, 129), (1, 1025), (1 << 31, 1)):
    assert code(launch(turn, s, (int(v), int(w), 10), (address, address, i32), grid, block)) == 1, (grid, block)
module = ok(cu.cuModuleLoadData(b"an image"))
assert code(cu.cuModuleGetFunction(module, b"not_this_one")) == 500
function = ok(cu.cuModuleGetFunction(module, b"nothing"))
ok(cu.cuModuleUnload(module))
assert code(cu.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, s, 0, 0)) == 400

out, flag = device(8), device(1)
ARITHMETIC = (address, address, u32, u64, address)
for value in (0.0, 0.5, 1.0, 1.5, -0.5, 7.25, 0.3, 123456.75):
    seen(x, 3)[:] = value, 10, np.inf
    seen(flag, 1, i32)[:] = -1
    ok(launch(kernel("arithmetic"), s, (int(x), int(out), 0x80000001, 6 << 32, int(flag)), ARITHMETIC, 1, 1))
    ok(cu.cuStreamSynchronize(s))
    pi = np.pi * np.float64(np.float32(value) % 2)
    exact = {0.0: 0, 0.5: 1, 1.0: 0, 1.5: -1, -0.5: -1}
    got = seen(out, 8)
    np.testing.assert_allclose(got[:5], [np.sin(pi), np.cos(pi), np.log(10), np.sqrt(10), 0], rtol=2e-7, atol=1e-9)
    assert got[0] == exact.get(value, got[0]) and not np.signbit(got[1:2][got[1:2] == 0]).any()
    assert got.view(np.uint32)[5] == (0x80000001 * 6) >> 32 and list(got[6:]) == [-1, 7]
    assert seen(flag, 1, i32)[0] == 7
""",
    )


def test_graphs(library: Path) -> None:
    run(
        library,
        """
start()
s, n = stream(), 4
x, y, staging = device(n), device(n), pinned(n)
calls = []
def call(data):
    calls.append((data, staging[0], threading.get_ident(), code(cu.cuCtxGetCurrent())))
keep, host = host_function(call)
ok(cu.cuMemsetD8Async(y, 0, 16, s))
kernel("saxpy")
begin(s)
pageable = np.ones(n, np.float32)
ok(cu.cuMemcpyHtoDAsync(x, pageable.ctypes.data, 16, s))
ok(saxpy(s, 2.0, x, y, n))
ok(cu.cuMemcpyDtoHAsync(staging.ctypes.data, y, 16, s))
ok(cu.cuLaunchHostFunc(s, host, 5))
assert ok(cu.cuStreamIsCapturing(s)) == cu.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
graph = ok(cu.cuStreamEndCapture(s))
assert ok(cu.cuStreamIsCapturing(s)) == cu.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
assert ok(cu.cuGraphGetNodes(graph))[1] == 4 and len(ok(cu.cuGraphGetNodes(graph, 4))[0]) == 4
executable = instantiate(graph)
ok(cu.cuGraphDestroy(graph))
ok(cu.cuGraphUpload(executable, s))
for i in range(3):
    ok(cu.cuGraphLaunch(executable, s))
    pageable[:] = 10  # in a graph, a pageable source is read when the graph runs
assert calls == [] and lib.stand_in_launches(b"saxpy") == 0
ok(cu.cuStreamSynchronize(s))
assert lib.stand_in_launches(b"saxpy") == 3 and lib.stand_in_count(b"cuGraphLaunch") == 3
assert [call[:2] for call in calls] == [(5, 20), (5, 40), (5, 60)], calls
assert all(thread != threading.get_ident() and error == 800 for _, _, thread, error in calls)

other = stream()  # launches of one executable graph follow one another, whatever the streams
ok(cu.cuGraphLaunch(executable, other))
ok(cu.cuGraphLaunch(executable, s))
ok(cu.cuStreamSynchronize(s))
assert len(calls) == 5 and code(cu.cuStreamQuery(other)) == 0
ok(cu.cuGraphLaunch(executable, s))
ok(cu.cuGraphExecDestroy(executable))
ok(cu.cuStreamSynchronize(s))
assert len(calls) == 6
assert [lib.stand_in_live(kind) for kind in (b"graphs", b"execs", b"streams", b"modules", b"host")] == [0, 0, 2, 1, 1]

begin(s)
event, back = ok(cu.cuEventCreate(2)), ok(cu.cuEventCreate(2))
ok(cu.cuEventRecord(event, s))
ok(cu.cuStreamWaitEvent(other, event, 0))  # a fork
ok(saxpy(other, 1.0, x, y, n))
ok(cu.cuEventRecord(back, other))
ok(cu.cuStreamWaitEvent(s, back, 0))  # and a join
graph = ok(cu.cuStreamEndCapture(s))
assert ok(cu.cuGraphGetNodes(graph))[1] == 1
assert code(cu.cuEventQuery(event)) == 907
""",
    )


def test_what_spoils_a_capture(library: Path) -> None:
    run(
        library,
        """
start()
s, other, x, y = stream(), stream(), device(4), device(4)
event, recorded, data = ok(cu.cuEventCreate(2)), ok(cu.cuEventCreate(2)), np.zeros(4, np.float32)
ok(cu.cuEventRecord(recorded, other))
kernel("saxpy")

def spoils(call, error, mode, at_end=901):
    begin(s, mode)
    ok(saxpy(s, 1.0, x, y, 4))
    assert code(call()) == error, (code(call()), error)
    assert code(saxpy(s, 1.0, x, y, 4)) == at_end
    result = cu.cuStreamEndCapture(s)
    assert (code(result), result[1] is None or int(result[1])) in ((at_end, True), (at_end, 0)), result
    ok(saxpy(s, 1.0, x, y, 4))
    ok(cu.cuStreamSynchronize(s))

def captured():
    ok(cu.cuEventRecord(event, s))
    return cu.cuEventSynchronize(event)

for mode in (0, 1, 2):
    spoils(lambda: cu.cuStreamSynchronize(s), 900, mode)
    spoils(lambda: cu.cuStreamQuery(s), 900, mode)
    spoils(lambda: cu.cuStreamDestroy(s), 900, mode)
    spoils(cu.cuCtxSynchronize, 900, mode)
    spoils(lambda: cu.cuStreamWaitEvent(s, recorded, 0), 905, mode)
    spoils(captured, 907, mode)
for mode in (0, 1):
    spoils(lambda: cu.cuMemAlloc(4), 900, mode)
    spoils(lambda: cu.cuMemFree(x), 900, mode)
    spoils(lambda: cu.cuMemHostAlloc(4, 0), 900, mode)
    spoils(lambda: cu.cuMemcpyHtoD(x, data.ctypes.data, 16), 900, mode)
    spoils(lambda: cu.cuMemcpyDtoH(data.ctypes.data, x, 16), 900, mode)
    spoils(lambda: cu.cuEventQuery(recorded), 900, mode)
    spoils(lambda: cu.cuModuleLoadData(b"an image"), 900, mode)

def elsewhere(call):
    results = []
    context = ok(cu.cuCtxGetCurrent())
    thread = threading.Thread(target=lambda: (ok(cu.cuCtxSetCurrent(context)), results.append(call())))
    thread.start()
    thread.join()
    return results[0]

spoils(lambda: elsewhere(lambda: cu.cuMemAlloc(4)), 900, 0)
for mode in (1, 2):
    begin(s, mode)
    ok(elsewhere(lambda: cu.cuMemFree(ok(cu.cuMemAlloc(4)))))
    ended = elsewhere(lambda: cu.cuStreamEndCapture(s))
    if mode == 1:
        assert code(ended) == 908
        ok(cu.cuStreamEndCapture(s))
ok(cu.cuStreamIsCapturing(s))

blocking = stream(0)
begin(blocking, 2)
assert code(cu.cuMemsetD8Async(x, 0, 16, 0)) == 906  # the legacy stream
assert code(cu.cuStreamEndCapture(blocking)) == 901

begin(s)
ok(cu.cuEventRecord(event, s))
ok(cu.cuStreamWaitEvent(other, event, 0))
ok(saxpy(other, 1.0, x, y, 4))
assert code(cu.cuStreamEndCapture(other)) == 903
assert code(cu.cuStreamEndCapture(s)) == 904  # never joined
assert code(cu.cuStreamEndCapture(s)) == 401
assert code(cu.cuStreamBeginCapture(0, cu.CUstreamCaptureMode(1))) == 900
begin(s)
assert code(cu.cuStreamBeginCapture(s, cu.CUstreamCaptureMode(1))) == 401
ok(cu.cuStreamEndCapture(s))
ok(cu.cuStreamSynchronize(s))
""",
    )


def test_streams_wait_for_events(library: Path) -> None:
    run(
        library,
        """
start()
a, b, x = stream(), stream(), device(1)
first, second = ok(cu.cuEventCreate(0)), ok(cu.cuEventCreate(0))
assert code(cu.cuEventQuery(first)) == 0 and code(cu.cuEventElapsedTime(first, second)) == 400
ok(cu.cuStreamWaitEvent(b, first, 0))  # never recorded: nothing to wait for
ok(cu.cuMemsetD32Async(x, 1, 1, a))
ok(cu.cuEventRecord(first, a))
ok(cu.cuMemsetD32Async(x, 2, 1, a))
ok(cu.cuStreamWaitEvent(b, first, 0))
ok(cu.cuEventRecord(second, b))
assert code(cu.cuEventQuery(second)) == 600 and code(cu.cuEventElapsedTime(first, second)) == 600
ok(cu.cuStreamSynchronize(b))
assert seen(x, 1, i32)[0] == 1  # a ran up to the event, and no further
assert code(cu.cuEventQuery(first)) == 0 and code(cu.cuStreamQuery(a)) == 600
assert ok(cu.cuEventElapsedTime(first, second)) >= 0
ok(cu.cuEventSynchronize(first))
assert seen(x, 1, i32)[0] == 1
ok(cu.cuEventRecord(first, a))
ok(cu.cuEventSynchronize(first))
assert seen(x, 1, i32)[0] == 2
untimed = ok(cu.cuEventCreate(2))
ok(cu.cuEventRecord(untimed, a))
ok(cu.cuStreamSynchronize(a))
assert code(cu.cuEventElapsedTime(untimed, second)) == 400
for event in (first, second, untimed):
    ok(cu.cuEventDestroy(event))
assert code(cu.cuEventQuery(first)) == 400 and lib.stand_in_live(b"events") == 0
""",
    )


def test_memory(library: Path) -> None:
    run(
        library,
        """
start()
s = stream()
assert ok(cu.cuDeviceTotalMem(0)) == 1 << 20
x = ok(cu.cuMemAlloc(1 << 19))
assert ok(cu.cuMemGetInfo()) == (1 << 19, 1 << 20) and lib.stand_in_live_bytes() == 1 << 19
assert code(cu.cuMemAlloc((1 << 19) + 1)) == 2 and code(cu.cuMemAlloc(0)) == 1
y = ok(cu.cuMemAlloc(1 << 19))
data = np.zeros(1 << 19, np.uint8)
for size, offset, error in ((1 << 19, 0, 0), ((1 << 19) + 1, 0, 1), (1 << 19, 1, 1), (16, -1, 1), (0, 0, 0)):
    at = int(x) + offset
    assert code(cu.cuMemcpyHtoDAsync(at, data.ctypes.data, size, s)) == error, (size, offset)
    assert code(cu.cuMemcpyDtoHAsync(data.ctypes.data, at, size, s)) == error, (size, offset)
    assert code(cu.cuMemcpyDtoDAsync(at, y, size, s)) == error, (size, offset)
    assert code(cu.cuMemsetD8Async(at, 0, size, s)) == error, (size, offset)
assert code(cu.cuMemsetD32Async(int(x) + 2, 0, 1, s)) == 1
assert code(cu.cuMemFree(int(x) + 256)) == 1
ok(cu.cuMemsetD8Async(y, 0, 4, s))
ok(cu.cuMemFree(x))
assert code(cu.cuStreamQuery(s)) == 0  # freeing waits for everything
assert code(cu.cuMemFree(x)) == 1 and code(cu.cuMemFree(0)) == 1
host = pinned(4)
assert np.isnan(host).all() and lib.stand_in_live(b"host") == 1
assert code(cu.cuMemFree(host.ctypes.data)) == 1
ok(cu.cuMemFreeHost(host.ctypes.data))
assert code(cu.cuMemFreeHost(data.ctypes.data)) == 1
ok(cu.cuMemFree(y))
assert lib.stand_in_live_bytes() == 0 and lib.stand_in_live(b"device") == 0
""",
        memory=1 << 20,
    )


@pytest.mark.parametrize(
    ("code", "error", "text"),
    [
        ('launch(kernel("turn"), s, (int(x) + 4, int(x), 4), (address, address, i32))', 716, "kernel turn: an access"),
        ('launch(kernel("spill"), s, (int(x), 65), (address, i32), 1, 1)', 700, "kernel spill wrote beside"),
        ("saxpy(s, 1.0, int(np.zeros(4).ctypes.data), x, 4)", 700, "kernel saxpy: a pointer leads to no memory"),
        ("freed(lambda y: saxpy(s, 1.0, y, x, 4))", 700, "kernel saxpy: a pointer leads to no memory"),
        ("freed(lambda y: cu.cuMemcpyDtoDAsync(x, y, 16, s))", 700, "a copy uses memory that was freed"),
        ("freed(lambda y: cu.cuMemsetD8Async(y, 0, 16, s))", 700, "a memset of freed memory"),
    ],
)
def test_a_fault_lasts(library: Path, code: str, error: int, text: str) -> None:
    said = run(
        library,
        f"""
start()
s, x, spare = stream(), device(64), device(1024)
def freed(call):  # a graph that outlives memory it uses
    kernel("saxpy")
    y = device(64)
    begin(s)
    ok(call(y))
    executable = instantiate(ok(cu.cuStreamEndCapture(s)))
    ok(cu.cuMemFree(y))
    return cu.cuGraphLaunch(executable, s)
ok({code})
assert code(cu.cuStreamSynchronize(s)) == {error}
for call in (cu.cuCtxSynchronize, lambda: cu.cuMemAlloc(4), lambda: cu.cuStreamCreate(1), lambda: cu.cuMemFree(x)):
    assert code(call()) == {error}
""",
    )
    assert text in said


def test_errors_before_work(library: Path) -> None:
    run(
        library,
        """
assert ok(cu.cuDriverGetVersion()) == 12080
assert code(cu.cuDeviceGetCount()) == 3 and code(cu.cuMemAlloc(4)) == 3 and code(cu.cuCtxGetCurrent()) == 3
ok(cu.cuInit(0))
assert ok(cu.cuDeviceGetCount()) == 2 and code(cu.cuDeviceGet(2)) == 101
A = cu.CUdevice_attribute
for attribute, value in (
    (A.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9), (A.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0),
    (A.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 16), (A.CU_DEVICE_ATTRIBUTE_INTEGRATED, 0),
):
    assert ok(cu.cuDeviceGetAttribute(attribute, 1)) == value
assert ok(cu.cuDeviceGetName(32, 0)).split(b"\\0")[0] == b"A name"
assert ok(cu.cuDeviceGetUuid(0)).bytes != ok(cu.cuDeviceGetUuid(1)).bytes
for call in (lambda: cu.cuMemAlloc(4), lambda: cu.cuStreamCreate(1), cu.cuCtxSynchronize, cu.cuMemGetInfo):
    assert code(call()) == 201
context, other = ok(cu.cuDevicePrimaryCtxRetain(0)), ok(cu.cuDevicePrimaryCtxRetain(1))
ok(cu.cuCtxSetCurrent(context))
assert int(ok(cu.cuCtxGetCurrent())) == int(context)
s, x = stream(), device(4)
def in_thread():
    errors.append((code(cu.cuMemAlloc(4)), int(ok(cu.cuCtxGetCurrent()))))
errors = []
thread = threading.Thread(target=in_thread)
thread.start()
thread.join()
assert errors == [(201, 0)]  # what is current is each thread's own
assert code(cu.cuStreamSynchronize(12345)) == 400
ok(cu.cuCtxSetCurrent(other))
assert code(cu.cuMemsetD8Async(x, 0, 16, s)) == 400  # a stream of another context
assert ok(cu.cuMemGetInfo())[0] == ok(cu.cuDeviceTotalMem(1))
ok(cu.cuMemFree(x))
ok(cu.cuCtxSetCurrent(context))
ok(cu.cuStreamDestroy(s))
assert code(cu.cuStreamDestroy(s)) == 400
ok(cu.cuDevicePrimaryCtxRelease(0))
assert code(cu.cuStreamCreate(1)) == 709 and code(cu.cuDevicePrimaryCtxRelease(0)) == 201
ok(cu.cuCtxSetCurrent(0))
for value, name, text in ((2, b"CUDA_ERROR_OUT_OF_MEMORY", b"out of memory"), (0, b"CUDA_SUCCESS", b"no error")):
    assert ok(cu.cuGetErrorName(cu.CUresult(value))) == name
    assert ok(cu.cuGetErrorString(cu.CUresult(value))) == text
""",
        gpus=2,
        driver=12080,
        capability="9.0",
        name="A name",
    )


@pytest.mark.parametrize(
    ("env", "error"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, 100),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 100),
        ({"EPSRT_STAND_IN_GPUS": "0"}, 100),
        ({"EPSRT_STAND_IN_INIT": "803"}, 803),
    ],
)
def test_no_gpu(library: Path, env: dict[str, str], error: int) -> None:
    run(library, f"assert code(cu.cuInit(0)) == {error} and code(cu.cuDeviceGetCount()) == 3", env=env)


def test_ctypes_alone_finds_it(library: Path) -> None:
    code = """
import ctypes
lib, n = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
assert lib.cuDriverGetVersion(ctypes.byref(n)) == 0 and n.value == 13000
assert lib.cuInit(0) == 0 and lib.cuDeviceGetCount(ctypes.byref(n)) == 0 and n.value == 1
"""
    done = run_python(code, env=environment(library.parent))
    assert done.returncode == 0, done.stderr


def test_failures_on_request(library: Path) -> None:
    run(
        library,
        """
start()
lib.stand_in_fail(b"cuMemAlloc_v2", 2, 2)
assert [code(cu.cuMemAlloc(4)) for i in range(3)] == [2, 2, 0]
assert lib.stand_in_count(b"cuMemAlloc_v2") == 3 and lib.stand_in_live(b"device") == 1
lib.stand_in_fail(b"cuStreamSynchronize", 1, 719)
s = stream()
assert [code(cu.cuStreamSynchronize(s)) for i in range(2)] == [719, 0]
""",
    )


def test_threads(library: Path) -> None:
    """Each with a stream and host functions, which need Python's lock while another thread waits in the driver."""
    run(
        library,
        """
context = start()
kernel("saxpy")
shared = ok(cu.cuEventCreate(2))
failures = []

def work(k):
    ok(cu.cuCtxSetCurrent(context))
    s, x, y, calls = stream(), device(64), device(64), []
    keep, host = host_function(lambda data: calls.append(seen(y, 64).copy()))
    seen(x, 64)[:] = k
    for i in range(30):
        ok(cu.cuMemsetD8Async(y, 0, 256, s))
        begin(s)
        ok(saxpy(s, 2.0, x, y, 64))
        ok(cu.cuLaunchHostFunc(s, host, 0))
        executable = instantiate(ok(cu.cuStreamEndCapture(s)))
        for _ in range(3):
            ok(cu.cuGraphLaunch(executable, s))
        ok(cu.cuEventRecord(shared, s))
        ok(cu.cuStreamWaitEvent(s, shared, 0))
        ok(cu.cuStreamSynchronize(s) if i % 3 else cu.cuMemFree(device(1)))
        ok(cu.cuGraphExecDestroy(executable))
        want = [np.full(64, 2 * k * j) for j in (1, 2, 3)]
        if not np.array_equal(calls[-3:], want):
            failures.append((k, i, calls[-3:]))
    ok(cu.cuStreamDestroy(s))

def guarded(k):
    try:
        work(k)
    except BaseException as e:
        failures.append(repr(e))

threads = [threading.Thread(target=guarded, args=(k,)) for k in range(1, 9)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures[:3]
assert lib.stand_in_launches(b"saxpy") == 8 * 30 * 3
""",
    )


def test_a_real_image_loads(library: Path) -> None:
    if run_python("from cuda.bindings import nvrtc; nvrtc.nvrtcVersion()").returncode:
        pytest.skip("needs nvidia-cuda-nvrtc")
    run(
        library,
        """
from cuda.bindings import nvrtc
start()
def done(result):
    assert int(result[0]) == 0, result
    return result[-1]
program = done(nvrtc.nvrtcCreateProgram(b'extern "C" __global__ void nothing() {}', b"nothing.cu", 0, [], []))
done(nvrtc.nvrtcCompileProgram(program, 1, [b"--gpu-architecture=sm_89"]))
image = b" " * done(nvrtc.nvrtcGetCUBINSize(program))
done(nvrtc.nvrtcGetCUBIN(program, image))
assert image[1:4] == b"ELF"
function = ok(cu.cuModuleGetFunction(ok(cu.cuModuleLoadData(image)), b"nothing"))
ok(cu.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0))
ok(cu.cuCtxSynchronize())
assert lib.stand_in_launches(b"nothing") == 1
""",
    )


def test_build_refuses(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "kernels.cu"
    for code, message in (
        ("__device__ int f() { return 1; }", "0 kernels"),
        ('__global__ void f() {}\nextern "C" __global__ void g() {}', "1 kernels"),
    ):
        source.write_text(code)
        with pytest.raises(ValueError, match=message):
            build(tmp_path, [source])
    source.write_text('extern "C" __global__ void f() { __syncthreads(); }')
    with pytest.raises(RuntimeError, match="__syncthreads"):
        build(tmp_path, [source])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoCompiler):
        build(tmp_path, [source])


def test_no_collection_runs_in_a_capture(on_stand_in) -> None:
    """It might free the memory of lanes that nobody closed, which breaks the capture."""
    on_stand_in(
        """
import gc
stream, seen = cuda.Stream(cuda.device()), []
def look(): seen.append(gc.isenabled())
def fail(): raise EngineError("this step fails")
stream.capture(look).close()
assert seen == [False] and gc.isenabled()
assert refused(stream.capture, fail) == "this step fails" and gc.isenabled()
gc.disable()
stream.capture(look).close()
assert not gc.isenabled()  # its owner had it off
stream.close()
"""
    )
