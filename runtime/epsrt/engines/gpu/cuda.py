"""The GPU: memory, streams, CudaGraphs and our kernels, through CUDA's driver API (cuda-bindings).

The device is CUDA's number 0: CUDA_VISIBLE_DEVICES chooses it. Everything here belongs to its primary context, which
TensorRT and onnxruntime share. Resources are closed by whoever made them; a call that fails raises CudaError.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsrt.engines import nvidia
from epsrt.engines.gpu.kernels import compile_kernels
from epsrt.engines.libraries import importing
from epsrt.errors import EngineError, OutOfMemoryError
from epsrt.types import UInt8

INSTALL = 'pip install "epsrt[gpu]", "epsrt[tensorrt]" or "epsrt[tensorrt-rtx]"'
with importing("cuda.bindings", "an engine on the GPU", INSTALL):
    from cuda.bindings import driver as cu

THREADS, PER_THREAD = 256, 4  # of a block in kernels.cu; elements that a thread of `noise` and `begin` makes at once
BLOCKS = 65535  # of a lane, at most: CUDA's largest grid along y. Kernels stride over what more there is


class CudaError(EngineError):
    """A call of the driver failed; `code` is its CUresult."""

    def __init__(self, sentence: str, code: int = 0):  # 0 where it is unpickled, until its state comes
        super().__init__(sentence)
        self.code = code


def call(result: tuple[Any, ...]) -> Any:
    """The value of a driver call's (status, value …). Raises CudaError with the driver's own words."""
    status, *values = result
    if status != cu.CUresult.CUDA_SUCCESS:
        text = cu.cuGetErrorString(status)[1]
        words = text.decode() if text else "unknown error"
        raise CudaError(f"the GPU's driver reports {status.name}: {words}", int(status))
    return values[0] if len(values) == 1 else tuple(values)


_thread = threading.local()


class Device:
    """GPU 0 in this process: see `device`."""

    setup = threading.RLock()  # for libraries that neither open nor capture beside another thread's doing so

    def __init__(self) -> None:
        self.gpu = nvidia.require_gpu()
        call(cu.cuInit(0))
        self._context = call(cu.cuDevicePrimaryCtxRetain(call(cu.cuDeviceGet(0))))
        self.use()
        self._module = call(cu.cuModuleLoadData(compile_kernels(self.gpu.arch)))
        self.kernels = {
            name: call(cu.cuModuleGetFunction(self._module, name.encode())) for name in ("noise", "begin", "check")
        }

    def use(self) -> None:
        """Make the device current in the calling thread, as every call below wants it."""
        call(cu.cuCtxSetCurrent(self._context))
        if not getattr(_thread, "local", False):  # what it does must not break a capture in another thread
            call(cu.cuThreadExchangeStreamCaptureMode(cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
            _thread.local = True

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and in all."""
        free, total = call(cu.cuMemGetInfo())
        return int(free), int(total)


_device_lock = threading.Lock()


def device() -> Device:
    """The device, opened at the first call. Raises EngineError where there is none that serves."""
    with _device_lock:
        return _open()


_open = functools.cache(Device)


class Memory:
    """Bytes on the device, 256-byte-aligned, of unknown content. Close them once nothing uses them.

    Raises OutOfMemoryError that says what `purpose` asked for and what is free, where the memory does not suffice.
    """

    def __init__(self, size: int, purpose: str):
        self.size = max(size, 1)
        self.pointer = 0
        try:
            self.pointer = int(call(cu.cuMemAlloc(self.size)))
        except CudaError as error:
            if error.code != int(cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY):
                raise
            free, total = (n / 2**20 for n in call(cu.cuMemGetInfo()))
            raise OutOfMemoryError(
                f"{purpose} needs {self.size / 2**20:.1f} MiB more of the GPU's memory, and {free:.1f} of {total:.1f} "
                "MiB are free: take a smaller batch, or close other samplers and programs"
            ) from error

    def close(self) -> None:
        if self.pointer:
            call(cu.cuMemFree(self.pointer))
            self.pointer = 0


class Pinned:
    """Page-locked host memory as a NumPy array of bytes, valid until closed. Copies to and from it do not block."""

    def __init__(self, size: int):
        self._pointer = call(cu.cuMemHostAlloc(max(size, 1), 0))
        self.array: UInt8 = np.ctypeslib.as_array((ctypes.c_uint8 * max(size, 1)).from_address(int(self._pointer)))

    @property
    def size(self) -> int:
        return self.array.size

    def close(self) -> None:
        if self._pointer is not None:
            self.array = np.empty(0, np.uint8)
            call(cu.cuMemFreeHost(self._pointer))
            self._pointer = None


class _NoCollection:
    """Python's collector is off within, and on again after the last of the threads that are in it."""

    def __init__(self) -> None:
        self._lock, self._inside, self._was_on = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._was_on = gc.isenabled()
                gc.disable()
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._was_on:
                gc.enable()


