"""Source -> bundle: step graphs, weights, golden file and the parity gate. All of it or nothing."""

from __future__ import annotations

import copy
import dataclasses
import math
import platform
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import safetensors.numpy
import torch
from torch import nn

from epsrt import __version__
from epsrt.bundle import Bundle
from epsrt.engines import open_engine
from epsrt.errors import InputError, one_of, typed
from epsrt.files import sha256, whole_directory
from epsrt.manifest import (
    FORMAT,
    GOLDEN,
    MANIFEST,
    PARITY,
    FileEntry,
    Manifest,
    Provenance,
    Rung,
    Sizes,
    StepGraph,
    Thresholding,
    render,
)
from epsrt.manifest import digest as digest_of
from epsrt.schedule import Schedule
from epsrt.types import OnProgress
from epsrt.verify import verify_all
from epsrt_export import golden, parity
from epsrt_export.families import checkpoint as own
from epsrt_export.gradient import log_prob_gradient
from epsrt_export.graphs import DTYPES, variants_of, write_graphs
from epsrt_export.int8 import write_int8
from epsrt_export.source import NoisedClassifier, Source
from epsrt_export.stepgraph import check_network, check_sizes
from epsrt_trainer.checkpoint import Checkpoint

PRECISIONS = (*DTYPES, "int8")


