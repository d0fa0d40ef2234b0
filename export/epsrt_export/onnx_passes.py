"""Rewrites of an exported graph, in place but for `masked`. Each keeps its meaning; each says what it is for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper


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

    types = _types(model)

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

    _replace(model, "Softmax", wrap)


def group_norm_by_instance_norm(model: onnx.ModelProto) -> None:
    """GroupNormalization as InstanceNormalization over [B, groups, rest], then scale and bias: five nodes.

    onnxruntime has a kernel for the latter and expands the former into forty; the digits step takes half the time.
    """
    graph = model.graph
    shapes = {
        v.name: [d.dim_value or None for d in v.type.tensor_type.shape.dim] for v in (*graph.value_info, *graph.input)
    }
    types = _types(model)
    made: dict[str, TensorProto] = {}

    def constant(name: str, value: np.ndarray) -> str:
        made.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def expand(node: NodeProto) -> Sequence[NodeProto]:
        (x, scale, bias), y = node.input, node.output[0]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        groups, shape = int(attributes["num_groups"]), shapes.get(x)
        if shape is None:
            return (node,)
        grouped = constant(f"norm_to_{groups}_groups", np.array([0, groups, -1], np.int64))
        one = constant(f"norm_one_{groups}", np.ones(groups, np.float32))
        zero = constant(f"norm_zero_{groups}", np.zeros(groups, np.float32))
        per_channel = constant(f"norm_channel_{len(shape)}d", np.array([-1] + [1] * (len(shape) - 2), np.int64))
        nodes = []
        if None in shape[1:]:  # height and width are dynamic
            back = f"{y}_shape"
            nodes.append(helper.make_node("Shape", [x], [back]))
        else:
            back = constant(f"norm_to_{'x'.join(map(str, shape[1:]))}", np.array([0, *shape[1:]], np.int64))
        step = f"{y}_norm"
        unit, half = f"{step}_back", types.get(x) == TensorProto.FLOAT16
        if half:  # the network norms its half features itself: the sums are in float all the same
            nodes.append(helper.make_node("Cast", [x], [f"{step}_float"], to=TensorProto.FLOAT))
            x, unit = f"{step}_float", f"{step}_back_float"
        return (
            *nodes,
            helper.make_node("Reshape", [x, grouped], [f"{step}_grouped"]),
            helper.make_node(
                "InstanceNormalization",
                [f"{step}_grouped", one, zero],
                [f"{step}_unit"],
                epsilon=attributes.get("epsilon", 1e-5),
            ),
            helper.make_node("Reshape", [f"{step}_unit", back], [unit]),
            *([helper.make_node("Cast", [unit], [f"{step}_back"], to=TensorProto.FLOAT16)] if half else []),
            helper.make_node("Reshape", [scale, per_channel], [f"{step}_scale"]),
            helper.make_node("Reshape", [bias, per_channel], [f"{step}_bias"]),
            helper.make_node("Mul", [f"{step}_back", f"{step}_scale"], [f"{step}_scaled"]),
            helper.make_node("Add", [f"{step}_scaled", f"{step}_bias"], [y]),
        )

    _replace(model, "GroupNormalization", expand)
    graph.initializer.extend(made.values())


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
    numbers = {"mask.0": [0], "mask.axis": [1], "mask.pixels": [2, 3]}
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


def name_dimensions(model: onnx.ModelProto, sized: bool) -> None:
    """Call the free dimensions batch and, where `sized`, height and width: engines fix them by these names.

    torch has names such as s10 and 8*s53 for them. The shapes inside the graph are dropped: engines infer them, they
    are a fifth of a small graph's bytes, and in a sized one an expression, 2*s53 say, would speak of another height.
    """
    graph = model.graph
    batch = re.compile(rf"\b{graph.input[0].type.tensor_type.shape.dim[0].dim_param}\b")
    graph.ClearField("value_info")
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = batch.sub("batch", dim.dim_param)
    if not sized:
        return
    for value in (*graph.input, *graph.output):
        for dim, name in zip(value.type.tensor_type.shape.dim[2:], ("height", "width"), strict=False):
            dim.dim_param = name


def _types(model: onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return types | {t.name: t.data_type for t in graph.initializer}


def _replace(model: onnx.ModelProto, kind: str, by: Callable[[NodeProto], Sequence[NodeProto]]) -> None:
    nodes = [new for node in model.graph.node for new in (by(node) if node.op_type == kind else (node,))]
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
