"""Rewrites of an exported graph, in place but for `masked`. Each keeps its meaning; each says what it is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from epsrt.part import FREE, Port


def strip(model: onnx.ModelProto) -> None:
    """Drop stack traces, which name the exporting machine's paths, and what else no engine reads."""
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for item in (model, graph, *graph.node, *values, *model.functions):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    graph.name = "step"


def softmax_in_fp32(model: onnx.ModelProto) -> None:
    """Wrap each Softmax of an FP16 graph in casts to float and back: its sums lose digits in FP16."""

    types = types_of(model)

    def wrap(node: NodeProto) -> Sequence[NodeProto]:
        source, target = node.input[0], node.output[0]
        if types.get(source) != TensorProto.FLOAT16:  # the network has cast it itself
            return (node,)
        node.input[0], node.output[0] = f"{target}_in_float", f"{target}_float"
        return (
            helper.make_node("Cast", [source], [node.input[0]], to=TensorProto.FLOAT, name=f"{node.name}_up"),
            node,
            helper.make_node("Cast", [node.output[0]], [target], to=TensorProto.FLOAT16, name=f"{node.name}_down"),
        )

    replace_nodes(model, "Softmax", wrap)


def masked(model: onnx.ModelProto, columns: int) -> onnx.ModelProto:
    """A step graph of so many columns, with ka and kb behind them, that keeps known pixels (RePaint, arXiv 2201.09865).

    x' = mask·(ka·known + kb·z2) + (1 − mask)·x', known, mask and z2 inputs like x. The model that is given stays as it
    is; both read the same weights.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    (rows,) = (v for v in graph.input if v.name == "rows")
    (x,) = (v for v in graph.input if v.name == "x")
    rows.type.tensor_type.shape.dim[1].dim_value = columns + 2
    for name in ("known", "mask", "z2"):
        value = graph.input.add()
        value.CopyFrom(x)
        value.name = name
    for node in graph.node:
        for names in (node.input, node.output):
            renamed = [{"rows": "rows.step", "x_next": "x_next.step"}.get(name, name) for name in names]
            del names[:]
            names.extend(renamed)
    rank = len(x.type.tensor_type.shape.dim)
    numbers = {"mask.0": [0], "mask.axis": [1], "mask.pixels": [*range(2, rank)]}
    numbers |= {f"mask.{columns + i}": [columns + i] for i in range(3)}
    graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), name) for name, v in numbers.items())
    graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), "mask.one"))

    def column(name: str, first: int, last: int) -> list[onnx.NodeProto]:
        cut = helper.make_node("Slice", ["rows", f"mask.{first}", f"mask.{last}", "mask.axis"], [f"mask.{name}.column"])
        return [cut, helper.make_node("Unsqueeze", [f"mask.{name}.column", "mask.pixels"], [f"mask.{name}"])]

    steps = [
        ("Mul", ["mask.ka", "known"], "mask.signal"),
        ("Mul", ["mask.kb", "z2"], "mask.noise"),
        ("Add", ["mask.signal", "mask.noise"], "mask.noised"),
        ("Mul", ["mask", "mask.noised"], "mask.kept"),
        ("Sub", ["mask.one", "mask"], "mask.rest"),
        ("Mul", ["mask.rest", "x_next.step"], "mask.redrawn"),
        ("Add", ["mask.kept", "mask.redrawn"], "x_next"),
    ]
    first = helper.make_node("Slice", ["rows", "mask.0", f"mask.{columns}", "mask.axis"], ["rows.step"])
    nodes = [first, *graph.node, *column("ka", columns, columns + 1), *column("kb", columns + 1, columns + 2)]
    nodes += [helper.make_node(op, names, [out]) for op, names, out in steps]
    del graph.node[:]
    graph.node.extend(nodes)
    return made


def name_dimensions(model: onnx.ModelProto, ports: Sequence[Port], axes: Sequence[str]) -> None:
    """Call the free dimensions batch and what the axes of a sample are called: engines fix them by these names.

    torch has names such as s10 and 8*s53 for them. An input whose batch it could not prove to be x's has its own.
    `ports` are the inputs in order; the outputs are like the first.
    """
    graph = model.graph
    for i, value in enumerate((*graph.input, *graph.output)):
        port = ports[i] if i < len(ports) else ports[0]
        batch, *dims = value.type.tensor_type.shape.dim
        batch.dim_param = "batch"
        for dim, extent, name in zip(dims, port.shape, ("", *axes), strict=False):
            if extent == FREE:
                dim.dim_param = name


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of each tensor of a graph, as far as it says so."""
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return types | {t.name: t.data_type for t in graph.initializer}


def replace_nodes(model: onnx.ModelProto, kind: str, by: Callable[[NodeProto], Sequence[NodeProto]]) -> None:
    """Put `by(node)` in the place of each node of a kind."""
    nodes = [new for node in model.graph.node for new in (by(node) if node.op_type == kind else (node,))]
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
