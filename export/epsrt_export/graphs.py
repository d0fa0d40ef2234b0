"""A network's step graphs as files: one for each set of features, all on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import onnx
import torch
from torch import nn

from epsrt.errors import EpsrtError, InputError
from epsrt.manifest import LearnedVariance, Sizes, StepGraph, step_columns, step_features
from epsrt_export.onnx_graph import WeightsFile, to_onnx
from epsrt_export.onnx_passes import masked
from epsrt_export.precision import half_copy
from epsrt_export.stepgraph import DynamicThreshold, StepModule, check_network

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def variants_of(null_label: bool, masked: bool, classifier: bool) -> tuple[tuple[str, ...], ...]:
    """The features of each step graph that a bundle has, beside those of all its graphs."""
    guides: list[tuple[str, ...]] = [(), *([("guidance",)] if null_label else [])]
    guides += [("classifier",)] if classifier else []
    return (*guides, *((*features, "mask") for features in guides if masked))


def write_graphs(
    network: nn.Module,
    precision: str,
    directory: Path,
    shape: tuple[int, int, int],
    labelled: bool,
    opset: int = 21,
    variance: LearnedVariance | None = None,
    threshold: DynamicThreshold | None = None,
    sizes: Sizes | None = None,
    *,
    variants: Sequence[tuple[str, ...]] = ((),),
    null_label: int | None = None,
    gradient: nn.Module | None = None,
    on_graph: Callable[[float], object] = lambda share: None,
) -> list[StepGraph]:
    """Write step graphs of a network, and the one weights file that they share, into a directory.

    `variants` are the features of each, of guidance, classifier and mask; `gradient` is the classifier's. The rest is
    as in `export`.
    """
    dtype = DTYPES[precision]
    if dtype == torch.float16:
        network = half_copy(network)
        try:
            check_network(network, shape, labelled, dtype, variance is not None)
        except EpsrtError as error:
            raise InputError(f'in half precision, {error}; export with precisions=["fp32"] alone') from error
    weights, made = WeightsFile(f"weights-{precision}.bin"), []
    models: dict[tuple[str, ...], onnx.ModelProto] = {}  # without a mask, which is put on at the end
    for features in variants:
        bare = tuple(f for f in features if f != "mask")
        columns = step_columns(variance, bare)
        if bare not in models:
            guide = gradient if "classifier" in bare else None
            step = StepModule(network, columns, labelled, dtype, threshold, null_label, guide)
            models[bare] = to_onnx(step, shape, opset, weights, sizes)
        model = masked(models[bare], len(columns)) if "mask" in features else models[bare]
        all_features = (*step_features(variance, threshold), *features)
        graph = StepGraph("", weights.name, precision, step_columns(variance, features), all_features)  # type: ignore[arg-type]
        graph = msgspec.structs.replace(graph, file="-".join(filter(None, ("step", graph.stem, precision))) + ".onnx")
        (directory / graph.file).write_bytes(model.SerializeToString(deterministic=True))
        made.append(graph)
        on_graph(len(made) / len(variants))
    weights.write(directory)
    for graph in made:
        onnx.checker.check_model(directory / graph.file)
    return made
