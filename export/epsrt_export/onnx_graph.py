"""A step graph as ONNX: exported, checked, stripped of what does not belong to it, its weights in a shared file."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from epsrt.errors import EpsrtError, InputError
from epsrt.manifest import Sizes
from epsrt_export import onnx_passes, unlisted
from epsrt_export.gathers import gather_on_one_axis
from epsrt_export.optimiser import optimise
from epsrt_export.optimiser_proof import OptimiserProof
from epsrt_export.program import fit
from epsrt_export.stepgraph import OUTPUTS, StepModule

EXTERNAL_FROM = 1024  # bytes; smaller initializers stay in the graph
ALIGNMENT = 4096  # a page, so that the file can be mapped
MOST_TRIED = 40  # heights, and as many widths, that torch's conditions are evaluated at
OPSETS = (21, 22)  # 20 decomposes GroupNorm; from 23 on, the Attention op fails in FP32 and for some head sizes


def to_onnx(
    step: StepModule,
    shape: tuple[int, int, int],
    opset: int = 21,
    weights: WeightsFile | None = None,
    sizes: Sizes | None = None,
    proof: OptimiserProof | None = None,
) -> onnx.ModelProto:
    """Export a step graph with a dynamic batch; its large weights go to `weights`, if given.

    It has its value_info, and norms as torch exports them: see epsrt_export.dialects. With `sizes`, height and width
    are dynamic too, each its own. Raises InputError when torch cannot export the network, or froze its batch or size to
    the example's. `proof` runs it before and after it is optimised.
    """
    if opset not in OPSETS:
        raise InputError(f"opset {opset} is not supported: use {' or '.join(map(str, OPSETS))}")
    n = 3  # neither 0 nor 1, which torch.export would treat as constants
    height, width = size = shape[1:] if sizes is None else _example(shape, sizes)
    # a tensor each: one passed twice becomes one input
    makes = {
        "image": lambda: torch.zeros(n, shape[0], *size),
        "rows": lambda: torch.zeros(n, len(step.columns)),
        "label": lambda: torch.zeros(n, dtype=torch.int64),
    }
    inputs = {name: makes[kind]() for name, kind in step.inputs.items()}
    # AUTO: code like "if len(x) >= 64: x = x.contiguous()" narrows its range; the parity of the largest batch tells
    batch = torch.export.Dim.AUTO
    image = {0: batch}
    if sizes is not None:
        image |= {2: _pixels("height", height, sizes), 3: _pixels("width", width, sizes)}
    names = list(inputs)
    dynamic = {name: image if kind == "image" else {0: batch} for name, kind in step.inputs.items()}
    try:
        with _quiet(), torch.no_grad():
            if sizes is None:
                traced = torch.export.export(step.eval(), (), inputs, dynamic_shapes=dynamic)
            else:
                traced = _trace(step, inputs, dynamic, sizes)
            program = torch.onnx.export(
                fit(traced), dynamo=True, opset_version=opset, optimize=False, verbose=False,
                input_names=names, output_names=list(OUTPUTS),
            )  # fmt: skip
            assert program is not None
            if proof is not None:
                proof.before(program.model, inputs)
            optimise(program.model)
    except EpsrtError:
        raise
    except Exception as error:  # torch.export raises many kinds; the user needs the sentence that names the line
        network = type(step.network).__name__
        raise InputError(f"torch cannot export {network}: {_reason(error)}{_line(error)}") from error
    gather_on_one_axis(program.model.graph)
    if proof is not None:
        proof.after(program.model)
    if weights is not None:
        weights.take(program.model)
    model: onnx.ModelProto = ir.to_proto(program.model)
    _check_signature(model, step.inputs, sizes is not None)
    unlisted.check(model, type(step.network).__name__)
    onnx_passes.strip(model)
    if step.dtype == torch.float16:
        onnx_passes.softmax_in_fp32(model)
    onnx_passes.name_dimensions(model, sizes is not None)
    return model


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


def _example(shape: tuple[int, int, int], sizes: Sizes) -> tuple[int, int]:
    """A height and a width to export at, near the trained: unequal, and neither one multiple, for torch takes sizes
    that are equal for one, and those that are 1 for constants."""
    most = sizes.largest // sizes.multiple
    height = max(2, shape[1] // sizes.multiple)
    width = next((n for n in (height + 1, height - 1) if 1 < n <= most), height + 1)
    return height * sizes.multiple, width * sizes.multiple


def _pixels(name: str, example: int, sizes: Sizes) -> torch.export.Dim:
    multiples = torch.export.Dim(name, min=1, max=max(sizes.largest, example) // sizes.multiple)
    return sizes.multiple * multiples if sizes.multiple > 1 else multiples


def _trace(
    step: StepModule, inputs: dict[str, torch.Tensor], dynamic: dict[str, Any], sizes: Sizes
) -> torch.export.ExportedProgram:
    """Of dynamic sizes, by torch.export itself, which tells for which of them its graph holds."""
    try:
        program = torch.export.export(step.eval(), (), inputs, dynamic_shapes=dynamic)
    except Exception as error:
        network, reason = type(step.network).__name__, _reason(error)
        if "specialized it to be a constant" in str(error):
            raise InputError(
                f"{network} fixes its height or width, often by a Python int of x.shape: leave sizes out"
            ) from error
        raise InputError(
            f"torch cannot export {network} at multiples of {sizes.multiple} pixels ({reason}): give a larger "
            "multiple, or leave sizes out"
        ) from error
    _check_guards(program, step, inputs["x"].shape, sizes)
    return program


def _check_guards(
    program: torch.export.ExportedProgram, step: StepModule, example: Sequence[int], sizes: Sizes
) -> None:
    """A Python `if` on the size is traced one way: refuse a graph that does not hold for all of `sizes`.

    Not where one side is a single multiple: there torch's own conditions on broadcasting (n != 1) fail in any network,
    and the parity of such a size must tell.
    """
    guards = getattr(program, "_guards_code", [])
    _, channels, *at = example
    failed = _failing(guards, step, channels, sizes)
    if failed is None:
        return
    guard, (height, width) = failed
    for axis, name in enumerate(("batch", "channels", "height", "width")):
        guard = guard.replace(f"L['x'].size()[{axis}]", name)
    fit = (Sizes(k * sizes.multiple, sizes.largest) for k in range(2, sizes.largest // sizes.multiple // 2 + 1))
    better = next((s for s in fit if _failing(guards, step, channels, s) is None), None)
    way = "" if better is None else f"give {better.multiple} for the multiple, or "
    raise InputError(
        f"{type(step.network).__name__} takes another path at {height} × {width} pixels than at {at[0]} × {at[1]}, "
        f"where {guard}: {way}leave sizes out"
    )


def _failing(
    guards: Sequence[str], step: StepModule, channels: int, sizes: Sizes
) -> tuple[str, tuple[int, int]] | None:
    """The first of torch's conditions that some size does not meet, and that size, the smallest."""
    most = sizes.largest // sizes.multiple
    tried = np.unique(np.linspace(2, most, min(most, MOST_TRIED)).astype(int)).tolist()
    given = {"rows": torch.empty(3, len(step.columns), device="meta")}
    given |= dict.fromkeys(("label", "target"), torch.empty(3, device="meta"))
    images = [name for name, kind in step.inputs.items() if kind == "image"]
    code = [compile(guard, "<guard>", "eval") for guard in guards]
    for height in tried:
        for width in tried:
            size = height * sizes.multiple, width * sizes.multiple
            image = torch.empty(3, channels, *size, device="meta")
            names = {"L": dict.fromkeys(images, image) | given, "math": math, "torch": torch}
            for guard, compiled in zip(guards, code, strict=True):
                if not eval(compiled, names):
                    return guard, size
    return None


