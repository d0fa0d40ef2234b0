"""FLOPs and bytes of a step, counted from its step graph. Needs onnx; weights are not read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING

from epsrt.bench.report import Cost
from epsrt.bundle import Bundle
from epsrt.engines import graph_precision_of
from epsrt.errors import InputError
from epsrt.types import Shape
from epsrt_command.foreign import reading

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# what multiplies and adds, and is not counted below
OTHERS = (
    "Attention", "BitShift", "ConvInteger", "DeformConv", "Einsum", "GRU", "If", "LSTM", "Loop", "MatMulInteger",
    "QLinearConv", "QLinearMatMul", "RNN", "Scan",
)  # fmt: skip


def count(bundle: Bundle, precision: str, batch: int) -> Cost:
    """The cost of a plain step in a precision of an engine.

    Raises InputError where onnx is missing, or the graph holds what is not counted.
    """
    try:
        import onnx
    except ModuleNotFoundError:
        raise InputError("onnx is missing, which reads step graphs: pip install onnx") from None
    graph = bundle.graph(graph_precision_of(precision))
    data = bundle.graph_bytes(graph)
    with reading(bundle.path / graph.file, "cannot be counted", "export it again"):
        model = onnx.load_from_string(data)
        return count_graph(model, batch, bundle.manifest.shape, half=precision == "bf16")


def count_graph(model: ModelProto, batch: int, shape: Shape, half: bool = False) -> Cost:
    """The cost of a step graph for a batch of images C, H, W; `half`: its floats are computed in two bytes.

    Raises InputError where it holds what is not counted. `model` is changed: its shapes become fixed.
    """
    from onnx import TensorProto, helper, shape_inference

    graph = model.graph
    for node in graph.node:
        if node.op_type in OTHERS or node.domain not in ("", "ai.onnx"):
            name = " ".join(filter(None, (node.domain, node.op_type)))
            raise InputError(f"its step graph has {name}, which is not counted")
    _fix(model, {"batch": batch, "height": shape[1], "width": shape[2]})
    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    weights = {tensor.name for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    tensors: dict[str, tuple[tuple[int, ...], int]] = {t.name: (tuple(t.dims), t.data_type) for t in graph.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kind = value.type.tensor_type
        if all(d.HasField("dim_value") for d in kind.shape.dim):
            tensors[value.name] = tuple(d.dim_value for d in kind.shape.dim), kind.elem_type

    def extents(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise InputError(f"its step graph does not tell the shape of {name}")
        return tensors[name][0]

    def stored(name: str) -> str:
        """What is read for a tensor: where it is dequantized, its integers."""
        while (node := made_by.get(name)) is not None and node.op_type == "DequantizeLinear":
            name = node.input[0]
        return name

    def size(name: str) -> int:
        """Bytes."""
        elements, kind = prod(extents(name)), tensors[name][1]
        return elements * (2 if half and kind == TensorProto.FLOAT else helper.tensor_dtype_to_np_dtype(kind).itemsize)

    flops = moved = 0
    read = set[str]()
    for node in graph.node:
        flops_of_node = _flops(node, extents)
        if flops_of_node:
            flops += flops_of_node
            values = [stored(name) for name in (*node.input, *node.output) if name]
            moved += sum(size(name) for name in values if name not in weights)
            read |= weights.intersection(values)
    return Cost(flops=flops, bytes=moved + sum(map(size, read)))


def _flops(node: NodeProto, extents: Callable[[str], tuple[int, ...]]) -> int:
    """0 for what neither convolves nor multiplies matrices."""
    match node.op_type:
        case "Conv":
            return 2 * prod(extents(node.output[0])) * prod(extents(node.input[1])[1:])
        case "ConvTranspose":
            return 2 * prod(extents(node.input[0])) * prod(extents(node.input[1])[1:])
        case "MatMul":
            return 2 * prod(extents(node.output[0])) * extents(node.input[0])[-1]
        case "Gemm":
            across = any(a.name == "transA" and a.i for a in node.attribute)
            return 2 * prod(extents(node.output[0])) * extents(node.input[0])[0 if across else 1]
    return 0


def _fix(model: ModelProto, numbers: Mapping[str, int]) -> None:
    """Give a graph's free dimensions numbers, by their names."""
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in numbers:
                dim.dim_value = numbers[dim.dim_param]
