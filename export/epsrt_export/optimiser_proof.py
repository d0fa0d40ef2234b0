"""That optimisation left a step graph as it was: measured at export, by onnxruntime on a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from torch import Tensor

from epsrt import noise
from epsrt.engines.ort_library import ERRORS, ort
from epsrt.errors import InputError, one_line
from epsrt.manifest import Rung
from epsrt.parity.measure import LIMITS, relative_l2
from epsrt.plan import idle_row
from epsrt.raised import foreign
from epsrt.types import Float32

_OUTPUTS = ("x_next", "x0")
_STATES = ("noise, zeros on its left", "zeros")
# each of two graphs in half precision may be 1e-3 from PyTorch
_LIMITS = {"fp32": LIMITS["cpu", "fp32"][0], "fp16": 2 * LIMITS["cpu", "fp16"][0]}
_FED = 1024  # bytes; larger weights are inputs of the session, which has no copy of them then
# what shows the network's output: x' = out, with exp(v/10)·z where the variance is learned; x0 = out
_ROW = {"a": 0.0, "h": 1.0, "q": 1.0, "w": 2.0, "s": 1.0, "j": 1.0, "r": 0.1}


class OptimiserProof:
    """The outputs of one step graph, kept while it is optimised.

    In two states, of which one is nothing but zeros: there a denominator is 0 but for what is added to it. Zeros
    magnify roundings too, so both graphs run on the same kernels, without onnxruntime's own optimisations.
    """

    def __init__(self, columns: Sequence[str], told: tuple[float, float]):
        """`told` are timesteps of the two states, as the network is told them."""
        self._columns, self._told = tuple(columns), told
        self._given: dict[str, np.ndarray] = {}
        self._outputs: list[Float32] = []
        self._fault: InputError | None = None

    def before(self, example: Mapping[str, Tensor], model: ir.Model) -> None:
        """Run a graph that is not optimised. `example` has a tensor [any, …] of each input's shape and dtype."""
        self._given = {name: _states(i, tensor) for i, (name, tensor) in enumerate(example.items())}
        row = dict(zip(self._columns, idle_row(self._columns).tolist(), strict=True))
        row |= {name: value for name, value in _ROW.items() if name in row} | {"d": float("r" in row)}
        self._given["rows"] = np.array([list((row | {"t": t}).values()) for t in self._told], np.float32)
        self._outputs = self._ran(model)

    def after(self, model: ir.Model) -> None:
        """Run the same graph, optimised."""
        self._after = self._ran(model)

    def _ran(self, model: ir.Model) -> list[Float32]:
        try:
            return _run(model, self._given)
        except InputError as error:  # kept: a graph of one batch alone is refused for that, in better words
            self._fault = error
            return []

    def rung(self, precision: str, stem: str) -> Rung:
        """Rung "optimisation": relative L2 of the outputs after it from those before, of the worse state.

        In half precision onnxruntime rounds where it puts casts, elsewhere in each graph, and zeros magnify that
        without bounds: there they need only be as finite as before. Raises InputError where a graph did not run.
        """
        if self._fault is not None:
            raise self._fault
        found = [max(_apart(a[i], b[i]) for a, b in zip(self._after, self._outputs, strict=True)) for i in (0, 1)]
        if precision == "fp16" and np.isfinite(found[1]):
            found.pop()
        worst = int(np.argmax(found))
        figure = found[worst] if np.isfinite(found[worst]) else None
        where = _STATES[worst] if figure is not None else f"{_STATES[worst]}, of which it made others not finite"
        return Rung(
            name="optimisation",
            engine="onnxruntime",
            precision=precision,  # type: ignore[arg-type]
            figure=figure,
            limit=_LIMITS[precision],
            unit="relative L2",
            where=where,
            graph=stem,
        )


def _states(i: int, like: Tensor) -> np.ndarray:
    """Two of an input: N(0, I), the first half of its last axis zeros, and zeros. Whole numbers are 0, masks true."""
    made = np.zeros((2, *like.shape[1:]), like.numpy().dtype)
    if like.is_floating_point():
        made[0] = noise.normals(0, 0, noise.FORWARD, i, made[0].size).reshape(made[0].shape)
        if made.ndim > 1:
            made[0, ..., : made.shape[-1] // 2] = 0
    return made if made.dtype != bool else ~made


def _run(model: ir.Model, given: Mapping[str, np.ndarray]) -> list[Float32]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.enable_mem_pattern, options.enable_cpu_mem_arena = 3, False, False
    weights, small = _without_weights(model)
    try:
        session = ort.InferenceSession(small, options, providers=["CPUExecutionProvider"])
        return [np.asarray(out) for out in session.run(list(_OUTPUTS), {**given, **weights})]
    except ERRORS as error:
        if foreign(error, "onnxruntime"):
            raise
        raise InputError(f"onnxruntime does not run the exported graph: {one_line(error)}") from error


def _without_weights(model: ir.Model) -> tuple[dict[str, np.ndarray], bytes]:
    """A graph's large initializers, and its bytes with inputs in their place; the graph is left as it was."""
    graph = model.graph
    inputs, initializers = list(graph.inputs), dict(graph.initializers)
    tensors = {name: value.const_value for name, value in initializers.items()}
    large = {name: t.numpy() for name, t in tensors.items() if t is not None and t.nbytes >= _FED}
    try:
        for name in large:
            graph.inputs.append(graph.initializers.pop(name))
        return large, ir.to_proto(model).SerializeToString()
    finally:
        del graph.inputs[len(inputs) :]
        graph.initializers.clear()
        graph.initializers.update(initializers)


def _apart(after: np.ndarray, before: np.ndarray) -> float:
    """Relative L2 of what is finite; infinite where other numbers are."""
    finite = np.isfinite(before)
    return relative_l2(after[finite], before[finite]) if np.array_equal(finite, np.isfinite(after)) else np.inf
