"""The step graph, and parts, on onnxruntime's CPU provider."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from epsrt.bundle import Bundle
from epsrt.engine import Closing, check_batch, check_threads
from epsrt.engines.cpu.lanes import HostLanes, Run
from epsrt.engines.ort_library import ERRORS, check_signature, in_memory, ort, refuse_both_packages
from epsrt.engines.parts import Call, OpenPart, OpenParts
from epsrt.engines.signature import Signature
from epsrt.errors import EngineError, one_line
from epsrt.manifest import StepGraph
from epsrt.part import Part
from epsrt.raised import foreign
from epsrt.types import Arrays, Size


class OnnxRuntimeCpu(Closing):
    """Engine "onnxruntime"; see epsrt.engine.Engine."""

    name = "onnxruntime"
    batch_limit = "the bundle's largest"
    device = "cpu"

    def __init__(self, bundle: Bundle, graph: StepGraph, threads: int | None = None):
        refuse_both_packages()
        check_threads(threads)
        self.bundle, self.graph, self._threads = bundle, graph, threads
        self.session, self._parts = self._session(graph), OpenParts(bundle, graph.precision)
        self.precision: str = graph.precision
        self.columns = graph.columns
        self.max_batch = bundle.manifest.max_batch

    def lanes(self, batch: int, size: Size | None = None) -> HostLanes:
        """See epsrt.engine.Engine."""
        check_batch(batch, self)
        return HostLanes(self, batch, self.bundle.image_shape(size), self._bind)

    def on(self, graph: StepGraph) -> OnnxRuntimeCpu:
        """See epsrt.engine.Engine."""
        return OnnxRuntimeCpu(self.bundle, graph, self._threads)

    def part(self, name: str) -> OpenPart:
        """See epsrt.engine.Engine."""
        return self._parts.get(name, self._open_part)

    def close(self) -> None:
        """Close the parts. Sessions go with their objects."""
        self._parts.close()

    def _session(self, graph: StepGraph | Part) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors come as exceptions; warnings about fusions are nobody's news
        options.enable_mem_pattern = False  # a third less memory at batch 32, at 1 to 3 % of time
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        file = self.bundle.path / graph.file
        given: dict[str, Any] = {"providers": ["CPUExecutionProvider"], "enable_fallback": 0}
        with in_memory(options, self.bundle, graph) as model:
            try:
                session: Any = ort.InferenceSession(model, options, **given)
            except ERRORS as error:
                if foreign(error, "onnxruntime"):
                    raise
                raise EngineError(f"onnxruntime refuses {file}: {one_line(error)}; export the bundle again") from error
        check_signature(session, Signature.of(self.bundle, graph), file)
        return session

    def _open_part(self, name: str, part: Part) -> Call:
        return partial(_run, self._session(part), f"part {name} of {self.bundle.path}")

    def _bind(self, inputs: Arrays, outputs: Arrays) -> Run:
        return _bound(self.session, inputs, outputs, f"a step of {self.bundle.path}")


def _run(session: Any, what: str, given: Arrays, found: Arrays) -> None:
    """parts.Call: the outputs are the session's own arrays, for to bind others takes longer than to make them."""
    made = _ran(partial(session.run, list(found), given), what)
    for (name, wanted), array in zip(found.items(), made, strict=True):
        if array.shape != wanted.shape:
            raise EngineError(
                f"{what} gave {name} {list(array.shape)}, the manifest implies {list(wanted.shape)}: export it again"
            )
        found[name] = array


def _bound(session: Any, inputs: Arrays, outputs: Arrays, what: str) -> Run:
    """What runs a session on arrays that live as long as it; `what` it then runs, for a sentence."""
    binding: Any = session.io_binding()
    for arrays, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
        for name, array in arrays.items():
            bind(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)

    return partial(_ran, partial(session.run_with_iobinding, binding), what)


def _ran(run: Callable[[], Any], what: str) -> Any:
    try:
        return run()
    except ERRORS as error:
        if foreign(error, "onnxruntime"):
            raise
        raise EngineError(f"onnxruntime failed in {what}: {one_line(error)}") from error
