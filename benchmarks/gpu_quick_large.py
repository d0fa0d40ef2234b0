"""The part of gpu_quick.py about the large network's step: which dialect and which options make it fastest."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import CACHE
from gpu_rows import Notes, Row
from gpu_timing import bare_runs, median_ratio, rounds, spread, whole

from epsrt import Bundle, Engine, EngineError, open_engine
from epsrt.engines.gpu import cuda
from epsrt.engines.gpu.lanes import DeviceLanes
from epsrt.errors import BundleError
from epsrt.machine import nvidia_smi

ENGINE = "onnxruntime-cuda"
BATCHES = (64, 1, 256)  # the most telling first
SMALL = (2,)
MAX_BATCH = 256
METHODS = ("ddim", "ddpm")
STEPS, SECONDS = 50, 8.0  # of a trajectory; of all rounds together, about
BRIEF_STEPS, BRIEF_SECONDS = 20, 1.5  # where variants are compared, in DDIM alone


def batches(given: Row) -> tuple[int, ...]:
    return SMALL if given["small"] else BATCHES


def precisions(bundle: Bundle) -> list[str]:
    """Of a bundle, FP16 first."""
    return [p for p in ("fp16", "fp32") if any(g.precision == p for g in bundle.manifest.graphs)]


def found(given: Row) -> tuple[str, Bundle]:
    """The large network's name and bundle. Raises EngineError where it is not exported yet."""
    network = given["network"]
    if network.endswith(".epsrt"):
        return Path(network).stem, Bundle.open(network)
    try:
        return network, Bundle.open(CACHE / f"{network}-{MAX_BATCH}-fp32-fp16.epsrt")
    except BundleError as error:
        raise EngineError(f"{network} is not exported: {error}") from None


@dataclass(frozen=True)
class Variant:
    """onnxruntime's CUDA engine by every choice in it; another engine as it opens by itself.

    This is the one place that knows how the engine is told.

    bias    a convolution adds its bias itself (fuse_conv_bias)
    search  cudnn_conv_algo_search
    ours    our lanes capture the steps; else onnxruntime records graphs of its own
    """

    dialect: str = "cuda"
    nhwc: bool = True
    bias: bool = True
    search: str = "EXHAUSTIVE"
    ours: bool = True
    engine: str = ENGINE

    def __str__(self) -> str:
        if self.engine != ENGINE:
            return self.engine
        words = [self.dialect, "NHWC" if self.nhwc else "NCHW", *(["fused bias"] if self.bias else [])]
        words += [] if self.search == "EXHAUSTIVE" else [self.search]
        return " ".join([*words, *([] if self.ours else ["onnxruntime's graphs"])])

    def open(self, bundle: Bundle, precision: str) -> Engine:
        if self.engine != ENGINE:
            return open_engine(bundle, self.engine, precision=precision)
        from epsrt.engines.gpu.onnxruntime import OnnxRuntimeCuda

        options = {"fuse_conv_bias": str(int(self.bias)), "cudnn_conv_algo_search": self.search}
        graph = bundle.graph(precision)
        if self.dialect not in graph.files():
            raise EngineError(f"{bundle.path.name} has no dialect {self.dialect}: export it again")
        return OnnxRuntimeCuda(bundle, graph, ENGINE, self.dialect, options=options, nhwc=self.nhwc)

    def lanes(self, engine: Engine, batch: int) -> DeviceLanes:
        lanes: Any = engine.lanes(batch)
        if not self.ours:
            lanes.capturing = False
            lanes._runner.without_capture()
        return lanes  # type: ignore[no-any-return]


OWN = Variant()  # what the engine chooses by itself
PLAIN = Variant("cpu", nhwc=False, bias=False)
MAIN = (OWN, Variant(bias=False), Variant("cpu"), Variant("cpu", bias=False), PLAIN)
MORE = (
    Variant(search="HEURISTIC"),
    Variant("cpu", search="HEURISTIC"),
    *(replace(variant, ours=False) for variant in MAIN),
)


def variants(given: Row) -> None:
    """The bare step and our loop in each variant, then both samplers in full on the fastest."""
    notes, (network, bundle) = Notes(given), found(given)
    precision = precisions(bundle)[0]

    def brief(variant: Variant, batch: int) -> Row | None:
        key = about("variant", network, bundle, precision, variant, batch=batch)
        return notes.measure(key, lambda: course(bundle, precision, variant, batch, brief=True))

    for batch in batches(given):
        rows = {variant: brief(variant, batch) for variant in MAIN}
        took = {variant: row["bare_ms"]["p50"] for variant, row in rows.items() if row}
        if took:
            step(notes, network, bundle, precision, min(took, key=lambda variant: took[variant]), batch)
    for batch in batches(given):
        for variant in MORE:
            brief(variant, batch)


def step(notes: Notes, network: str, bundle: Bundle, precision: str, variant: Variant, batch: int) -> None:
    """A row "step": what whole trajectories cost over the bare engine."""
    key = about("step", network, bundle, precision, variant, batch=batch)
    notes.measure(key, lambda: course(bundle, precision, variant, batch))


def about(what: str, network: str, bundle: Bundle, precision: str, variant: Variant, **more: Any) -> Row:
    """A row's key."""
    key = {"what": what, "network": network, "precision": precision, "variant": str(variant), **more}
    return {**key, "digest": digest(bundle)}


def digest(bundle: Bundle) -> str:
    """What tells a bundle from others, in a row."""
    return bundle.manifest.digest[:16]


def course(bundle: Bundle, precision: str, variant: Variant, batch: int, brief: bool = False) -> Row:
    """Bare steps and whole trajectories in turn; the ratio is what our loop costs."""
    methods, steps, seconds = (METHODS[:1], BRIEF_STEPS, BRIEF_SECONDS) if brief else (METHODS, STEPS, SECONDS)
    begin, device = time.perf_counter(), cuda.device()
    free = device.memory()[0]
    with ExitStack() as stack:
        engine = stack.enter_context(variant.open(bundle, precision))
        lanes = stack.enter_context(variant.lanes(engine, batch))
        wholes = {method: whole(stack, lanes, engine, method, steps) for method in methods}
        for run in wholes.values():
            run()  # before the bare steps: what cannot be captured shows here
        opened, held = time.perf_counter() - begin, free - device.memory()[0]
        bares = bare_runs(stack, lanes, steps, {lanes._chunk} if brief else {lanes._chunk, steps})
        ms = rounds({**bares, **wholes}, 12, seconds=seconds)
        clocks = nvidia_smi("clocks.sm", "power.draw", "temperature.gpu")
    best = min(bares, key=lambda name: statistics.median(ms[name]))
    row: Row = {
        "steps": steps,
        "bare_ms": spread(ms[best]),
        "image_steps_per_s": round(1e3 * batch / statistics.median(ms[best]), 1),
        "steps_in_graph": best,
    }
    for method in methods:
        wall, on_device = (list(values) for values in zip(*ms[method], strict=True))
        ratio, wall_ratio = (median_ratio(values, ms[best], steps) for values in (on_device, wall))
        row[method] = {"ratio": ratio, "wall_ratio": wall_ratio, "wall_ms": spread(wall)}
    return {**row, "open_s": round(opened, 2), "held_mib": held >> 20, "clocks": clocks}
