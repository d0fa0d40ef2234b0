"""Checkpoint or module -> bundle: step graphs, weights, golden file and the parity gate. All of it or nothing."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import safetensors.numpy
import torch
from torch import nn

from epsrt import __version__
from epsrt.bundle import (
    FORMAT,
    GOLDEN,
    MANIFEST,
    PARITY,
    Bundle,
    FileEntry,
    Graph,
    LearnedVariance,
    Manifest,
    Provenance,
    Rung,
    Thresholding,
    render,
    step_columns,
    step_features,
)
from epsrt.bundle import digest as digest_of
from epsrt.engines import open_engine
from epsrt.errors import EpsrtError
from epsrt.files import sha256, whole_directory
from epsrt.levels import visit
from epsrt.schedule import Schedule
from epsrt.verify import verify
from epsrt_export import golden, parity
from epsrt_export.onnx_graph import WeightsFile, to_onnx
from epsrt_export.precision import half_copy
from epsrt_export.stepgraph import DynamicThreshold, StepGraph, check_network
from epsrt_trainer.checkpoint import Checkpoint, load_checkpoint

OnStage = Callable[[str, float], object]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def export(
    checkpoint: Checkpoint | str | Path,
    out: str | Path,
    *,
    thresholding: tuple[float, float] | None = None,
    precisions: Sequence[str] = ("fp32", "fp16"),
    max_batch: int = 64,
    opset: int = 21,
    on_stage: OnStage | None = None,
) -> Bundle:
    """Turn a checkpoint into the bundle `out`. Arguments and errors as in export_network."""
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint)
    c, config = checkpoint, checkpoint.config
    return export_network(
        c.network, c.schedule, out,
        shape=(config.image_channels, config.image_size, config.image_size),
        prediction=c.prediction, value_range=c.value_range,
        classes=config.classes, class_names=c.class_names or (),
        null_label=config.classes if config.null_label else None,
        thresholding=thresholding, precisions=precisions, max_batch=max_batch, opset=opset, on_stage=on_stage,
        source=Path(c.path).name, source_sha256=c.sha256,
        config=dataclasses.asdict(config), training=msgspec.to_builtins(c.training),
    )  # fmt: skip


def export_network(
    network: nn.Module,
    schedule: Schedule,
    out: str | Path,
    *,
    shape: tuple[int, int, int],
    prediction: str = "epsilon",
    value_range: tuple[float, float] = (-1.0, 1.0),
    classes: int = 0,
    null_label: int | None = None,
    class_names: Sequence[str] = (),
    variance: LearnedVariance | None = None,
    thresholding: tuple[float, float] | None = None,
    sigma_data: float = 0.5,
    precisions: Sequence[str] = ("fp32", "fp16"),
    max_batch: int = 64,
    opset: int = 21,
    on_stage: OnStage | None = None,
    source: str = "module",
    source_sha256: str = "",
    config: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
) -> Bundle:
    """Turn any module with forward(x [B, C, H, W], t [B] float32[, label [B] int64]) -> [B, C, H, W] into a bundle.

    shape         C, H, W
    prediction    what the network returns: epsilon, x0, v, score, edm or velocity, as in epsrt.levels.Network. It is
                  given t of the schedule and x; of edm, forward takes ¼ ln σ and c_in·x
    value_range   of its images; x0 is clipped to it when sampling
    classes       0: forward takes no label. `null_label`: the label that means "none", where the network knows one
    variance      forward returns [B, 2C, H, W], and the second half is log σ² of a step (learned; diffusers' scheduler
                  of that name wants σ² itself), or says where log σ² lies between log β̃ at −1 and log β at 1
                  (learned_range; arXiv 2102.09672, eq. 15)
    thresholding  (ratio, maximum): x0 is scaled to the value range by the `ratio` quantile of its |values|, at most
                  `maximum` times the range, and not merely clipped (arXiv 2205.11487, section 2.3), in every sampler
    sigma_data    of edm: the data's standard deviation, with which it is preconditioned (arXiv 2206.00364, table 1)
    precisions    fp32, and fp16 unless it is left out; parity is proven in each
    max_batch     the largest batch of the step graphs
    on_stage      called as on_stage(what, fraction)

    The work is done on a copy of the module, on the CPU, in eval mode.
    Raises EpsrtError when the network does not fit, ParityError when a rung of the ladder is missed. In both cases,
    and when interrupted, `out` is as it was before.
    """
    tell = on_stage or (lambda what, fraction: None)
    out = Path(out)
    _check_arguments(shape, value_range, classes, null_label, class_names, precisions, max_batch)
    by_quantile = _check_options(variance, thresholding)
    clip = max(abs(v) for v in value_range)
    visit(schedule, [schedule.span[1]], prediction=prediction, sigma_data=sigma_data, clip=clip)  # where it is noisiest
    threshold = None
    if by_quantile is not None:
        threshold = DynamicThreshold(by_quantile.ratio, by_quantile.maximum, clip)
        threshold.k(math.prod(shape))  # refused now, where TensorRT could not build it later
    if out.exists() and not (out / MANIFEST).is_file():
        raise EpsrtError(f"{out} exists and is not a bundle: choose another name, or remove it")
    network = copy.deepcopy(network).eval().to("cpu", torch.float32)
    check_network(network, shape, classes > 0, torch.float32, variance is not None)
    rungs = [parity.schedule_rung(schedule), *parity.plan_rungs(schedule, prediction, clip, variance, sigma_data)]
    parity.require(rungs)
    with whole_directory(out) as beside:
        graphs = []
        for precision in precisions:
            tell(f"graph {precision}", 0.0)
            graphs.append(
                write_graph(network, precision, beside, shape, classes > 0, max_batch, opset, variance, threshold)
            )
            tell(f"graph {precision}", 1.0)
        manifest = Manifest(
            format=FORMAT, shape=shape, max_batch=max_batch, schedule=schedule, prediction=prediction,  # type: ignore[arg-type]
            value_range=value_range, classes=classes, class_names=tuple(class_names), null_label=null_label,
            variance=variance, thresholding=by_quantile, sigma_data=sigma_data,
            graphs=tuple(graphs), provenance=_provenance(network, source, source_sha256, config, training), files={},
        )  # fmt: skip
        kept = golden.record(network, manifest, tell)
        (beside / GOLDEN).write_bytes(safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in kept.items()}))
        for precision in precisions:
            rungs += _measure(Bundle(beside, manifest), precision, tell)
        (beside / PARITY).write_bytes(msgspec.json.format(msgspec.json.encode(rungs), indent=1) + b"\n")
        files = {p.name: FileEntry(sha256(p), p.stat().st_size) for p in sorted(beside.iterdir())}
        manifest = msgspec.structs.replace(manifest, files=files)
        manifest = msgspec.structs.replace(manifest, digest=digest_of(manifest))
        (beside / MANIFEST).write_bytes(render(manifest))
        Bundle.open(beside)  # what was written is what can be read
    return Bundle.open(out)


def _measure(bundle: Bundle, precision: str, tell: OnStage) -> list[Rung]:
    engine = open_engine(bundle, "onnxruntime", precision=precision)
    try:
        rungs = verify(engine, lambda name, fraction: tell(f"parity {precision} {name}", fraction))
    finally:
        engine.close()
    parity.require(rungs)
    return rungs


def write_graph(
    network: nn.Module,
    precision: str,
    directory: Path,
    shape: tuple[int, int, int],
    labelled: bool,
    max_batch: int,
    opset: int,
    variance: LearnedVariance | None = None,
    threshold: DynamicThreshold | None = None,
) -> Graph:
    """Write the step graph of a network, and its weights file, into a directory. Arguments as in `export_network`."""
    dtype = DTYPES[precision]
    if dtype == torch.float16:
        network = half_copy(network)
        try:
            check_network(network, shape, labelled, dtype, variance is not None)
        except EpsrtError as error:
            raise EpsrtError(f'in half precision, {error}; export with precisions=["fp32"] alone') from error
    columns = step_columns(variance)
    model = to_onnx(StepGraph(network, columns, labelled, dtype, threshold), shape, max_batch, opset)
    weights = WeightsFile(f"weights-{precision}.bin")
    weights.take(model)
    weights.write(directory)
    name = f"step-{precision}.onnx"
    (directory / name).write_bytes(model.SerializeToString(deterministic=True))
    return Graph(name, weights.name, precision, columns, step_features(variance, threshold))  # type: ignore[arg-type]


def _check_arguments(
    shape: tuple[int, int, int],
    value_range: tuple[float, float],
    classes: int,
    null_label: int | None,
    class_names: Sequence[str],
    precisions: Sequence[str],
    max_batch: int,
) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise EpsrtError(f"shape = {list(shape)} is not C, H, W")
    if not value_range[0] < value_range[1]:
        raise EpsrtError(f"value_range = {list(value_range)} does not ascend")
    if not 1 <= max_batch <= 65536:
        raise EpsrtError(f"max_batch = {max_batch} is outside 1 … 65536")
    if not precisions or set(precisions) - set(DTYPES) or len(set(precisions)) != len(precisions):
        raise EpsrtError(f"precisions = {list(precisions)}: choose from {', '.join(DTYPES)}, each once")
    if classes < 0:
        raise EpsrtError(f"classes = {classes} is negative: give 0 for an unconditional network")
    if len(class_names) not in (0, classes):
        raise EpsrtError(f"{len(class_names)} class names for {classes} classes: give one each, or none")
    if (null_label is not None and not 0 <= null_label <= classes) or (null_label is not None and not classes):
        raise EpsrtError(f"null_label = {null_label} is outside 0 … {classes} (or the network has no classes)")


def _check_options(variance: str | None, thresholding: tuple[float, float] | None) -> Thresholding | None:
    if variance is not None and variance not in get_args(LearnedVariance):
        raise EpsrtError(
            f"variance {variance!r} is unknown: use {' or '.join(get_args(LearnedVariance))} where the network returns "
            "one, or None"
        )
    if thresholding is None:
        return None
    try:
        ratio, maximum = map(float, thresholding)
    except (TypeError, ValueError):
        raise EpsrtError(f"thresholding = {thresholding!r} is not (ratio, maximum), such as (0.995, 1.5)") from None
    if not 0 < ratio <= 1:
        raise EpsrtError(f"thresholding ratio = {ratio} is outside (0, 1]: 0.995 is usual")
    if not 1 <= maximum < math.inf:
        raise EpsrtError(f"thresholding maximum = {maximum} is below 1 or not finite: at 1, x0 is merely clipped")
    return Thresholding(ratio, maximum)


def _provenance(
    network: nn.Module, source: str, source_sha256: str, config: dict[str, Any] | None, training: dict[str, Any] | None
) -> Provenance:
    kind = type(network)
    if not source_sha256:  # a module: its weights are its identity
        hasher = hashlib.sha256()
        for name, tensor in network.state_dict().items():
            hasher.update(name.encode())
            hasher.update(tensor.contiguous().numpy().tobytes())
        source_sha256 = hasher.hexdigest()
    return Provenance(
        network=f"{kind.__module__}.{kind.__qualname__}",
        parameters=sum(p.numel() for p in network.parameters()),
        source=source, source_sha256=source_sha256, config=config or {}, training=training or {},
        versions={
            "epsrt": __version__, "torch": str(torch.__version__), "onnx": version("onnx"),
            "python": platform.python_version(),
        },
    )  # fmt: skip
