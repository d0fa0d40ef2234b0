"""That a step graph says the same in every dialect: measured at export, by onnxruntime on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import msgspec
import onnx

from epsrt.bundle import Bundle
from epsrt.engines.cpu.onnxruntime import OnnxRuntimeCpu
from epsrt.manifest import Rung, StepGraph
from epsrt.parity import rungs
from epsrt.parity.measure import Check, limits
from epsrt.types import OnProgress
from epsrt_export.dialects import in_standard


def dialect_rungs(bundle: Bundle, precision: str, tell: OnProgress) -> list[Rung]:
    """Rung "dialect NAME" of every file of a precision but the plain ones: its network's output against PyTorch's.

    Each runs on onnxruntime's CPU provider. Of com.microsoft.GroupNorm, for which that has no kernel, it runs what the
    operator is defined as; whether the GPU's kernel keeps to it, the engine's own proof tells. See epsrt.engines.proof.
    """
    golden, found = bundle.golden(), []
    graphs = [g for g in bundle.manifest.graphs if g.precision == precision]
    for i, graph in enumerate(graphs):
        for dialect in graph.files():
            if dialect == "cpu":
                continue
            with _runnable(bundle, graph, dialect) as plain, OnnxRuntimeCpu(bundle, plain) as engine:
                check = Check(f"dialect {dialect}", partial(rungs.network, engine, golden), limits(engine)[0])
                found.append(check.run(engine))
        tell("dialects", (i + 1) / len(graphs))
    return found


@contextmanager
def _runnable(bundle: Bundle, graph: StepGraph, dialect: str) -> Iterator[StepGraph]:
    """The step graph with a file in its place that a CPU runs, beside the weights for as long as it is needed."""
    file = graph.files()[dialect]
    model = onnx.load(bundle.path / file, load_external_data=False)
    beside = bundle.path / f"standard-{file}"
    try:
        beside.write_bytes(in_standard(model).SerializeToString())
        yield msgspec.structs.replace(graph, file=beside.name, dialects=msgspec.UNSET)
    finally:
        beside.unlink(missing_ok=True)
