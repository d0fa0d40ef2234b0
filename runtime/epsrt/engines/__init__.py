"""Engines by name. Each lives in a module of its own, which alone imports its library."""

from __future__ import annotations

from collections.abc import Iterable

from epsrt.bundle import Bundle
from epsrt.engines.protocol import Engine, Lanes, Sample
from epsrt.errors import EngineError

__all__ = ["ENGINES", "Engine", "Lanes", "Sample", "open_engine"]

ENGINES = ("onnxruntime",)  # fastest first: "auto" takes the first that opens


def open_engine(
    bundle: Bundle,
    name: str = "auto",
    *,
    precision: str | None = None,
    features: Iterable[str] = (),
    threads: int | None = None,
) -> Engine:
    """Put a bundle on a device.

    `name` is one of ENGINES or "auto"; `precision` fp32 or fp16 (None: the engine's best); `features` what the step
    graph must have beyond the plain step; `threads` bounds a CPU engine's threads (None: all cores).
    Raises EngineError when the engine is unknown or cannot run here, BundleError when the bundle has no such graph.
    """
    if name not in ("auto", *ENGINES):
        raise EngineError(f"engine {name!r} is unknown: use auto or one of {', '.join(ENGINES)}")
    if precision not in (None, "fp32", "fp16"):
        raise EngineError(f"precision {precision!r} is unknown: use fp32 or fp16")
    from epsrt.engines.onnxruntime_cpu import OnnxRuntimeCpu  # imports onnxruntime

    return OnnxRuntimeCpu(bundle, precision or "fp32", features, threads)
