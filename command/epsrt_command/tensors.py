"""Where precision is lost: two engines, or two precisions, compared tensor by tensor with Polygraphy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from epsrt.bundle import Bundle
from epsrt.engine import check_threads
from epsrt.engines import nvidia, probe
from epsrt.engines.gpu.trt_library import library
from epsrt.engines.signature import Signature
from epsrt.errors import EngineError, EpsrtError, InputError, one_line
from epsrt.manifest import StepGraph
from epsrt.parity.measure import LIMITS, relative_l2
from epsrt.parity.records import Network
from epsrt.plan import idle_row
from epsrt.types import Arrays, Float64, OnProgress
from epsrt_command.pairs import Pair, pairs

REFERENCE = "onnxruntime"  # the engine that all are compared with
ENGINES = ("tensorrt", "tensorrt-rtx", REFERENCE)  # that return any tensor of a graph
PRECISIONS = ("fp16", "int8", "fp32")  # the first of them that a bundle has is compared unasked


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor of the network, and how far its counterpart is from it.

    depth    its number among those compared, from 1, in the order in which they are computed
    figure   relative L2 in the worst state; None: not finite
    inputs   the largest figure, in that state, of what its node reads and was compared; None: there is none
    t        the timestep of that state
    The others are as epsrt_command.pairs.Pair has them.
    """

    depth: int
    tensor: str
    other: str
    node: str
    op: str
    module: str
    figure: float | None
    inputs: float | None
    t: int


class Comparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An engine in a precision, compared with onnxruntime in the precision `against`, in as many states.

    `unpaired` counts the reference's tensors that the other does not have, or does not return.
    """

    engine: str
    precision: str
    against: str
    limit: float
    states: int
    unpaired: int
    layers: tuple[Layer, ...]

    @property
    def over(self) -> list[Layer]:
        """The tensors over the limit, in the order in which they are computed."""
        return [layer for layer in self.layers if layer.figure is None or layer.figure > self.limit]


def compare(
    bundle: Bundle,
    engine: str = "auto",
    *,
    precision: str | None = None,
    against: str | None = None,
    limit: float | None = None,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> Comparison:
    """Compare the tensors of the plainest step graph, in the states of the ladder's rung "network", at batch 1.

    engine      one of ENGINES, or "auto": the first of them that runs here
    precision   of that engine; None: fp16, where the bundle has it
    against     the precision of onnxruntime, the reference; None: fp32, where the bundle has it
    limit       relative L2 of a tensor, > 0; None: that of a step in the parity ladder
    threads     of onnxruntime; None: as many as there are cores
    Where every tensor is an output, an engine fuses less than it does for `verify`.

    Raises InputError for arguments that fit neither the bundle nor each other, and EngineError where an engine or a
    library is missing or fails.
    """
    engine, precision, against = _chosen(bundle, engine, precision, against)
    if limit is None:
        limit = LIMITS[probe.info_of(engine).device, precision][0]
    elif not 0 < limit < math.inf:
        raise InputError(f"--limit {limit:g} is no relative L2: give a positive number such as 1e-3, or leave it out")
    check_threads(threads)
    graphs = bundle.graph(against), bundle.graph(precision)
    models = [_model(bundle, graph) for graph in graphs]
    made_of = against == precision or "int8" in (against, precision)  # an int8 graph is made of the FP32 one
    known = pairs(*(model.graph for model in models), same_names=made_of)
    found = [pair for pair in known if pair.other]
    mine, theirs = [pair.tensor for pair in found], [pair.other for pair in found]
    states = bundle.golden().network
    try:
        with silent():
            other = (
                _onnxruntime(bundle, graphs[1], threads, models[1], theirs)
                if engine == REFERENCE
                else _tensorrt(engine, bundle, graphs[1], theirs)
            )
            runners = [_onnxruntime(bundle, graphs[0], threads, models[0], mine), other]
            errors, whole = _errors(runners, found, _feeds(bundle, graphs[0], states), len(states.x), on_progress)
    except EpsrtError:
        raise
    except Exception as error:  # onnxruntime's and Polygraphy's exceptions share no public base class
        raise EngineError(f"{engine} does not return the tensors of {bundle.path}: {one_line(error)}") from None
    ts = np.round(bundle.manifest.timesteps(states.t))
    unpaired = sum(pair.tensor not in errors and pair.tensor not in whole for pair in known)
    return Comparison(engine, precision, against, limit, len(ts), unpaired, tuple(_layers(found, errors, ts)))


def _chosen(bundle: Bundle, engine: str, precision: str | None, against: str | None) -> tuple[str, str, str]:
    """The engine, its precision and the reference's, where they are known and differ."""
    if engine == "auto":
        engine = next((name for name in probe.available() if name in ENGINES), REFERENCE)
    known = probe.info_of(engine).precisions
    if engine not in ENGINES:
        raise InputError(f"engine {engine} returns what a graph does, not the tensors within: use {', '.join(ENGINES)}")
    have = dict.fromkeys(graph.precision for graph in bundle.manifest.graphs)
    against = against or next(p for p in ("fp32", *have) if p in have)
    others = [p for p in PRECISIONS if p in have and p in known and (engine, p) != (REFERENCE, against)]
    if precision is None and not others:
        raise InputError(
            f"{bundle.path} has {against} alone, and {REFERENCE} in {against} is the reference: export it with another "
            "precision too, or compare another engine"
        )
    precision = precision or others[0]
    if precision not in known:
        raise EngineError(f"engine {engine} runs in {' or '.join(known)}, not in {precision}: ask for another engine")
    if (engine, precision) == (REFERENCE, against):
        raise InputError(f"--precision {precision} of {REFERENCE} is the reference itself: name another, or --against")
    if {precision, against} == {"int8", "fp16"}:
        raise InputError("int8 and fp16 have no tensors' names in common: compare each with fp32")
    return engine, precision, against


