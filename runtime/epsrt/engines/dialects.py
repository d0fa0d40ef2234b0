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
from epsrt.manifest import Rung, StepGraph
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
    """`make(dialect)` in the engine's own dialect, or in "cpu" where that is not to be had: one sentence says why.

    It is not to be had where the bundle was exported without it, the library cannot load it, or it misses a rung of
    epsrt.verify. What is measured is kept; with may_build=False nothing is measured, and only a kept proof counts.
    A graph that is the same in both dialects runs as it is.
    """
    dialect = DIALECTS[name]
    if graph.dialects is msgspec.UNSET:
        log.warning(
            "%s was exported without the dialect of %s, which runs its plain graph: export it again for speed",
            bundle.path.name,
            name,
        )
    if dialect not in graph.files():
        return make("cpu")
    engine = make(dialect)
    try:
        rungs = engine.proof().of(engine, on_progress, may_build)
    except OutOfMemoryError:
        engine.close()
        raise
    except EngineError as error:
        reason = f"it cannot run there: {error}"
    else:
        missed = next((rung for rung in rungs or () if not rung.passed), None)
        if rungs is not None and missed is None:
            return engine
        reason = "it is not proven yet, and may not be now" if missed is None else f"there it misses {told(missed)}"
    engine.close()
    log.warning("%s runs %s, not its dialect %s: %s", name, graph.file, dialect, reason)
    return make("cpu")


def told(rung: Rung) -> str:
    """A rung's name and figure, and what was allowed."""
    figure = "is not finite" if rung.figure is None else f"is {rung.figure:.3g} {rung.unit}"
    return f"{rung.name}, which {figure} ({'at least' if rung.at_least else 'at most'} {rung.limit:g} allowed)"
