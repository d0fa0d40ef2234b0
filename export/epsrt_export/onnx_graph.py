"""A step graph as ONNX: exported, checked, stripped of what does not belong to it, its weights in a shared file."""

from __future__ import annotations

import hashlib
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import torch

from epsrt.errors import EpsrtError, InputError
from epsrt.manifest import AXES, Sizes
from epsrt.part import FREE, Port
from epsrt.types import Shape
from epsrt_export import onnx_passes, unlisted
from epsrt_export.gathers import gather_on_one_axis
from epsrt_export.guards import check_guards
from epsrt_export.optimiser import optimise
from epsrt_export.optimiser_proof import OptimiserProof
from epsrt_export.program import fit
from epsrt_export.sizes import example, free
from epsrt_export.stepgraph import OUTPUTS, StepModule, apart

EXTERNAL_FROM = 1024  # bytes; smaller initializers stay in the graph
ALIGNMENT = 4096  # a page, so that the file can be mapped
OPSETS = (21, 22)  # 20 decomposes GroupNorm; from 23 on, the Attention op fails in FP32 and for some head sizes


def to_onnx(
    step: StepModule,
    shape: Shape,
    opset: int = 21,
    weights: WeightsFile | None = None,
    sizes: Sizes | None = None,
    proof: OptimiserProof | None = None,
) -> onnx.ModelProto:
    """Export a step graph with a dynamic batch; its large weights go to `weights`, if given.

    It has its value_info, and norms as torch exports them: see epsrt_export.dialects. With `sizes`, the extents that
    may be others are dynamic too, each its own. Raises InputError when torch cannot export the network, or froze its
    batch or size to the example's. `proof` runs it before and after it is optimised.
    """
    if opset not in OPSETS:
        raise InputError(f"opset {opset} is not supported: use {' or '.join(map(str, OPSETS))}")
    n = 3  # neither 0 nor 1, which torch.export would treat as constants
    sized, names = free(shape, sizes), AXES[len(shape) - 1]
    extents = shape[1:] if sizes is None else example(shape, sizes)
    ports = step.inputs(sized)
    # AUTO: code like "if len(x) >= 64: x = x.contiguous()" narrows its range; the parity of the largest batch tells
    batch = torch.export.Dim.AUTO
    pixels = [] if sizes is None else sizes.axes(len(extents))
    symbols = {i: _pixels(names[i], extents[i], *pixels[i]) for i, n in enumerate(sized[1:]) if n == FREE}
    inputs: dict[str, Any] = {}
    dynamic: dict[str, Any] = {}
    for port in ports:  # a tensor each: one passed twice becomes one input
        made = (extents[i - 1] if extent == FREE else extent for i, extent in enumerate(port.shape))
        inputs[port.name] = torch.zeros(n, *made, dtype=getattr(torch, port.dtype))
        dynamic[port.name] = {0: batch, **{i + 2: symbol for i, symbol in symbols.items() if FREE in port.shape}}
    try:
        with quiet(), torch.no_grad():
            if sizes is None:
                traced = torch.export.export(step.eval(), (), apart(inputs), dynamic_shapes=apart(dynamic))
            else:
                traced = _trace(step, apart(inputs), apart(dynamic), shape, sizes)
            look = None if proof is None else partial(proof.before, inputs)
            program = translated(traced, list(inputs), list(OUTPUTS), opset, look)
    except EpsrtError:
        raise
    except Exception as error:  # torch.export raises many kinds; the user needs the sentence that names the line
        network = type(step.network).__name__
        raise InputError(f"torch cannot export {network}: {reason_of(error)}{line_of(error)}") from error
    if proof is not None:
        proof.after(program)
    if weights is not None:
        weights.take(program)
    model: onnx.ModelProto = ir.to_proto(program)
    _check_signature(model, ports, names)
    unlisted.check(model, type(step.network).__name__)
    onnx_passes.strip(model)
    if step.dtype == torch.float16:
        onnx_passes.softmax_in_fp32(model)
    onnx_passes.name_dimensions(model, ports, names)
    return model


def translated(
    program: torch.export.ExportedProgram,
    inputs: list[str],
    outputs: list[str],
    opset: int,
    look: Callable[[ir.Model], object] | None = None,
) -> ir.Model:
    """An exported program as ONNX, optimised; its inputs and outputs have these names. `look` is given it before."""
    made = torch.onnx.export(
        fit(program),
        dynamo=True,
        opset_version=opset,
        optimize=False,
        verbose=False,
        input_names=inputs,
        output_names=outputs,
    )
    assert made is not None
    _leave_names(made.model.graph, inputs)
    if look is not None:
        look(made.model)
    optimise(made.model)
    gather_on_one_axis(made.model.graph)
    return made.model


def _leave_names(graph: ir.Graph, inputs: Collection[str]) -> None:
    """Rename, in place, what a node or a constant has the name of an input for: a condition may be called `view`."""
    constants = [value for value in graph.initializers.values() if value.name in inputs]
    for value in (*constants, *(made for node in graph for made in node.outputs if made.name in inputs)):
        value.name = f"{value.name}.inner"


