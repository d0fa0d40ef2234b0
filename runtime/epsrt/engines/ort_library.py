"""onnxruntime itself, and what both of its engines ask of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from epsrt.bundle import Bundle
from epsrt.engines.libraries import errors_of, importing
from epsrt.engines.probe import both_onnxruntimes
from epsrt.engines.signature import Signature, Tensor
from epsrt.errors import EngineError
from epsrt.manifest import StepGraph
from epsrt.part import FREE, Part

with importing("onnxruntime", "engine onnxruntime", 'pip install "epsrt[cpu]", or "epsrt[gpu]" for NVIDIA'):
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as bindings

__all__ = ["ERRORS", "check_signature", "in_memory", "ort", "refuse_both_packages"]

ERRORS = errors_of(bindings)  # its own share no base class but Exception; see epsrt.raised.foreign

DTYPES = {
    "tensor(float)": "float32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}  # onnxruntime's words, and NumPy's


def refuse_both_packages() -> None:
    """Raise EngineError where onnxruntime and onnxruntime-gpu are both installed: together they are neither."""
    if sentence := both_onnxruntimes():
        raise EngineError(sentence)


@contextmanager
def in_memory(options: Any, bundle: Bundle, graph: StepGraph | Part) -> Iterator[bytes]:
    """The bytes of a graph, while a session is made of them by these options, which are given the weights.

    onnxruntime would map a weights file that it reads by itself, and follow what becomes of it. Raises BundleError.
    """
    model, weights = bundle.graph_bytes(graph), bundle.contents.read(graph.weights)
    options.add_external_initializers_from_files_in_memory([graph.weights], [weights], [len(weights)])
    yield model


def check_signature(session: Any, signature: Signature, file: Path) -> None:
    """Raise EngineError unless a session of a step graph's file takes and gives what the manifest implies."""
    found = {
        v.name: Tensor(DTYPES.get(v.type, v.type), tuple(d if isinstance(d, int) else FREE for d in v.shape))
        for v in [*session.get_inputs(), *session.get_outputs()]
    }
    signature.check(found, file, "export the bundle again")