def export(
    source: Source | Checkpoint | str | Path,
    out: str | Path,
    *,
    thresholding: tuple[float, float] | None = None,
    sizes: tuple[int, int] | None = None,
    masked: bool = False,
    classifier: NoisedClassifier | str | Path | None = None,
    precisions: Sequence[str] = ("fp32", "fp16"),
    max_batch: int | None = None,
    opset: int = 21,
    on_stage: OnProgress | None = None,
) -> Bundle:
    """Turn a source, or an epsrt checkpoint (by its path, or loaded), into the bundle `out`.

    thresholding  instead of the source's: see Source
    sizes         (multiple, largest): the graphs also take other heights and widths, each a multiple of `multiple`, up
                  to `largest` pixels, where the network does
    masked        also write step graphs that keep known pixels: inpainting
    classifier    of noised images, a NoisedClassifier or the path of epsrt's own checkpoint: also write step graphs
                  that it guides. (Where the network has a null label, those of guidance without one always are.)
    precisions    fp32, and fp16 unless it is left out; int8 where it is asked for: convolutions in 8 bits, for CPUs.
                  Parity is proven in each, of int8 to limits of its own
    max_batch     the largest batch of the step graphs: 64 unless given, fewer where images may exceed 64 × 64 pixels
    on_stage      called as on_stage(what, fraction)

    The work is done on the CPU, on a copy of the network where it is not in eval mode, float32 and there already.
    Raises InputError when the network does not fit, ParityError when a rung of the ladder is missed. In both cases,
    and when interrupted, `out` is as it was before.
    """
    if not isinstance(source, (Source, Checkpoint, str, Path)):
        raise InputError(f"a {type(source).__name__} is no Source and no path: see families.load, or export_network")
    if not isinstance(source, Source):
        source = own.of(source) if isinstance(source, Checkpoint) else own.load(source)
    if thresholding is not None:
        source = dataclasses.replace(source, thresholding=thresholding)
    tell = on_stage or (lambda what, fraction: None)
    out = Path(out)
    others = None if sizes is None else _sizes(sizes)
    if max_batch is None:
        pixels = math.prod(source.shape[1:]) if others is None else others.largest**2
        max_batch = max(1, min(64, 64**3 // max(1, pixels)))
    max_batch = typed("max_batch", max_batch, 1)
    _check(source, precisions, max_batch, others, classifier is not None)
    if out.exists() and not (out / MANIFEST).is_file():
        raise InputError(f"{out} exists and is not a bundle: choose another name, or remove it")
    network, schedule = _ready(source.network), source.schedule
    judge = None if classifier is None else _classifier(classifier, source)
    gradient = None if judge is None else log_prob_gradient(judge.network, source.shape, judge.classes)
    source = dataclasses.replace(source, sha256=source.weights_sha256)
    Bundle(out, manifest_of(source, max_batch, (), others)).plan()  # its defaults make a plan
    variants = variants_of(source.null_label is not None, masked, judge is not None)
    check_network(network, source.shape, source.classes > 0, torch.float32, source.variance is not None)
    if others is not None:
        check_sizes(network, source.shape, source.classes > 0, others, source.variance is not None)
    rungs = [
        parity.schedule_rung(schedule),
        *parity.plan_rungs(schedule, source.prediction, source.bound, source.variance, source.sigma_data),
    ]
    parity.require(rungs)
    with whole_directory(out) as beside:
        graphs: list[StepGraph] = []
        for precision in (p for p in precisions if p != "int8"):
            tell(f"graphs {precision}", 0.0)
            graphs += write_graphs(
                network,
                precision,
                beside,
                source.shape,
                source.classes > 0,
                opset,
                source.variance,
                source.threshold,
                others,
                variants=variants,
                null_label=source.null_label,
                gradient=gradient,
                on_graph=partial(tell, f"graphs {precision}"),
            )
        manifest = manifest_of(source, max_batch, graphs, others, judge)
        kept = golden.record(network, manifest, tell, None if judge is None else judge.network)
        arrays = {name: np.ascontiguousarray(array) for name, array in kept.to_arrays().items()}
        (beside / GOLDEN).write_bytes(safetensors.numpy.save(arrays))
        if "int8" in precisions:
            tell("graphs int8", 0.0)
            graphs += write_int8(Bundle(beside, manifest), partial(tell, "graphs int8"))
            manifest = msgspec.structs.replace(manifest, graphs=tuple(graphs))
        for precision in precisions:
            rungs += _measure(Bundle(beside, manifest), precision, tell)
        (beside / PARITY).write_bytes(msgspec.json.format(msgspec.json.encode(rungs), indent=1) + b"\n")
        files = {p.name: FileEntry(sha256(p), p.stat().st_size) for p in sorted(beside.iterdir())}
        manifest = msgspec.structs.replace(manifest, files=files)
        manifest = msgspec.structs.replace(manifest, digest=digest_of(manifest))
        (beside / MANIFEST).write_bytes(render(manifest))
        Bundle.open(beside)  # what was written is what can be read
    return Bundle.open(out)


def export_network(
    network: nn.Module,
    schedule: Schedule,
    out: str | Path,
    *,
    shape: tuple[int, int, int],
    sizes: tuple[int, int] | None = None,
    masked: bool = False,
    classifier: NoisedClassifier | str | Path | None = None,
    precisions: Sequence[str] = ("fp32", "fp16"),
    max_batch: int | None = None,
    opset: int = 21,
    on_stage: OnProgress | None = None,
    **facts: Any,
) -> Bundle:
    """Turn any module with forward(x [B, C, H, W], t [B] float32[, label [B] int64]) -> [B, C, H, W] into a bundle.

    `facts` are fields of Source: prediction, classes, null_label, variance, clip, … The rest is as in `export`.
    """
    known = [f.name for f in dataclasses.fields(Source)][3:]
    for name in facts:
        if name not in known:
            raise InputError(f"export_network takes no {name!r}: {one_of(name, known)}")
    source = Source(network, schedule, shape, **facts)
    return export(
        source,
        out,
        sizes=sizes,
        masked=masked,
        classifier=classifier,
        precisions=precisions,
        max_batch=max_batch,
        opset=opset,
        on_stage=on_stage,
    )


def _sizes(given: tuple[int, int]) -> Sizes:
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise InputError(f"sizes = {given!r} is not (multiple, largest), such as (8, 64)")
    return Sizes(*(typed("sizes", n, 1) for n in given))


def _ready(network: nn.Module) -> nn.Module:
    """In eval mode, float32, on the CPU: itself where it is that, for some have gigabytes, else a copy.

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


def _classifier(given: NoisedClassifier | str | Path, source: Source) -> NoisedClassifier:
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
    return dataclasses.replace(judge, network=_ready(judge.network))


def manifest_of(
    source: Source,
    max_batch: int,
    graphs: Sequence[StepGraph],
    sizes: Sizes | None = None,
    judge: NoisedClassifier | None = None,
) -> Manifest:
    """What a bundle of this source says of itself, its files aside."""
    by = source.threshold
    provenance = Provenance(
        network=source.kind,
        parameters=sum(p.numel() for p in source.network.parameters()),
        family=source.family,
        source=source.name,
        version=source.version,
        source_sha256=source.weights_sha256,
        config=source.config,
        training=source.training,
        versions={
            "epsrt": __version__,
            "torch": str(torch.__version__),
            "onnx": version("onnx"),
            "python": platform.python_version(),
        },
    )
    return Manifest(
        format=FORMAT,
        shape=source.shape,
        max_batch=max_batch,
        schedule=source.schedule,
        prediction=source.prediction,  # type: ignore[arg-type]
        value_range=source.value_range,
        clip=source.bound,
        classes=source.classes,
        class_names=tuple(source.class_names),
        null_label=source.null_label,
        variance=source.variance,
        thresholding=None if by is None else Thresholding(by.ratio, by.maximum),
        sigma_data=source.sigma_data,
        sampling=source.sampling,
        graphs=tuple(graphs),
        provenance=provenance,
        files={},
        sizes=sizes,
        classifier=None if judge is None else judge.described,
    )


def _measure(bundle: Bundle, precision: str, tell: OnProgress) -> list[Rung]:
    engine = open_engine(bundle, "onnxruntime", precision=precision)
    try:
        rungs = verify_all(engine, lambda name, fraction: tell(f"parity {precision} {name}", fraction))
    finally:
        engine.close()
    parity.require(rungs)
    return rungs


def _check(source: Source, precisions: Sequence[str], max_batch: int, sizes: Sizes | None, classifier: bool) -> None:
    if not 1 <= max_batch <= 65536:
        raise InputError(f"max_batch = {max_batch} is outside 1 … 65536")
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