class WeightsFile:
    """Initializers by content: equal tensors of several graphs are stored once. `write` makes the file.

    Until then the tensors stay where they are, torch's own: a network of gigabytes is not held twice.
    """

    def __init__(self, name: str):
        self.name = name
        self._offsets: dict[str, int] = {}
        self._chunks: list[tuple[int, ir.TensorProtocol]] = []
        self._end = 0

    def take(self, model: ir.Model) -> None:
        """Move the initializers of at least EXTERNAL_FROM bytes out of `model`, in place."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < EXTERNAL_FROM:
                continue
            value.const_value = ir.ExternalTensor(
                self.name,
                self._place(tensor),
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.numpy().shape),
                name=value.name or "",
            )

    def _place(self, tensor: ir.TensorProtocol) -> int:
        key = hashlib.sha256(_bytes(tensor).data).hexdigest()
        if key not in self._offsets:
            start = -(-self._end // ALIGNMENT) * ALIGNMENT
            self._offsets[key] = start
            self._chunks.append((start, tensor))
            self._end = start + tensor.nbytes
        return self._offsets[key]

    def write(self, directory: Path) -> None:
        """Write the file into `directory`."""
        with (directory / self.name).open("wb") as file:
            for start, tensor in self._chunks:
                file.write(b"\0" * (start - file.tell()))
                file.write(_bytes(tensor).data)


def _bytes(tensor: ir.TensorProtocol) -> np.ndarray:
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


def _pixels(name: str, example: int, multiple: int, largest: int) -> torch.export.Dim:
    multiples = torch.export.Dim(name, min=1, max=max(largest, example) // multiple)
    return multiple * multiples if multiple > 1 else multiples


def _trace(
    step: StepModule, inputs: dict[str, Any], dynamic: dict[str, Any], shape: Shape, sizes: Sizes
) -> torch.export.ExportedProgram:
    """Of dynamic sizes, by torch.export itself, which tells for which of them its graph holds."""
    try:
        program = torch.export.export(step.eval(), (), inputs, dynamic_shapes=dynamic)
    except Exception as error:
        network, reason = type(step.network).__name__, reason_of(error)
        if "specialized it to be a constant" in str(error):
            raise InputError(
                f"{network} fixes its {' or '.join(AXES[len(shape) - 1])}, often by a Python int of x.shape: leave "
                "sizes out"
            ) from error
        raise InputError(
            f"torch cannot export {network} at multiples of {sizes.multiple} pixels ({reason}): give a larger "
            "multiple, or leave sizes out"
        ) from error
    check_guards(program, step, shape, tuple(inputs["x"].shape[2:]), sizes)
    return program


def _check_signature(model: onnx.ModelProto, ports: Sequence[Port], axes: Sequence[str]) -> None:
    """torch.export freezes a batch or a size, or merges and drops inputs, without a word."""
    outputs = [msgspec.structs.replace(ports[0], name=name) for name in OUTPUTS]
    for kind, want, values in (("input", ports, model.graph.input), ("output", outputs, model.graph.output)):
        have, names = [v.name for v in values], [port.name for port in want]
        if have != names:
            raise InputError(f"the exported graph has the {kind}s {have}, not {names}: is an argument unused?")
        for value in values:
            first = value.type.tensor_type.shape.dim[0]
            batch = first.dim_param or str(first.dim_value)
            if batch.isdigit():  # where one input's alone is, the name of its dimension is the number
                raise InputError(
                    f"the batch of {kind} {value.name} was frozen to {batch}: the network fixes its batch "
                    "size, often by chunk() or a Python int of x.shape[0]; slice [:n] and [n:] instead"
                )
    sized = {port.name for port in (*ports, *outputs) if FREE in port.shape}
    _check_sizes([v for v in (*model.graph.input, *model.graph.output) if v.name in sized], ports[0], axes)


def _check_sizes(samples: Sequence[onnx.ValueInfoProto], x: Port, axes: Sequence[str]) -> None:
    """Each has x's extents, of which those that are free are symbols, each another."""
    wanted: list[str | int] = []
    for value in samples:
        dims = value.type.tensor_type.shape.dim[2:]
        have = [d.dim_param or d.dim_value for d in dims]
        wanted = wanted or have
        symbols = [n for n, extent in zip(have, x.shape[1:], strict=True) if extent == FREE]
        if not all(isinstance(n, str) for n in symbols) or len(set(symbols)) != len(symbols) or have != wanted:
            raise InputError(
                f"the {' and '.join(axes)} of {value.name} became {' × '.join(map(str, have))} in the graph: the "
                "network fixes its size, often by a Python int of x.shape: leave sizes out"
            )


def reason_of(error: Exception) -> str:
    """The first telling line of torch's long stories, its root cause before its frames."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    return f"{type(root).__name__}: {lines[0] if lines else 'no message'}"


def line_of(error: Exception) -> str:
    """Where in the network's own code torch.export gave up: the innermost line that is neither torch's nor ours."""
    others = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    chain: BaseException | None = error
    while chain is not None:
        for frame in reversed(traceback.extract_tb(chain.__traceback__)):
            if not frame.filename.startswith(others) and frame.line:
                return f"; in {Path(frame.filename).name}, line {frame.lineno}, {frame.name}: {frame.line}"
        chain = chain.__cause__ or chain.__context__
    return ""


@contextmanager
def quiet() -> Iterator[None]:
    """torch.onnx warns of its own deprecations and of packages that nobody needs, and prints graphs that failed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    loggers.append(logging.getLogger("torch.onnx._internal.exporter._registration"))
    loggers.append(logging.getLogger("torch.fx.experimental.symbolic_shapes"))
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
