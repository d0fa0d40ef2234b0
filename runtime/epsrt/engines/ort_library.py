"""onnxruntime itself, and what both of its engines ask of it."""

from __future__ import annotations

from typing import Any

from epsrt.bundle import Bundle
from epsrt.engines.probe import both_onnxruntimes
from epsrt.errors import EngineError
from epsrt.manifest import StepGraph
from epsrt.types import Shape

try:
    import onnxruntime as ort
except ImportError as error:
    raise EngineError(
        f'engine onnxruntime needs its library ({error}): pip install "epsrt[cpu]", or "epsrt[gpu]" for NVIDIA'
    ) from None

__all__ = ["check_signature", "ort", "refuse_both_packages"]


def refuse_both_packages() -> None:
    """Raise EngineError where onnxruntime and onnxruntime-gpu are both installed: together they are neither."""
    if sentence := both_onnxruntimes():
        raise EngineError(sentence)


def check_signature(
    session: Any, bundle: Bundle, graph: StepGraph, batch: int | None = None, shape: Shape | None = None
) -> None:
    """Raw pointers are bound, so inputs and outputs must be what the manifest says.

    batch, shape  None where they are free; of a shape C is not, nor are H and W in a bundle without sizes
    """
    m = bundle.manifest
    own: tuple[int | None, ...] = m.shape if m.sizes is None else (m.shape[0], None, None)
    image = [batch, *(own if shape is None else shape)]
    kinds = {
        "image": ("tensor(float)", image),
        "rows": ("tensor(float)", [batch, len(graph.columns)]),
        "label": ("tensor(int64)", [batch]),
    }
    want = {name: kinds[kind] for name, kind in bundle.inputs(graph).items()}
    want |= dict.fromkeys(("x_next", "m_next", "x0"), kinds["image"])
    have = {
        v.name: (v.type, [d if isinstance(d, int) else None for d in v.shape])
        for v in [*session.get_inputs(), *session.get_outputs()]
    }
    if have != want:
        name = next(k for k in [*want, *have] if have.get(k) != want.get(k))
        raise EngineError(
            f"{bundle.path / graph.file}: {name} is {have.get(name)}, the manifest implies {want.get(name)}: "
            "export the bundle again"
        )
