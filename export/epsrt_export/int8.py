"""A bundle's step graphs with their convolutions in int8: static quantisation, calibrated along real trajectories.

Opt-in: it changes images, by how much its own rungs of the parity record say.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from epsrt import Bundle, Plan
from epsrt.condition import LABEL
from epsrt.engines import Engine, Sample, open_engine
from epsrt.engines.libraries import importing
from epsrt.errors import InputError
from epsrt.manifest import StepGraph
from epsrt.types import Arrays
from epsrt_export.graphs import check_files
from epsrt_export.onnx_graph import WeightsFile
from epsrt_export.onnx_passes import masked, strip

Feeds = dict[str, NDArray[Any]]

CALIBRATION_STEPS = 20  # of DDIM
CALIBRATION_SAMPLES = 20  # where an image has up to 1,024 values, fewer of larger ones
CALIBRATION_SEED = 1000  # neither the golden file's nor one that people take first
GUIDANCE = 2.0  # of every second sample that calibrates a guided graph


def write_int8(bundle: Bundle, on_graph: Callable[[float], object] = lambda share: None) -> list[StepGraph]:
    """Write int8 step graphs beside a bundle's FP32 ones, and the one weights file that they share.

    Not of graphs with a classifier: its gradient stays in FP32. Raises InputError where a graph cannot be quantised.
    """
    plain = [g for g in bundle.manifest.graphs if g.precision == "fp32" and "classifier" not in g.features]
    weights, made = WeightsFile("weights-int8.bin"), list[StepGraph]()
    models: dict[tuple[str, ...], onnx.ModelProto] = {}
    for graph in sorted(plain, key=lambda g: "mask" in g.features):
        bare = tuple(f for f in graph.features if f != "mask")
        if bare not in models:
            source = bundle.graph("fp32", bare)
            with closing(open_engine(bundle, "onnxruntime", precision="fp32", features=bare)) as engine:
                model = quantise(bundle.path / source.file, states_of(engine, *calibration(bundle)))
            strip(model)
            model.graph.ClearField("value_info")  # engines infer it
            shared = ir.from_proto(model)
            weights.take(shared)
            models[bare] = ir.to_proto(shared)
        columns = len(bundle.graph("fp32", bare).columns)
        model = masked(models[bare], columns) if "mask" in graph.features else models[bare]
        name = graph.file.replace("fp32", "int8")
        (bundle.path / name).write_bytes(model.SerializeToString(deterministic=True))
        made.append(StepGraph(name, weights.name, "int8", graph.columns, graph.features))
        on_graph(len(made) / len(plain))
    weights.write(bundle.path)
    check_files(bundle.path, made, bundle.manifest.provenance.network)
    return made


def calibration(bundle: Bundle) -> tuple[Plan, list[Arrays]]:
    """The plan of the trajectories that a bundle is calibrated on, and what each is given: all its classes in turn, and
    the golden file's values of the other conditions."""
    m, kept = bundle.manifest, bundle.golden().conditions
    n = min(m.max_batch, CALIBRATION_SAMPLES, max(4, CALIBRATION_SAMPLES * 1024 // int(np.prod(m.shape))))
    given = [{name: values[i % len(values)] for name, values in kept.items()} for i in range(n)]
    for i, each in enumerate(given if m.classes else ()):
        each[LABEL] = np.asarray(m.null_label if m.null_label is not None and 0 < i == n - 1 else i % m.classes)
    return bundle.plan("ddim", min(CALIBRATION_STEPS, m.schedule.T)), given


def states_of(engine: Engine, plan: Plan, given: Sequence[Arrays], seed: int = CALIBRATION_SEED) -> list[Feeds]:
    """What a step graph is fed along real trajectories: for each row of the plan, its inputs for len(given) samples.

    engine   runs a step graph with features of no image inputs but x, m and z
    given    the conditions of each sample by name, a label the network's own number; {} where it takes none
    Every second sample is guided, where the graph guides, against the golden file's values or the manifest's null. The
    registers m and z are zeros: no convolution sees them. Raises what the engine raises.
    """
    rows, n = np.repeat(plan.rows(engine.columns)[:, None], len(given), 1), len(given)
    m, graph, nulls, states = engine.bundle.manifest, engine.graph, Arrays(), list[Feeds]()
    if "w" in engine.columns:
        rows[:, 1::2, engine.columns.index("w")] = GUIDANCE
        nulls = {name: values[0] for name, values in engine.bundle.golden().nulls.items()}
    samples = [
        Sample(seed, i, (0.0, plan.start[1]), conditions=each, null_conditions=nulls) for i, each in enumerate(given)
    ]
    each_input = [sample.inputs(m, graph, m.shape) for sample in samples]
    more = {name: np.stack([inputs[name] for inputs in each_input]) for name in each_input[0]}
    with engine.lanes(n) as lanes:
        for i, sample in enumerate(samples):
            lanes.write(i, sample)
        for row in rows:
            x = np.stack([lanes.read(i) for i in range(n)])
            states.append({"x": x, "m": np.zeros_like(x), "z": np.zeros_like(x), "rows": row, **more})
            lanes.advance(row[None])
    return states


def quantise(graph: Path, states: Sequence[Feeds], *, ends: bool = False, outputs: bool = True) -> onnx.ModelProto:
    """A step graph whose convolutions compute in int8, as QuantizeLinear and DequantizeLinear around them (QDQ).

    graph    an FP32 step graph, its weights file beside it
    states   inputs to calibrate on: each tensor's range is from the least to the largest value that it takes there
    ends     quantise the first and the last convolution too, which see the image itself and make the prediction
    outputs  quantise what convolutions return: onnxruntime runs them in int8 only if so, OpenVINO either way
    Weights are int8, symmetric, a scale a channel; activations uint8, a scale and a zero point a tensor. All else
    stays FP32: the time embedding, norms, attention's products, the fused step. The model holds its weights.
    Raises InputError where no convolution is left to quantise, or there are no states.
    """
    # here, for its tools are no part of every onnxruntime, and the other precisions need none
    with importing("onnxruntime.quantization", "precision int8", 'pip install "epsrt[cpu]"'):
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class States(CalibrationDataReader):  # type: ignore[misc]
        """onnxruntime's reader of calibration data, of states in memory."""

        def __init__(self) -> None:
            self._left = iter(states)

        def get_next(self) -> Feeds | None:
            return next(self._left, None)

    nodes = onnx.load(graph, load_external_data=False).graph.node
    convolutions = [node.name for node in nodes if node.op_type == "Conv"]
    kept = [] if ends else [*convolutions[:1], *convolutions[-1:]]
    if set(convolutions) <= set(kept):
        raise InputError(f"{graph.name} has no convolution between its first and its last: int8 has nothing to gain")
    if not states:
        raise InputError(f"{graph.name} cannot be quantised without states to calibrate on: record a trajectory")
    more: dict[str, Any] = {"WeightSymmetric": True}
    if not outputs:
        more |= {"OpTypesToExcludeOutputQuantization": ["Conv"], "QuantizeBias": False}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        made = Path(folder) / graph.name
        quantize_static(
            str(graph),
            str(made),
            States(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=kept,
            extra_options=more,
        )
        return onnx.load(made)


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser advises a shape inference that step graphs do not need."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
