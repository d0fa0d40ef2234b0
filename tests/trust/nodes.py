"""Nodes that are added to a step graph: each takes an input and gives to an output, so that no engine leaves it out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import onnx
from onnx import TensorProto, helper

Edit = Callable[[onnx.ModelProto], None]
FLOAT, INT32, INT64, BOOL, STRING = (
    TensorProto.FLOAT,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.BOOL,
    TensorProto.STRING,
)


def constant(model: onnx.ModelProto, values: Any, kind: int = INT64, dims: tuple[int, ...] | None = None) -> str:
    name = f"hostile_{len(model.graph.initializer)}"
    values = values if isinstance(values, list) else [values]
    model.graph.initializer.append(helper.make_tensor(name, kind, (len(values),) if dims is None else dims, values))
    return name


def node(model: onnx.ModelProto, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
    names = [f"hostile_{len(model.graph.node)}_{i}" for i in range(outputs)]
    model.graph.node.append(helper.make_node(op, inputs, names, **attributes))
    return names[0]


def of_input(model: onnx.ModelProto, values: Any, kind: int = INT64) -> str:
    """A constant plus zero times an input: no engine folds it."""
    zero = node(model, "ReduceSum", node(model, "Mul", "rows", constant(model, 0.0, FLOAT)), keepdims=0)
    return node(model, "Add", constant(model, values, kind), node(model, "Cast", zero, to=kind))


def to_output(model: onnx.ModelProto, name: str) -> None:
    """Add zero times the sum of a value to x0."""
    amount = node(model, "Mul", node(model, "Cast", name, to=FLOAT), constant(model, 0.0, FLOAT))
    total = node(model, "ReduceSum", amount, keepdims=0)
    for each in model.graph.node:
        for i, out in enumerate(each.output):
            if out == "x0":
                each.output[i] = "honest_x0"
        for i, taken in enumerate(each.input):
            if taken == "x0":
                each.input[i] = "honest_x0"
    model.graph.node.append(helper.make_node("Add", ["honest_x0", total], ["x0"]))


def divides(model: onnx.ModelProto, op: str, a: int, b: int, kind: int = INT32, folded: bool = False) -> None:
    make = constant if folded else of_input
    to_output(model, node(model, op, make(model, a, kind), make(model, b, kind)))


def convolves(model: onnx.ModelProto, op: str, **attributes: Any) -> None:
    weight = constant(model, [1.0] * 9, FLOAT, (1, 1, 3, 3))
    image = node(model, "Reshape", of_input(model, [1.0] * 64, FLOAT), constant(model, [1, 1, 8, 8]))
    to_output(model, node(model, op, image, weight, **attributes))


def image(op: str, *more: Any, **attributes: Any) -> Edit:
    """An operator on a [1, 1, 8, 8] image; `more` are (values, type) of its other inputs."""
    return partial(_operates, op=op, extents=[1, 1, 8, 8], more=more, attributes=attributes)


def vector(op: str, *more: Any, **attributes: Any) -> Edit:
    """An operator on 64 numbers; `more` as of `image`."""
    return partial(_operates, op=op, extents=[64], more=more, attributes=attributes)


def _operates(
    model: onnx.ModelProto, op: str, extents: list[int], more: tuple[Any, ...], attributes: dict[str, Any]
) -> None:
    of = node(model, "Reshape", of_input(model, [1.0] * 64, FLOAT), constant(model, extents))
    inputs = ["" if each is None else of_input(model, *each) for each in more]
    to_output(model, node(model, op, of, *inputs, outputs=2 if op == "TopK" else 1, **attributes))


def gathers_nd(model: onnx.ModelProto, index: int) -> None:
    data = of_input(model, [1.0] * 4, FLOAT)
    to_output(
        model, node(model, "GatherND", data, node(model, "Unsqueeze", of_input(model, index), constant(model, 0)))
    )


def loops(model: onnx.ModelProto, trips: int, nested: int = 0) -> None:
    def body(depth: int) -> onnx.GraphProto:
        takes = [
            helper.make_tensor_value_info(f"i{depth}", INT64, ()),
            helper.make_tensor_value_info(f"c{depth}", BOOL, ()),
        ]
        takes.append(helper.make_tensor_value_info(f"v{depth}", FLOAT, (1,)))
        nodes = [helper.make_node("Identity", [f"c{depth}"], [f"d{depth}"])]
        if depth < nested:
            nodes += [
                helper.make_node("Loop", ["trips", f"c{depth}", f"v{depth}"], [f"w{depth}"], body=body(depth + 1))
            ]
        else:
            nodes += [helper.make_node("Add", [f"v{depth}", f"v{depth}"], [f"w{depth}"])]
        gives = [
            helper.make_tensor_value_info(f"d{depth}", BOOL, ()),
            helper.make_tensor_value_info(f"w{depth}", FLOAT, (1,)),
        ]
        return helper.make_graph(nodes, f"body{depth}", takes, gives)

    model.graph.initializer.append(helper.make_tensor("trips", INT64, (), [trips]))
    go_on = constant(model, True, BOOL, ())
    to_output(model, node(model, "Loop", "trips", go_on, of_input(model, [0.0], FLOAT), body=body(0)))


def branches(model: onnx.ModelProto) -> None:
    def branch(name: str) -> onnx.GraphProto:
        gives = [helper.make_tensor_value_info(name, FLOAT, (1,))]
        tensor = helper.make_tensor("t", FLOAT, (1,), [1.0])
        return helper.make_graph([helper.make_node("Constant", [], [name], value=tensor)], name, [], gives)

    to_output(
        model, node(model, "If", constant(model, True, BOOL, ()), then_branch=branch("a"), else_branch=branch("b"))
    )
