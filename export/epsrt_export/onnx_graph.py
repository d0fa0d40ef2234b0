"""A step graph as ONNX: exported, checked, stripped of what does not belong to it, its weights in a shared file."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, numpy_helper

from epsrt.errors import EpsrtError
from epsrt_export import onnx_passes
from epsrt_export.stepgraph import OUTPUTS, StepGraph

EXTERNAL_FROM = 1024  # bytes; smaller initializers stay in the graph
ALIGNMENT = 4096  # a page, so that the file can be mapped
OPSETS = (21, 22)  # 20 decomposes GroupNorm; from 23 on, the Attention op fails in FP32 and for some head sizes


def to_onnx(step: StepGraph, shape: tuple[int, int, int], max_batch: int, opset: int = 21) -> onnx.ModelProto:
    """Export a step graph with a dynamic batch of 1 … max_batch.

    Raises EpsrtError when torch cannot export the network, or froze its batch to the example's.
    """
    if opset not in OPSETS:
        raise EpsrtError(f"opset {opset} is not supported: use {' or '.join(map(str, OPSETS))}")
    n = 3  # neither 0 nor 1, which torch.export would treat as constants
    images = [torch.zeros(n, *shape) for _ in "xmz"]  # three tensors: one passed thrice becomes one input
    inputs = [*images, torch.zeros(n, len(step.columns))]
    if step.labelled:
        inputs.append(torch.zeros(n, dtype=torch.int64))
    batch = torch.export.Dim("batch", min=1, max=max(n, max_batch))  # the example must be in the range
    names = ["x", "m", "z", "rows", *(["label"] if step.labelled else [])]
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                step.eval(), tuple(inputs), dynamo=True, opset_version=opset, verbose=False,
                input_names=names, output_names=list(OUTPUTS), dynamic_shapes=tuple({0: batch} for _ in inputs),
            )  # fmt: skip
    except Exception as error:  # torch.export raises many kinds; the user needs the sentence that names the line
        network = type(step.network).__name__
        raise EpsrtError(f"torch cannot export {network}: {_reason(error)}") from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _check_signature(model, names)
    onnx_passes.strip(model)
    onnx_passes.group_norm_by_instance_norm(model)
    if step.dtype == torch.float16:
        onnx_passes.softmax_in_fp32(model)
    onnx.checker.check_model(model)
    return model


class WeightsFile:
    """Initializers by content: equal tensors of several graphs are stored once. `write` makes the file."""

    def __init__(self, name: str):
        self.name = name
        self._offsets: dict[str, int] = {}
        self._chunks: list[tuple[int, bytes]] = []
        self._end = 0

    def take(self, model: onnx.ModelProto) -> None:
        """Move the initializers of at least EXTERNAL_FROM bytes out of `model`, in place."""
        for tensor in model.graph.initializer:
            data = numpy_helper.to_array(tensor).tobytes()
            if len(data) < EXTERNAL_FROM:
                continue
            for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "external_data"):
                tensor.ClearField(field)
            tensor.data_location = TensorProto.EXTERNAL
            entries = {"location": self.name, "offset": self._place(data), "length": len(data)}
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))

    def _place(self, data: bytes) -> int:
        key = hashlib.sha256(data).hexdigest()
        if key not in self._offsets:
            start = -(-self._end // ALIGNMENT) * ALIGNMENT
            self._offsets[key] = start
            self._chunks.append((start, data))
            self._end = start + len(data)
        return self._offsets[key]

    def write(self, directory: Path) -> None:
        """Write the file into `directory`."""
        with (directory / self.name).open("wb") as file:
            for start, data in self._chunks:
                file.write(b"\0" * (start - file.tell()))
                file.write(data)


def _check_signature(model: onnx.ModelProto, inputs: Sequence[str]) -> None:
    """torch.export freezes a batch, or merges and drops inputs, without a word."""
    for kind, want, values in (("input", inputs, model.graph.input), ("output", OUTPUTS, model.graph.output)):
        have = [v.name for v in values]
        if have != list(want):
            raise EpsrtError(f"the exported graph has the {kind}s {have}, not {list(want)}: is an argument unused?")
        for value in values:
            first = value.type.tensor_type.shape.dim[0]
            if not first.dim_param:
                raise EpsrtError(
                    f"the batch of {kind} {value.name} was frozen to {first.dim_value}: the network fixes its batch "
                    "size, often by chunk() or a Python int of x.shape[0]; slice [:n] and [n:] instead"
                )


def _reason(error: Exception) -> str:
    """The first telling line of torch's long stories, its root cause before its frames."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    return f"{type(root).__name__}: {lines[0] if lines else 'no message'}"


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx warns of its own deprecations and of packages that nobody needs."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    loggers.append(logging.getLogger("torch.onnx._internal.exporter._registration"))
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
