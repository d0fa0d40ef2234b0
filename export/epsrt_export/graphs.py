"""A network's step graphs as files: one for each set of features and each dialect, all on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx
import torch
from torch import nn

from epsrt.condition import Condition
from epsrt.errors import EpsrtError, InputError
from epsrt.manifest import LearnedVariance, Rung, Sizes, StepGraph, step_columns, step_features
from epsrt.types import Shape
from epsrt_export import unlisted
from epsrt_export.dialects import in_dialects
from epsrt_export.onnx_graph import WeightsFile, to_onnx
from epsrt_export.onnx_passes import masked
from epsrt_export.optimiser_proof import OptimiserProof
from epsrt_export.precision import half_copy
from epsrt_export.stepgraph import DynamicThreshold, StepModule, check_network

FP32_ALONE = '--precision fp32 (precisions=["fp32"])'
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def variants_of(guided: bool, masked: bool, classifier: bool) -> tuple[tuple[str, ...], ...]:
    """The features of each step graph that a bundle has, beside those of all its graphs."""
    guides: list[tuple[str, ...]] = [(), *([("guidance",)] if guided else [])]
    guides += [("classifier",)] if classifier else []
    return (*guides, *((*features, "mask") for features in guides if masked))


@dataclass(frozen=True, eq=False)
class Recipe:
    """What the step graphs of a network are made of.

    network    in eval mode, float32, on the CPU
    shape      C, then the extents
    takes      what the network takes beside x and t, as in a manifest
    variance, threshold   as in Source
    gradient   of a classifier: see StepModule
    sizes      other extents that the graphs take
    variants   the features of each graph, of guidance, classifier and mask
    opset      of ONNX
    told       two timesteps, as the network is told them, at which the rung "optimisation" looks
    """

    network: nn.Module
    shape: Shape
    takes: Sequence[Condition] = ()
    variance: LearnedVariance | None = None
    threshold: DynamicThreshold | None = None
    gradient: nn.Module | None = None
    sizes: Sizes | None = None
    variants: Sequence[tuple[str, ...]] = ((),)
    opset: int = 21
    told: tuple[float, float] = (0.0, 0.0)


def write_graphs(
    recipe: Recipe,
    precision: str,
    directory: Path,
    on_graph: Callable[[float], object] = lambda share: None,
    on_rung: Callable[[Rung], object] | None = None,
) -> list[StepGraph]:
    """Write step graphs of a network, and the one weights file that they share, into a directory.

    `on_graph` is told after each which fraction is done. `on_rung` is given the rung "optimisation" of each without a
    mask, which is put on later; it is not measured for nobody. Raises InputError where the network does not compute in
    half precision.
    """
    r, dtype = recipe, DTYPES[precision]
    network = r.network if dtype == torch.float32 else _half(r)
    weights, made = WeightsFile(f"weights-{precision}.bin"), []
    spoken: dict[tuple[str, ...], dict[str, onnx.ModelProto]] = {}  # by dialect, without a mask: that is put on last
    for features in r.variants:
        bare = tuple(f for f in features if f != "mask")
        columns = step_columns(r.variance, bare)
        if bare not in spoken:
            guide = r.gradient if "classifier" in bare else None
            step = StepModule(network, columns, r.takes, dtype, r.threshold, guide)
            proof = None if on_rung is None else OptimiserProof(columns, r.told)
            spoken[bare] = in_dialects(to_onnx(step, r.shape, r.opset, weights, r.sizes, proof))
            if on_rung is not None and proof is not None:
                on_rung(proof.rung(precision, "-".join(bare)))
        all_features = (*step_features(r.variance, r.threshold), *features)
        graph = StepGraph("", weights.name, precision, step_columns(r.variance, features), all_features)  # type: ignore[arg-type]
        name = "-".join(filter(None, ("step", graph.stem, precision)))
        others = {dialect: f"{name}.{dialect}.onnx" for dialect in spoken[bare] if dialect != "cpu"}
        graph = msgspec.structs.replace(graph, file=f"{name}.onnx", dialects=others)
        for dialect, file in graph.files().items():
            model = spoken[bare][dialect]
            model = masked(model, len(columns)) if "mask" in features else model
            (directory / file).write_bytes(model.SerializeToString(deterministic=True))
        made.append(graph)
        on_graph(len(made) / len(r.variants))
    weights.write(directory)
    check_files(directory, made, type(r.network).__name__)
    return made


def check_files(directory: Path, graphs: Sequence[StepGraph], network: str) -> None:
    """Raise InputError where an engine would not be given a file that was written."""
    for graph in graphs:
        size = (directory / graph.weights).stat().st_size
        for dialect, file in graph.files().items():
            onnx.checker.check_model(directory / file)
            unlisted.check_file(directory / file, {graph.weights: size}, dialect, network)


def _half(recipe: Recipe) -> nn.Module:
    """A copy of the network in half precision, if it computes in it."""
    network = half_copy(recipe.network)
    try:
        check_network(network, recipe.shape, recipe.takes, torch.float16, recipe.variance is not None)
    except EpsrtError as error:
        raise InputError(f"in half precision, {error}; give {FP32_ALONE}") from error
    return network
