"""Source -> bundle: step graphs, weights, golden file and the parity gate. All of it or nothing."""

from __future__ import annotations

import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import safetensors.numpy
import torch
from torch import nn

from epsrt.bundle import Bundle
from epsrt.condition import Condition
from epsrt.engines import open_engine
from epsrt.errors import EpsrtError, InputError, one_of
from epsrt.files import sha256, whole_directory
from epsrt.manifest import (
    GOLDEN,
    MANIFEST,
    PARITY,
    FileEntry,
    Manifest,
    Rung,
    Sizes,
    StepGraph,
    check_outside,
    digest,
    render,
)
from epsrt.parity.golden import Golden
from epsrt.schedule import Schedule
from epsrt.types import OnProgress, Shape
from epsrt.verify import verify_all
from epsrt_export import golden, misses, parity
from epsrt_export.arguments import Extents, check_choices, classifier_for, largest_batch, ready, sizes_of, source_of
from epsrt_export.dialect_proof import dialect_rungs
from epsrt_export.gradient import log_prob_gradient
from epsrt_export.graphs import FP32_ALONE, Recipe, variants_of, write_graphs
from epsrt_export.int8 import write_int8
from epsrt_export.manifest import manifest_of
from epsrt_export.parts import add_parts, half_parts
from epsrt_export.sizes import check_sizes
from epsrt_export.source import NoisedClassifier, Source
from epsrt_export.stepgraph import check_network
from epsrt_trainer.checkpoint import Checkpoint