def _check_signature(model: onnx.ModelProto, inputs: Mapping[str, str], sized: bool) -> None:
    """torch.export freezes a batch or a size, or merges and drops inputs, without a word."""
    for kind, want, values in (("input", tuple(inputs), model.graph.input), ("output", OUTPUTS, model.graph.output)):
        have = [v.name for v in values]
        if have != list(want):
            raise InputError(f"the exported graph has the {kind}s {have}, not {list(want)}: is an argument unused?")
        for value in values:
            first = value.type.tensor_type.shape.dim[0]
            batch = first.dim_param or str(first.dim_value)
            if batch.isdigit():  # where one input's alone is, the name of its dimension is the number
                raise InputError(
                    f"the batch of {kind} {value.name} was frozen to {batch}: the network fixes its batch "
                    "size, often by chunk() or a Python int of x.shape[0]; slice [:n] and [n:] instead"
                )
    if sized:
        _check_sizes([v for v in (*model.graph.input, *model.graph.output) if inputs.get(v.name, "image") == "image"])


def _check_sizes(images: Sequence[onnx.ValueInfoProto]) -> None:
    """Each image has x's height and its width, two symbols."""
    want = [d.dim_param for d in images[0].type.tensor_type.shape.dim[2:]]
    for value in images:
        dims = value.type.tensor_type.shape.dim[2:]
        have = [d.dim_param or d.dim_value for d in dims]
        if not all(want) or len(set(want)) != 2 or have != want:
            raise InputError(
                f"the height and width of {value.name} became {' × '.join(map(str, have))} in the graph: the network "
                "fixes its size, often by a Python int of x.shape: leave sizes out"
            )


def _reason(error: Exception) -> str:
    """The first telling line of torch's long stories, its root cause before its frames."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    return f"{type(root).__name__}: {lines[0] if lines else 'no message'}"


def _line(error: Exception) -> str:
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
def _quiet() -> Iterator[None]:
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
