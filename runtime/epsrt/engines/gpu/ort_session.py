"""A session of onnxruntime's GPU package on the buffers of one lanes object.

Each lanes object has a session of its own, on its own stream, because a session's stream is settled when it is made.
The session has its own batch and size too: the shape arithmetic of free ones would run on the CPU, which no CUDA graph
can hold.

The lanes capture whole chunks of steps, in CUDA's thread-local mode. Where that fails, the CUDA provider records graphs
of its own, one a binding: one from x[0] to x[1], one back. In version 1.31 the first run of each graph in a thread then
runs the step twice, and captures in CUDA's global mode: an allocation in a thread that has not used cuda.Device would
break that capture. A replay is one launch, without a synchronisation when told so. The TensorRT provider records one
graph alone, whatever the binding, so there it records none.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np

from epsrt.bundle import Bundle
from epsrt.engines.gpu import cuda
from epsrt.engines.gpu.buffers import Buffers
from epsrt.engines.ort_library import ERRORS, check_signature, in_memory, ort
from epsrt.errors import EngineError, OutOfMemoryError, one_line
from epsrt.manifest import AXES, StepGraph
from epsrt.part import Part
from epsrt.raised import foreign

BATCH = "batch"  # what the export calls it, and by epsrt.manifest.AXES the free extents
MEMORY = re.compile("failed to allocate|out of memory|alloc_failed", re.I)  # how onnxruntime says that it lacks some

Providers = list[tuple[str, dict[str, str]]]  # names and their options, the first one first


class Session:
    """runner.Runner: onnxruntime on the buffers of one lanes object.

    graph      of the bundle, in the dialect that the session runs
    providers  the context in which a session of these providers may be made. The last one is CUDA's; the stream and
               "enable_cuda_graph" are set here
    needs      what the first provider needs, for the sentence where it does not run
    records    whether the provider can record CUDA graphs itself, where the lanes cannot

    Raises EngineError where the provider cannot run the graph: it never falls back to the CPU.
    """

    def __init__(
        self,
        device: cuda.Device,
        buffers: Buffers,
        stream: cuda.Stream,
        bundle: Bundle,
        graph: StepGraph,
        providers: Callable[[], AbstractContextManager[Providers]],
        needs: str,
        records: bool,
    ):
        self.capturable = True
        self._device, self._buffers, self._stream = device, buffers, stream
        self._bundle, self._graph, self._path = bundle, graph, bundle.path / graph.file
        self._sized = bundle.manifest.sizes is not None  # extents are free in the graph
        self._providers, self._needs, self._records = providers, needs, records
        self._session: Any = None
        self._bindings: dict[tuple[int, int], Any] = {}  # by now and the address of the rows
        self._options = [run_options(graph) for graph in ("1", "2")]  # 0 is onnxruntime's own
        self._ran = threading.local()  # .graphs: which of them ran in the calling thread, as each records its own
        self._failed = False
        self._row_bytes = buffers.signature.inputs["rows"].nbytes
        self._row = cuda.Memory(self._row_bytes, f"a batch of {buffers.width}")
        try:
            self._open(recording=False)
        except BaseException:
            self.close()
            raise

    def enqueue(self, now: int, rows: int) -> None:
        """See runner.Runner."""
        if self._failed:  # the graph that it recorded may be cut short, and replay without a word
            raise EngineError(f"onnxruntime failed in an earlier step of {self._path}: make new lanes")
        if (now, rows) not in self._bindings:
            self._stream.copy(self._row.pointer, rows, self._row_bytes)
            rows = self._row.pointer
        graphs: set[int] = self._ran.__dict__.setdefault("graphs", set())
        with nullcontext() if now in graphs else self._device.setup:  # no session is made beside a capture
            self._run(now, rows)
        graphs.add(now)

    def settle(self) -> None:
        """See runner.Runner. cuBLAS's and cuDNN's handles are a thread's own, and onnxruntime's memory grows."""
        if not self._ran.__dict__.get("graphs"):
            self.enqueue(0, self._buffers.slots[0])

    def without_capture(self) -> str:
        """See runner.Runner. The session may have been left in the middle of a step: another takes its place."""
        self.capturable = False
        self._stream.synchronize()  # earlier chunks may still run in the session's memory
        self._release()
        self._failed, self._ran = False, threading.local()
        self._open(recording=self._records)
        return "onnxruntime's own CUDA graphs are" if self._records else "steps are enqueued one by one, which is"

    def _run(self, now: int, rows: int) -> None:
        try:
            self._session.run_with_iobinding(self._bindings[now, rows], self._options[now])
            return
        except BaseException as error:
            self._failed = True
            if not isinstance(error, ERRORS) or foreign(error, "onnxruntime"):
                raise
            cause = error.with_traceback(None)  # whose frames hold the session
        raise failed(self._device, self._path, "failed in a step of", one_line(cause)) from cause

    def _open(self, recording: bool) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        width, shape = self._buffers.width, self._buffers.shape
        free = zip(AXES[len(shape) - 1], shape[1:], strict=True) if self._sized else ()
        for name, extent in ((BATCH, width), *free):
            options.add_free_dimension_override_by_name(name, extent)
        with self._providers() as providers, self._device.setup:  # in this order: the first may wait for a process
            for _, given in providers:
                given["user_compute_stream"] = str(self._stream.handle)
            providers[-1][1]["enable_cuda_graph"] = str(int(recording))
            self._session = make_session(self._device, options, providers, self._bundle, self._graph, self._needs)
        check_signature(self._session, self._buffers.signature, self._path)
        for now in (0, 1):
            # a graph of its own has one address, whatever is bound when it is replayed
            for at in (self._row.pointer, *(() if recording else self._buffers.slots)):
                self._bindings[now, at] = self._bind(now, at)

    def _bind(self, now: int, rows: int) -> Any:
        binding, takes = self._session.io_binding(), self._buffers.signature
        addresses = {**self._buffers.fixed, **self._buffers.sources(now, rows), **self._buffers.results(now)}
        for tensors, bind in ((takes.inputs, binding.bind_input), (takes.outputs, binding.bind_output)):
            for name, tensor in tensors.items():
                bind(name, "cuda", 0, np.dtype(tensor.dtype).type, list(tensor.extents), addresses[name])
        return binding

    def _release(self) -> None:
        with self._device.setup:
            self._bindings.clear()
            self._session = None

    def close(self) -> None:
        """Release the session and the buffer."""
        self._release()
        self._row.close()


def make_session(
    device: cuda.Device, options: Any, providers: Providers, bundle: Bundle, graph: StepGraph | Part, needs: str
) -> Any:
    """A session of a graph on the first of the providers; `needs` is what that needs, for the sentence."""
    wanted, path = providers[0][0], bundle.path / graph.file
    try:
        with in_memory(options, bundle, graph) as model:
            session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
        if session.get_providers()[:1] == [wanted]:
            return session
        reason, cause = f"it fell back to {session.get_providers()[0]}", None
    except ERRORS as error:
        if foreign(error, "onnxruntime"):
            raise
        reason, cause = one_line(error), error.with_traceback(None)
    raise failed(device, path, "cannot run", reason if MEMORY.search(reason) else reason + needs) from cause


def failed(device: cuda.Device, path: Path, what: str, reason: str) -> EngineError:
    """What to raise where onnxruntime failed in what it was given of a file."""
    kind, where = OutOfMemoryError if MEMORY.search(reason) else EngineError, str(path)
    with suppress(EngineError):  # where the GPU is lost, onnxruntime's words say more of it
        free, total = (n >> 20 for n in device.memory())
        where += f" ({free} of {total} MiB of the GPU are free)"
    return kind(f"onnxruntime {what} {where}: {reason}")


def run_options(graph: str) -> Any:
    """Of a run that does not wait for the device; `graph` numbers the CUDA graph that the session may record."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph)
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options