def _model(bundle: Bundle, graph: StepGraph) -> Any:
    """A step graph as onnx has it, without its weights."""
    try:
        import onnx
        import polygraphy  # noqa: F401
    except ImportError as error:
        raise EngineError(f'comparing layers needs {error.name}: pip install "epsrt[debug]"') from None
    return onnx.load_from_string(bundle.graph_bytes(graph))


@contextmanager
def silent() -> Iterator[None]:
    """Polygraphy writes nothing on stdout: what goes wrong is raised as well."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        yield


def _onnxruntime(bundle: Bundle, graph: StepGraph, threads: int | None, model: Any, tensors: Sequence[str]) -> Any:
    """A runner on the CPU of a step graph, given as `model`, that returns these tensors."""
    from polygraphy.backend.onnx import ModifyOutputs
    from polygraphy.backend.onnxrt import OnnxrtRunner

    from epsrt.engines.ort_library import in_memory, ort, refuse_both_packages

    refuse_both_packages()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    shown = ModifyOutputs(model, outputs=list(tensors))().SerializeToString()
    with in_memory(options, bundle, graph):
        return OnnxrtRunner(ort.InferenceSession(shown, options, providers=["CPUExecutionProvider"]))


def _tensorrt(engine: str, bundle: Bundle, graph: StepGraph, tensors: Sequence[str]) -> Any:
    """A runner of a graph on TensorRT, or TensorRT-RTX: one of them in a process. It builds when it first runs."""
    nvidia.require_gpu()
    from polygraphy.backend.trt import CreateConfig, EngineFromNetwork, Profile, TrtRunner

    profile = Profile()
    for name, tensor in Signature.of(bundle, graph, 1, bundle.manifest.shape).inputs.items():
        profile.add(name, tensor.extents, tensor.extents, tensor.extents)
    with bundle.graph_file(graph) as file:
        network = tensorrt_network(engine, file, tensors)
    return TrtRunner(EngineFromNetwork(network, CreateConfig(profiles=[profile])))


def tensorrt_network(engine: str, file: Path, tensors: Sequence[str]) -> Any:
    """A step graph as TensorRT parses it, strongly typed, with those of the tensors as outputs that it has kept."""
    library(engine)
    from polygraphy import config

    config.USE_TENSORRT_RTX = engine == "tensorrt-rtx"  # read when polygraphy.backend.trt is first imported
    from polygraphy.backend.trt import ModifyNetworkOutputs, NetworkFromOnnxPath

    builder, network, parser = NetworkFromOnnxPath(str(file), strongly_typed=True)()
    kept = {layer.get_output(i).name for layer in network for i in range(layer.num_outputs)}
    return ModifyNetworkOutputs((builder, network, parser), outputs=[name for name in tensors if name in kept])()


def _feeds(bundle: Bundle, graph: StepGraph, states: Network) -> Iterator[Arrays]:
    """What the plainest step graph takes in each state, so that x' is the network's output."""
    inputs = Signature.of(bundle, graph, 1, bundle.manifest.shape).inputs
    columns = dict(zip(graph.columns, idle_row(graph.columns), strict=True))
    for x, t, label in zip(states.x, states.t, states.label, strict=True):
        row = list((columns | {"a": 0.0, "h": 1.0, "t": t}).values())
        feeds = {name: tensor.zeros() for name, tensor in inputs.items()}
        feeds["x"][0], feeds["rows"][0] = x, row
        if "label" in feeds:
            feeds["label"][0] = label
        yield feeds


def _errors(
    runners: Sequence[Any], found: Sequence[Pair], feeds: Iterator[Arrays], count: int, on_progress: OnProgress | None
) -> tuple[dict[str, list[float]], set[str]]:
    """Relative L2 of each tensor of floats in each of `count` states; and the tensors of other dtypes."""
    from polygraphy.comparator import Comparator

    errors, whole = defaultdict[str, list[float]](list), set[str]()
    with np.errstate(invalid="ignore"), closing(Comparator.run(runners, feeds, streaming=True)) as run:
        for done, results in enumerate(run, 1):
            mine, theirs = (iterations.pop() for iterations in results.values())
            for pair in found:
                truth = mine[pair.tensor]
                if truth.dtype.kind != "f":
                    whole.add(pair.tensor)
                elif pair.other in theirs and (value := theirs[pair.other]).shape == truth.shape:
                    errors[pair.tensor].append(relative_l2(value, truth))
            del mine, theirs  # before the next state's are computed
            if on_progress is not None:
                on_progress("layers", done / count)
    return errors, whole


def _layers(found: Sequence[Pair], errors: dict[str, list[float]], ts: Float64) -> Iterator[Layer]:
    compared = [pair for pair in found if pair.tensor in errors]
    for depth, pair in enumerate(compared, 1):
        each = errors[pair.tensor]
        worst = int(np.argmax(each))  # a NaN counts as the largest
        inputs = max((errors[name][worst] for name in pair.inputs if name in errors), default=None)
        yield Layer(
            depth,
            pair.tensor,
            pair.other,
            pair.node,
            pair.op,
            pair.module,
            _finite(each[worst]),
            None if inputs is None else _finite(inputs),
            int(ts[worst]),
        )


def _finite(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None
