"""Which file of a step graph an engine runs: the one in its dialect, once the golden file has proven it here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec

from epsrt.bundle import Bundle
from epsrt.engine import Engine
from epsrt.engines.proof import Proof
from epsrt.errors import EngineError, OutOfMemoryError
from epsrt.manifest import StepGraph
from epsrt.parity.measure import told
from epsrt.types import OnProgress

# engine -> the dialect that it has the fastest kernels for; the others run the plain graph
DIALECTS = {
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt",
    "onnxruntime-tensorrt": "tensorrt",
    "onnxruntime-cuda": "cuda",
}

log = logging.getLogger("epsrt")


class Spoken(Engine, Protocol):
    """An engine that runs a dialect, and can prove it."""

    dialect: str  # of StepGraph.files

    def proof(self) -> Proof: ...


E = TypeVar("E", bound=Spoken)


def open_in_dialect(
    name: str,
    bundle: Bundle,
    graph: StepGraph,
    make: Callable[[str], E],
    *,
    may_build: bool = True,
    on_progress: OnProgress | None = None,
) -> E:
    """`make(dialect)` in the engine's own dialect, or in "cpu" where that is not available: one sentence says why.

    It is not available where the bundle was exported without it, the library cannot load it, the GPU's memory does not
    suffice to prove it, or it misses a rung of epsrt.verify. What is measured is kept. With may_build=False nothing is
    measured, and only a kept proof counts. A graph that is the same in both dialects runs as it is.
    """
    dialect = own_dialect(name, bundle, graph)
    engine = make(dialect)
    if dialect == "cpu":
        return engine
    try:
        reason = fault(engine.proof(), engine, on_progress, may_build)
    except OutOfMemoryError as error:  # of a batch that nobody may have asked for
        reason = f"the GPU's memory does not suffice to prove it: {error}"
    except BaseException:
        engine.close()
        raise
    if not reason:
        return engine
    engine.close()
    say_plain(name, graph, dialect, reason)
    return make("cpu")


def own_dialect(name: str, bundle: Bundle, graph: StepGraph) -> str:
    """The dialect of an engine, or "cpu" where the graph has no file in it; a sentence says so of an older export."""
    if graph.dialects is msgspec.UNSET:
        what = "%s was exported without the dialect of %s, which runs its plain graph: export it again for speed"
        log.warning(what, bundle.path.name, name)
    return DIALECTS[name] if DIALECTS[name] in graph.files() else "cpu"


def fault(proof: Proof, engine: Engine, on_progress: OnProgress | None, may_measure: bool = True) -> str:
    """Why an engine's dialect may not run here, a part of a sentence; "" where it is proven.

    Raises OutOfMemoryError: that says nothing of the dialect.
    """
    try:
        rungs = proof.of(engine, on_progress, may_measure)
    except OutOfMemoryError:
        raise
    except EngineError as error:
        return f"it cannot run there: {error}"
    if rungs is None:
        return "it is not proven, and cannot be now: open the engine once with may_build=True"
    missed = next((rung for rung in rungs if not rung.passed), None)
    return "" if missed is None else f"there it misses {told(missed)}"


def say_plain(name: str, graph: StepGraph, dialect: str, reason: str) -> None:
    """Warn that an engine runs the plain graph."""
    log.warning("%s runs %s, not its dialect %s: %s", name, graph.file, dialect, reason)
