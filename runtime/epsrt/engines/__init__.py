"""Engines by name. Each lives in a module of its own, which alone imports its library."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from epsrt.bundle import Bundle
from epsrt.engines.protocol import Engine, Lanes, Sample
from epsrt.errors import EngineError

__all__ = ["ENGINES", "Engine", "Lanes", "Sample", "open_engine"]

# fastest first: "auto" takes the first that runs here
ENGINES = ("tensorrt", "tensorrt-rtx", "onnxruntime-tensorrt", "onnxruntime-cuda", "onnxruntime")


def open_engine(
    bundle: Bundle,
    name: str = "auto",
    *,
    precision: str | None = None,
    features: Iterable[str] = (),
    threads: int | None = None,
    trust_engines: bool = False,
    may_build: bool = True,
    on_progress: Callable[[str, float], object] | None = None,
) -> Engine:
    """Put a bundle on a device.

    name           one of ENGINES, or "auto": the fastest that this machine can run for this bundle
    precision      fp32 or fp16; None: fp16 on a GPU where the bundle has it, else fp32
    features       what the step graph must have beyond the plain step
    threads        bounds a CPU engine's threads (None: all cores)
    trust_engines  run TensorRT plans that came with the bundle: native code, so only from those whom you trust
    may_build      build a TensorRT plan where the cache has none that fits, which takes seconds to minutes, once;
                   `on_progress(phase, fraction)` is told how far it is. False: raise EngineError instead

    Raises EngineError when the engine is unknown or cannot run here, BundleError when the bundle has no such graph.
    """
    if name not in ("auto", *ENGINES):
        raise EngineError(f"engine {name!r} is unknown: use auto or one of {', '.join(ENGINES)}")
    if precision not in (None, "fp32", "fp16"):
        raise EngineError(f"precision {precision!r} is unknown: use fp32 or fp16")
    features = tuple(features)

    def open_one(name: str) -> Engine:
        graph = bundle.graph(precision or best_precision(bundle, name), features)
        if name == "onnxruntime":
            from epsrt.engines.onnxruntime_cpu import OnnxRuntimeCpu

            return OnnxRuntimeCpu(bundle, graph, threads)
        if threads is not None:
            raise EngineError(f"threads = {threads} is for a CPU engine, and {name} runs on the GPU: leave it out")
        if name.startswith("onnxruntime"):
            from epsrt.engines.onnxruntime_cuda import OnnxRuntimeCuda

            return OnnxRuntimeCuda(bundle, graph, name)
        from epsrt.engines.plans import open_plan

        return open_plan(name, bundle, graph, trust_engines=trust_engines, may_build=may_build, on_progress=on_progress)

    if name != "auto":
        return open_one(name)
    return _open_fastest(open_one, ENGINES if threads is None else ("onnxruntime",))


def _open_fastest(open_one: Callable[[str], Engine], only: Iterable[str]) -> Engine:
    import logging

    from epsrt.engines import probe

    refused = []
    for name in probe.available():
        if name in only:
            try:
                return open_one(name)
            except EngineError as error:
                refused.append(str(error))
                logging.getLogger("epsrt").warning("engine %s is passed over: %s", name, error)
    plainest = probe.state("onnxruntime")
    reason = "; ".join(refused) or f"onnxruntime: {plainest.reason}: {plainest.command}"
    raise EngineError(f'no engine runs here; {reason}; "epsrt doctor" tells of all')


def best_precision(bundle: Bundle, name: str) -> str:
    """What an engine runs a bundle in unless told: fp16 on a GPU where the bundle has it, else fp32."""
    has_half = any(g.precision == "fp16" for g in bundle.manifest.graphs)
    return "fp16" if has_half and name != "onnxruntime" else "fp32"
