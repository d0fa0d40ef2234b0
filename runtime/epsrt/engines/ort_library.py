"""onnxruntime itself, and what both of its engines ask of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from epsrt.engines.libraries import errors_of, importing
from epsrt.engines.probe import both_onnxruntimes
from epsrt.engines.signature import FREE, Signature, Tensor
from epsrt.errors import EngineError

with importing("onnxruntime", "engine onnxruntime", 'pip install "epsrt[cpu]", or "epsrt[gpu]" for NVIDIA'):
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as bindings

__all__ = ["ERRORS", "check_signature", "ort", "refuse_both_packages"]

ERRORS = errors_of(bindings)  # its own share no base class but Exception; see epsrt.raised.foreign

DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64"}  # onnxruntime's words, and NumPy's


def refuse_both_packages() -> None:
    """Raise EngineError where onnxruntime and onnxruntime-gpu are both installed: together they are neither."""
    if sentence := both_onnxruntimes():
        raise EngineError(sentence)


def check_signature(session: Any, signature: Signature, file: Path) -> None:
    """Raise EngineError unless a session of a step graph's file takes and gives what the manifest implies."""
    found = {
        v.name: Tensor(DTYPES.get(v.type, v.type), tuple(d if isinstance(d, int) else FREE for d in v.shape))
        for v in [*session.get_inputs(), *session.get_outputs()]
    }
    signature.check(found, file, "export the bundle again")
