"""What an export is given: checked, and as the rest of it takes it."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from epsrt.errors import InputError, typed
from epsrt.manifest import Sizes
from epsrt_export.families import checkpoint as own
from epsrt_export.graphs import DTYPES
from epsrt_export.source import NoisedClassifier, Source
from epsrt_trainer.checkpoint import Checkpoint

PRECISIONS = (*DTYPES, "int8")
Extents = tuple[int | tuple[int, ...], int | tuple[int, ...]]  # multiple and largest: of all axes, or one of each


def source_of(given: Source | Checkpoint | str | Path, thresholding: tuple[float, float] | None) -> Source:
    """What is exported, with another thresholding where one is given."""
    if isinstance(given, Source):
        source = given
    elif isinstance(given, Checkpoint):
        source = own.of(given)
    elif isinstance(given, (str, Path)):
        source = own.load(given)
    else:
        raise InputError(f"a {type(given).__name__} is no Source and no path: see families.load, or export_network")
    return source if thresholding is None else dataclasses.replace(source, thresholding=thresholding)


def sizes_of(given: Extents | None) -> Sizes | None:
    """(multiple, largest) as a manifest has it."""
    if given is None:
        return None
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise InputError(f"sizes = {given!r} is not (multiple, largest), such as (8, 64)")
    each = [tuple(typed("sizes", n, 1) for n in (of if isinstance(of, (tuple, list)) else (of,))) for of in given]
    if not all(each):
        raise InputError(f"sizes = {given!r} has no number for any axis: give (multiple, largest), such as (8, 64)")
    return Sizes(*(n if isinstance(of, (tuple, list)) else n[0] for n, of in zip(each, given, strict=True)))


def largest_batch(given: int | None, source: Source, sizes: Sizes | None) -> int:
    """`max_batch`, or where it is None 64, and fewer where samples may exceed 64 × 64 pixels."""
    if given is None:
        axes = [] if sizes is None else sizes.axes(len(source.shape) - 1)
        pixels = math.prod(most for _, most in axes) if axes else math.prod(source.shape[1:])
        return max(1, min(64, 64**3 // max(1, pixels)))
    max_batch: int = typed("max_batch", given, 1)
    if not 1 <= max_batch <= 65536:
        raise InputError(f"max_batch = {max_batch} is outside 1 … 65536")
    return max_batch


def check_choices(source: Source, precisions: Sequence[str], sizes: Sizes | None, classifier: bool) -> None:
    """Raise InputError for precisions that there are not, and for features that exclude each other."""
    words = list(precisions) if isinstance(precisions, Sequence) else [precisions]
    if not words or any(word not in PRECISIONS for word in words) or len(set(words)) != len(words):
        raise InputError(f"precisions = {words}: choose from {', '.join(PRECISIONS)}, each once")
    if "int8" in words and "fp32" not in words:
        raise InputError(f"precisions = {words}: int8 is made from the FP32 step graphs: add fp32")
    if sizes is not None and source.thresholding is not None:
        raise InputError(
            "sizes and thresholding exclude each other: its quantile is found among a number of values that the graph "
            "fixes: leave one of them out"
        )
    if sizes is not None and classifier:
        raise InputError(
            "sizes and a classifier exclude each other: its gradient is of one size: leave one of them out"
        )


def ready(network: nn.Module) -> nn.Module:
    """The network in eval mode, float32, on the CPU: itself where it is that, for some have gigabytes, else a copy.

    Raises InputError for weights on the meta device.
    """
    for name, tensor in network.state_dict().items():
        if tensor.is_meta:
            raise InputError(
                f"{name} of {type(network).__name__} is on the meta device, without values: load its weights"
            )
    tensors = [t for t in (*network.parameters(), *network.buffers()) if t.is_floating_point()]
    if not any(m.training for m in network.modules()) and all(
        t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors
    ):
        return network
    return copy.deepcopy(network).eval().to("cpu", torch.float32)


def classifier_for(source: Source, given: NoisedClassifier | str | Path) -> NoisedClassifier:
    """A classifier that fits the source's images and noise. Raises InputError."""
    judge = given if isinstance(given, NoisedClassifier) else own.load_classifier(given)
    if judge.shape is not None and judge.shape != source.shape:
        shapes = ["×".join(map(str, shape)) for shape in (judge.shape, source.shape)]
        raise InputError(
            f"the classifier {judge.name} takes {shapes[0]}, the network {shapes[1]}: train it on the same"
        )
    if judge.schedule is not None and judge.schedule != source.schedule:
        raise InputError(
            f"the classifier {judge.name} was trained on another noise schedule ({judge.schedule.kind}, "
            f"T = {judge.schedule.T}) than the network ({source.schedule.kind}, T = {source.schedule.T}): train it on "
            "the network's"
        )
    return dataclasses.replace(judge, network=ready(judge.network))
