"""Engines by name. Each has a module of its own, the only one that imports its library."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from epsrt.bundle import Bundle
from epsrt.engine import Engine, Lanes, Sample
from epsrt.errors import EngineError, InputError

__all__ = ["ENGINES", "Engine", "Lanes", "Sample", "open_engine"]

# fastest first: "auto" takes the first that runs here
ENGINES = ("tensorrt", "tensorrt-rtx", "onnxruntime-tensorrt", "onnxruntime-cuda", "openvino", "onnxruntime")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


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
    precision      one of PRECISIONS; int8 is never taken unasked. None: fp16 on a GPU where the bundle has it; on
                   openvino bf16 where the processor computes in it and the bundle's golden file proves it; else fp32,
                   or fp16 where the bundle has that alone
    features       what the step graph must have beyond the plain step
    threads        the most threads that a CPU engine uses; None: as many as there are cores
    trust_engines  use what came with the bundle in engines/: TensorRT's engine files, OpenVINO's compiled models and
                   proofs of both. It is native code, so say it only of those whom you trust
    may_build      build a TensorRT engine file for each batch that lanes are asked for and that none there holds, prove
                   bf16, or prove the dialect that a GPU engine runs fastest. Each takes seconds to minutes, once;
                   `on_progress(phase, fraction)` is told how far it is. False: raise EngineError instead, run in fp32,
                   or run the plain graph; but an engine file of TensorRT that is there is proven all the same

    Raises InputError for an unknown engine or precision, EngineError when the engine cannot run here, BundleError when
    the bundle has no such graph.
    """
    if name not in ("auto", *ENGINES):
        raise InputError(f"engine {name!r} is unknown: use auto or one of {', '.join(ENGINES)}")
    if precision not in (None, *PRECISIONS):
        raise InputError(f"precision {precision!r} is unknown: use one of {', '.join(PRECISIONS)}")
    from epsrt.engines import probe  # which looks about: importing epsrt does not

    features = tuple(features)

    def open_one(name: str) -> Engine:
        known = probe.info_of(name).precisions
        if precision not in (None, *known):
            raise EngineError(f"engine {name} runs in {' or '.join(known)}, not in {precision}: ask for another engine")
        graph = bundle.graph(graph_precision(bundle, name, precision), features)
        if name == "openvino":
            from epsrt.engines.cpu.openvino import open_openvino

            return open_openvino(
                bundle,
                graph,
                precision,
                threads,
                trust_engines=trust_engines,
                may_build=may_build,
                on_progress=on_progress,
            )
        if name == "onnxruntime":
            from epsrt.engines.cpu.onnxruntime import OnnxRuntimeCpu

            return OnnxRuntimeCpu(bundle, graph, threads)
        if threads is not None:
            raise EngineError(f"threads = {threads} is for a CPU engine, and {name} runs on the GPU: leave it out")
        if name.startswith("onnxruntime"):
            from epsrt.engines.gpu.onnxruntime import open_onnxruntime

            return open_onnxruntime(
                bundle, graph, name, trust_engines=trust_engines, may_build=may_build, on_progress=on_progress
            )
        from epsrt.engines.gpu.tensorrt import open_tensorrt

        return open_tensorrt(
            name, bundle, graph, trust_engines=trust_engines, may_build=may_build, on_progress=on_progress
        )

    if name != "auto":
        return open_one(name)
    refused = []
    for each in probe.available():
        info = probe.info_of(each)
        if threads is not None and info.device != "cpu":
            continue
        if precision is None and default_precision(bundle, each) is None:
            continue
        try:
            return open_one(each)
        except EngineError as error:
            refused.append(str(error))
            if precision in (None, *info.precisions):
                logging.getLogger("epsrt").warning("engine %s is passed over: %s", each, error)
    plainest = probe.state("onnxruntime")
    reason = "; ".join(refused) or f"onnxruntime: {plainest.reason}: {plainest.command}"
    raise EngineError(f'no engine runs here; {reason}; "epsrt doctor" tells of all')


def graph_precision(bundle: Bundle, name: str, precision: str | None = None) -> str:
    """The precision of the step graph that an engine runs: see open_engine. Raises EngineError where there is none."""
    if precision is not None:
        return graph_precision_of(precision)
    found = default_precision(bundle, name)
    if found is None:
        have = dict.fromkeys(g.precision for g in bundle.manifest.graphs)
        way = f"ask for {' or '.join(also)}" if (also := runnable(bundle, name)) else "take engine onnxruntime"
        raise EngineError(
            f"{bundle.path.name} has step graphs in {' and '.join(have)} alone, which engine {name} does not take "
            f"unasked: {way}, or export it again with fp32"
        )
    return found


def default_precision(bundle: Bundle, name: str) -> str | None:
    """fp16 on a GPU and fp32 on a CPU, or the other where the bundle has that alone; None: the engine runs neither."""
    from epsrt.engines import probe

    order = ("fp16", "fp32") if probe.info_of(name).device == "cuda" else ("fp32", "fp16")
    return next((each for each in order if each in runnable(bundle, name)), None)


def graph_precision_of(precision: str) -> str:
    """The precision of the step graph for a precision of an engine: bf16 is computed from the FP32 graph."""
    return "fp32" if precision == "bf16" else precision


def runnable(bundle: Bundle, name: str = "auto") -> list[str]:
    """The precisions of a bundle's step graphs that an engine runs; "auto": that any engine here runs."""
    from epsrt.engines import probe

    names = [name] if name != "auto" else list(probe.available())
    known = {p for each in names for p in probe.info_of(each).precisions}
    return [p for p in dict.fromkeys(g.precision for g in bundle.manifest.graphs) if p in known]