_no_collection = _NoCollection()


class Stream:
    """A queue of work on the device. Work runs later, in the order in which it was given. `handle` is its address."""

    def __init__(self, device: Device):
        self._device = device
        self._stream = call(cu.cuStreamCreate(int(cu.CUstream_flags.CU_STREAM_NON_BLOCKING)))

    @property
    def handle(self) -> int:
        return int(self._stream)

    def synchronize(self) -> None:
        call(cu.cuStreamSynchronize(self._stream))

    def wait_for(self, other: Stream) -> None:
        """Let what is given from now on run after all that another stream was given before."""
        with closing(Event()) as mark:  # the driver keeps what it needs of it
            mark.record(other)
            call(cu.cuStreamWaitEvent(self._stream, mark._event, 0))

    def upload(self, to: int, source: NDArray[Any]) -> None:
        """Copy an array in pinned memory to the address `to`. The array must not change until an event says so."""
        call(cu.cuMemcpyHtoDAsync(to, source.ctypes.data, source.nbytes, self._stream))

    def download(self, to: NDArray[Any], source: int) -> None:
        """Fill an array in pinned memory from the address `source`, once the stream is synchronised."""
        call(cu.cuMemcpyDtoHAsync(to.ctypes.data, source, to.nbytes, self._stream))

    def zero(self, at: int, size: int) -> None:
        call(cu.cuMemsetD8Async(at, 0, size, self._stream))

    def copy(self, to: int, source: int, size: int) -> None:
        """Copy bytes on the device."""
        call(cu.cuMemcpyDtoDAsync(to, source, size, self._stream))

    def launch(self, kernel: str, lanes: int, elements: int, *arguments: Any) -> None:
        """Run a kernel of kernels.cu for `lanes` × `elements`; arguments are ctypes values."""
        blocks = min(-(-elements // (THREADS * PER_THREAD)), BLOCKS)
        values = tuple(a.value or 0 for a in arguments)  # of a null pointer it is None
        kinds = tuple(type(a) for a in arguments)
        function = self._device.kernels[kernel]
        call(cu.cuLaunchKernel(function, lanes, blocks, 1, THREADS, 1, 1, 0, self._stream, (values, kinds), 0))

    def capture(self, work: Callable[[], None]) -> CudaGraph:
        """Record what `work` gives to this stream, instead of running it. Raises EngineError when that fails."""
        mode = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        call(cu.cuStreamBeginCapture(self._stream, mode))
        try:
            with _no_collection:  # what it frees, a session's memory say, no capture allows
                work()
        except BaseException:
            status, half = cu.cuStreamEndCapture(self._stream)  # whatever it says: the stream must leave its capture
            if status == cu.CUresult.CUDA_SUCCESS:
                cu.cuGraphDestroy(half)
            raise
        recorded = call(cu.cuStreamEndCapture(self._stream))
        try:
            return CudaGraph(call(cu.cuGraphInstantiate(recorded, 0)))
        finally:
            call(cu.cuGraphDestroy(recorded))

    def replay(self, graph: CudaGraph) -> None:
        call(cu.cuGraphLaunch(graph.handle, self._stream))

    def close(self) -> None:
        if self._stream is not None:
            call(cu.cuStreamDestroy(self._stream))
            self._stream = None


class CudaGraph:
    """A captured graph: recorded work, ready to be replayed on a stream any number of times."""

    def __init__(self, handle: Any):
        self.handle = handle

    def close(self) -> None:
        if self.handle is not None:
            call(cu.cuGraphExecDestroy(self.handle))
            self.handle = None


class Event:
    """A mark in a stream that the host can wait for, or measure time between."""

    def __init__(self, timing: bool = False):
        flags = cu.CUevent_flags.CU_EVENT_DEFAULT if timing else cu.CUevent_flags.CU_EVENT_DISABLE_TIMING
        self._event = call(cu.cuEventCreate(int(flags)))

    def record(self, stream: Stream) -> None:
        call(cu.cuEventRecord(self._event, stream.handle))

    def synchronize(self) -> None:
        """Wait for the mark; at once where it was never recorded."""
        call(cu.cuEventSynchronize(self._event))

    def passed(self) -> bool:
        """Whether the mark was reached, or never recorded."""
        status = cu.cuEventQuery(self._event)
        if status[0] == cu.CUresult.CUDA_ERROR_NOT_READY:
            return False
        call(status)
        return True

    def since(self, begin: Event) -> float:
        """Milliseconds between two recorded marks, both timing."""
        return float(call(cu.cuEventElapsedTime(begin._event, self._event)))

    def close(self) -> None:
        if self._event is not None:
            call(cu.cuEventDestroy(self._event))
            self._event = None