def export(
    source: Source | Checkpoint | str | Path,
    out: str | Path,
    *,
    thresholding: tuple[float, float] | None = None,
    sizes: Extents | None = None,
    masked: bool = False,
    classifier: NoisedClassifier | str | Path | None = None,
    precisions: Sequence[str] | None = None,
    max_batch: int | None = None,
    opset: int = 21,
    on_stage: OnProgress | None = None,
) -> Bundle:
    """Turn a source, or an epsrt checkpoint (by its path, or loaded), into the bundle `out`.

    thresholding  replaces the source's own: see Source
    sizes         (multiple, largest): the graphs also take other heights and widths, each a multiple of `multiple` up
                  to `largest` pixels; of signals, other lengths. Each is a number, or one an axis: an axis that has the
                  same for both is fixed. The network must take them
    masked        also writes step graphs that keep known pixels, for inpainting
    classifier    also writes step graphs that a classifier of noised images guides. It is a NoisedClassifier, or the
                  path of epsrt's own checkpoint. Step graphs of classifier-free guidance are written without being
                  asked for, where the network has a null label
    precisions    of fp32, fp16 and int8, those that the bundle must have. None: fp32, and fp16 where the network passes
                  the gate in it; where it does not, the manifest lists no graph of it, and a LeftOutWarning says why.
                  int8 has convolutions in 8 bits, for CPUs. Parity is proven in each; int8 has limits of its own
    max_batch     the largest batch of the step graphs: 64 unless given, fewer where images may exceed 64 × 64 pixels
    opset         the ONNX opset, 21 or 22
    on_stage      called as on_stage(what, fraction)

    The work is done on the CPU. A network that is not there, in eval mode and float32 is copied first. Raises
    InputError when the network does not fit, and ParityError when a rung of the ladder is missed. In both cases, and
    when interrupted, `out` is as it was before.
    """
    tell, out = on_stage or (lambda what, fraction: None), Path(out)
    source, others = source_of(source, thresholding), sizes_of(sizes)
    max_batch = largest_batch(max_batch, source, others)
    wanted, spare = (("fp32", "fp16"), ("fp16",)) if precisions is None else (precisions, ())
    check_choices(source, wanted, others, classifier is not None)
    if out.exists() and not (out / MANIFEST).is_file():
        raise InputError(f"{out} exists and is not a bundle: choose another name, or remove it")
    check_outside(out)
    source = dataclasses.replace(
        source,
        network=ready(source.network),
        sha256=source.weights_sha256,
        autoencoder=source.autoencoder and source.autoencoder.ready(ready),
    )
    judge = None if classifier is None else classifier_for(source, classifier)
    described = manifest_of(source, max_batch, (), others)
    told = Bundle(out, described).plan()["t"]  # its defaults make a plan
    recipe = _recipe(source, described.takes, others, judge, masked, opset)
    recipe = dataclasses.replace(recipe, told=(float(told[len(told) // 2]), float(told[-1])))
    check_network(source.network, source.shape, described.takes, torch.float32, source.variance is not None)
    if others is not None:
        check_sizes(source.network, source.shape, described.takes, others, source.variance is not None)
    rungs = parity.numpy_rungs(source)
    parity.require(rungs)
    with whole_directory(out) as beside:
        graphs, lost, proofs = list[StepGraph](), dict[str, EpsrtError](), defaultdict[str, list[Rung]](list)
        for precision in (p for p in wanted if p != "int8"):
            tell(f"graphs {precision}", 0.0)
            try:
                made = write_graphs(
                    recipe, precision, beside, partial(tell, f"graphs {precision}"), proofs[precision].append
                )
                parity.require(proofs[precision])
                graphs += made
            except (InputError, parity.ParityError) as error:
                if precision not in spare:
                    raise
                lost[precision] = error
        manifest = manifest_of(source, max_batch, graphs, others, judge)
        classify = None if judge is None else judge.network
        recorded = golden.record(source.network, manifest, tell, classify, source.examples)
        if source.autoencoder is not None:
            tell("autoencoder", 0.0)
            manifest, recorded = add_parts(source.autoencoder, manifest, recorded, wanted, opset, beside)
        _write_golden(beside, recorded)
        if "int8" in wanted:
            tell("graphs int8", 0.0)
            graphs += write_int8(Bundle(beside, manifest), partial(tell, "graphs int8"))
            manifest = msgspec.structs.replace(manifest, graphs=tuple(graphs))
        if "fp16" in wanted and "fp16" not in lost:
            manifest, halves = half_parts(Bundle(beside, manifest), wanted)
            for name, missed in halves.items():
                why = f"{out.name} has {name} in fp32 alone: {missed}"
                warnings.warn(why, parity.LeftOutWarning, stacklevel=2)
        for precision in (p for p in wanted if p not in lost):
            try:
                rungs += _measured(Bundle(beside, manifest), precision, source.network, tell) + proofs[precision]
            except parity.ParityError as error:
                if precision not in spare:
                    raise
                lost[precision] = error
        for precision, reason in lost.items():
            manifest = _without(beside, manifest, precision)
            warnings.warn(_left_out(out, precision, reason), parity.LeftOutWarning, stacklevel=2)
        _seal(beside, manifest, rungs)
        Bundle.open(beside)  # what was written is what can be read
    return Bundle.open(out)


def export_network(
    network: nn.Module,
    schedule: Schedule,
    out: str | Path,
    *,
    shape: Shape,
    sizes: Extents | None = None,
    masked: bool = False,
    classifier: NoisedClassifier | str | Path | None = None,
    precisions: Sequence[str] | None = None,
    max_batch: int | None = None,
    opset: int = 21,
    on_stage: OnProgress | None = None,
    **facts: Any,
) -> Bundle:
    """Turn any module with forward(x [B, C, …], t [B] float32[, label [B] int64], **conditions) into a bundle.

    It returns [B, C, …]. `facts` are fields of Source: prediction, classes, null_label, conditions, clip, … The rest is
    as in `export`.
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


def _recipe(
    source: Source,
    takes: Sequence[Condition],
    sizes: Sizes | None,
    judge: NoisedClassifier | None,
    masked: bool,
    opset: int,
) -> Recipe:
    return Recipe(
        source.network,
        source.shape,
        takes,
        variance=source.variance,
        threshold=source.threshold,
        gradient=None if judge is None else log_prob_gradient(judge.network, source.shape, judge.classes),
        sizes=sizes,
        variants=variants_of(any(c.guided for c in takes), masked, judge is not None),
        opset=opset,
    )


def _write_golden(folder: Path, recorded: Golden) -> None:
    arrays = {name: np.ascontiguousarray(array) for name, array in recorded.to_arrays().items()}
    (folder / GOLDEN).write_bytes(safetensors.numpy.save(arrays))


def _without(folder: Path, manifest: Manifest, precision: str) -> Manifest:
    """Remove the files of a precision, and its step graphs and parts from the manifest."""
    for file in folder.glob(f"*-{precision}.*"):
        file.unlink()
    kept = tuple(g for g in manifest.graphs if g.precision != precision)
    parts = {name: tuple(p for p in each if p.precision != precision) for name, each in (manifest.parts or {}).items()}
    return msgspec.structs.replace(manifest, graphs=kept, parts=parts or msgspec.UNSET)


def _left_out(out: Path, precision: str, reason: EpsrtError) -> str:
    without = f"{out.name} is written without {precision}"
    if isinstance(reason, parity.ParityError):
        return f"{without}: {reason.missed}; to leave it out from the start, give {FP32_ALONE}"
    return f"{without}: {reason}"


def _measured(bundle: Bundle, precision: str, network: nn.Module, tell: OnProgress) -> list[Rung]:
    """The rungs of all step graphs of a precision. Raises ParityError where one is missed."""
    with open_engine(bundle, "onnxruntime", precision=precision) as engine:
        rungs = verify_all(engine, lambda name, fraction: tell(f"parity {precision} {name}", fraction))
        parity.require(rungs, partial(misses.why, network, engine))
    dialects = dialect_rungs(bundle, precision, lambda name, fraction: tell(f"parity {precision} {name}", fraction))
    parity.require(dialects)
    return [*rungs, *dialects]


def _seal(folder: Path, manifest: Manifest, rungs: Sequence[Rung]) -> None:
    """Write what was measured, and the manifest with the hash of every file."""
    (folder / PARITY).write_bytes(msgspec.json.format(msgspec.json.encode(rungs), indent=1) + b"\n")
    files = {p.name: FileEntry(sha256(p), p.stat().st_size) for p in sorted(folder.iterdir())}
    manifest = msgspec.structs.replace(manifest, files=files)
    manifest = msgspec.structs.replace(manifest, digest=digest(manifest))
    (folder / MANIFEST).write_bytes(render(manifest))
