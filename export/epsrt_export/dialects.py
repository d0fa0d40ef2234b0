"""A step graph in the dialects of engines: the same step, with each norm in the operator that the engine runs fastest.

cpu       InstanceNormalization over [B, groups, rest], then scale and bias, for every engine without a better one
tensorrt  ONNX's GroupNormalization (opset 21), which TensorRT has a layer for
cuda      com.microsoft.GroupNorm of onnxruntime's CUDA provider: channels last, sums in float, SiLU inside
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from epsrt_export.onnx_passes import replace_nodes, types_of

NORM = "GroupNormalization"  # what torch exports
MICROSOFT = "com.microsoft"
WIDEST = 512  # channels of a group that onnxruntime's kernel takes


def in_dialects(model: onnx.ModelProto) -> dict[str, onnx.ModelProto]:
    """A step graph as torch exported it, in each dialect in which it differs from "cpu". `model` is taken apart.

    Its value_info must be there, and goes: engines infer shapes, these are a fifth of a small graph's bytes, and in a
    sized graph an expression, 2*s53 say, would speak of another height.
    """
    made = {"cpu": model}
    if any(node.op_type == NORM for node in model.graph.node):
        for dialect in ("tensorrt", "cuda"):
            made[dialect] = onnx.ModelProto()
            made[dialect].CopyFrom(model)
        _fuse(made["cuda"])
        _by_instance_norm(made["cuda"])  # those that the kernel does not take
        _by_instance_norm(model)
    for each in made.values():
        each.graph.ClearField("value_info")
    return made


def in_standard(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a graph with ONNX's own operators for com.microsoft.GroupNorm, by which a CPU proves the dialect."""
    made = onnx.ModelProto()
    made.CopyFrom(model)

    def expand(node: NodeProto) -> Sequence[NodeProto]:
        (x, scale, bias), (y,) = node.input, node.output
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        parts: list[tuple[str, dict[str, Any]]] = [
            ("Cast", {"to": TensorProto.FLOAT}),
            ("Transpose", {"perm": [0, 3, 1, 2]}),
            (NORM, {"num_groups": given["groups"], "epsilon": given["epsilon"]}),
            *([("Silu", {})] if given["activation"] else []),
            ("Transpose", {"perm": [0, 2, 3, 1]}),
            ("CastLike", {}),
        ]
        names = [x, *(f"{y}_standard_{i}" for i in range(len(parts) - 1)), y]
        nodes = []
        for (kind, attributes), (source, target) in zip(parts, pairwise(names), strict=True):
            if kind == "Silu":
                nodes.append(helper.make_node("Sigmoid", [source], [f"{target}_sigmoid"]))
                nodes.append(helper.make_node("Mul", [source, f"{target}_sigmoid"], [target]))
                continue
            more = {NORM: [scale, bias], "CastLike": [x]}.get(kind, [])
            nodes.append(helper.make_node(kind, [source, *more], [target], **attributes))
        return nodes

    replace_nodes(made, "GroupNorm", expand)
    return made


class _Wiring:
    """Who makes and who reads each tensor of a graph."""

    def __init__(self, graph: onnx.GraphProto):
        self.constants = {t.name: t for t in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[NodeProto]] = {v.name: [NodeProto()] for v in graph.output}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def cast_before(self, name: str) -> NodeProto | None:
        node = self.makers.get(name)
        return node if node is not None and node.op_type == "Cast" else None

    def only_reader(self, name: str) -> NodeProto | None:
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 else None

    def silu(self, name: str) -> tuple[NodeProto, NodeProto] | None:
        """The Sigmoid and the Mul that are all that reads a tensor."""
        readers = {node.op_type: node for node in self.readers.get(name, [])}
        if len(self.readers.get(name, [])) != 2 or set(readers) != {"Sigmoid", "Mul"}:
            return None
        sigmoid, product = readers["Sigmoid"], readers["Mul"]
        fits = set(product.input) == {name, sigmoid.output[0]} and self.only_reader(sigmoid.output[0]) is product
        return (sigmoid, product) if fits else None


@dataclass(frozen=True)
class _Chain:
    """A norm with the casts around it and the SiLU behind it: what one GroupNorm takes the place of."""

    x: str
    y: str
    nodes: tuple[NodeProto, ...]  # the last one is where the new nodes go
    silu: bool


def _chain(norm: NodeProto, wiring: _Wiring, types: dict[str, int]) -> _Chain:
    x, y, nodes = norm.input[0], norm.output[0], [norm]
    up, down = wiring.cast_before(x), wiring.only_reader(y)
    half = up is not None and types.get(up.input[0]) == TensorProto.FLOAT16
    if half and down is not None and down.op_type == "Cast" and types.get(down.output[0]) == TensorProto.FLOAT16:
        assert up is not None
        x, y = up.input[0], down.output[0]
        nodes += [down]
    silu = wiring.silu(y)
    if silu is not None:
        nodes += silu
        y = silu[1].output[0]
    return _Chain(x, y, tuple(nodes), silu is not None)


def _fuse(model: onnx.ModelProto) -> None:
    """Every norm that onnxruntime's kernel takes as com.microsoft.GroupNorm, between transpositions to channels last.

    The kernel reads two channels at once, and wants scale and bias as float constants. Between a norm and a convolution
    the transpositions go, where onnxruntime prefers NHWC.
    """
    graph, types, ranks = model.graph, types_of(model), _ranks(model)
    wiring = _Wiring(graph)
    put: dict[int, list[NodeProto]] = {}  # by the node whose place they take
    gone: set[int] = set()
    for norm in graph.node:
        if norm.op_type != NORM or not _fits(norm, wiring, ranks):
            continue
        chain = _chain(norm, wiring, types)
        put[id(chain.nodes[-1])] = _fused(norm, chain, ranks[norm.input[0]])
        gone |= {id(node) for node in chain.nodes}
    nodes = [new for node in graph.node for new in put.get(id(node), [] if id(node) in gone else [node])]
    _drop_unread(graph, nodes)
    if put:
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


def _fits(norm: NodeProto, wiring: _Wiring, ranks: dict[str, int]) -> bool:
    parts = [wiring.constants.get(name) for name in norm.input[1:]]
    if any(part is None or part.data_type != TensorProto.FLOAT for part in parts):
        return False
    assert parts[0] is not None
    groups = next(helper.get_attribute_value(a) for a in norm.attribute if a.name == "num_groups")
    wide = parts[0].dims[0] // groups
    return ranks.get(norm.input[0]) in (3, 4) and wide % 2 == 0 and wide <= WIDEST


def _fused(norm: NodeProto, chain: _Chain, rank: int) -> list[NodeProto]:
    given = {a.name: helper.get_attribute_value(a) for a in norm.attribute}
    name = norm.output[0]
    last = [0, 2, 3, 1] if rank == 4 else [0, 2, 1]
    first = [0, 3, 1, 2] if rank == 4 else [0, 2, 1]
    steps = [
        ("Transpose", [], {"perm": last}),
        *([("Unsqueeze", ["norm_axis"], {})] if rank == 3 else []),
        ("GroupNorm", [*norm.input[1:]], {
            "domain": MICROSOFT, "groups": given["num_groups"], "epsilon": given.get("epsilon", 1e-5),
            "activation": int(chain.silu), "channels_last": 1,
        }),
        *([("Squeeze", ["norm_axis"], {})] if rank == 3 else []),
        ("Transpose", [], {"perm": first}),
    ]  # fmt: skip
    names = [chain.x, *(f"{name}_last_{i}" for i in range(len(steps) - 1)), chain.y]
    return [
        helper.make_node(kind, [source, *more], [target], name=f"{target}_{kind}", **attributes)
        for (kind, more, attributes), (source, target) in zip(steps, pairwise(names), strict=True)
    ]


def _drop_unread(graph: onnx.GraphProto, nodes: list[NodeProto]) -> None:
    """Make `nodes` the graph's, without those that nothing reads any longer, and the constants of these."""
    outputs, count = {v.name for v in graph.output}, -1
    while count != len(nodes):
        count, read = len(nodes), outputs | {name for node in nodes for name in node.input}
        nodes = [node for node in nodes if read & set(node.output)]
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    if any("norm_axis" in node.input for node in nodes):
        graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "norm_axis"))
    constants = [TensorProto.FromString(t.SerializeToString()) for t in graph.initializer if t.name in read]
    graph.ClearField("node")
    graph.ClearField("initializer")
    graph.node.extend(copies)
    graph.initializer.extend(constants)


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    values = (*model.graph.value_info, *model.graph.input)
    return {v.name: len(v.type.tensor_type.shape.dim) for v in values}


def _by_instance_norm(model: onnx.ModelProto) -> None:
    """Every norm as InstanceNormalization over [B, groups, rest], then scale and bias: five nodes.

    onnxruntime's CPU provider has a kernel for it and expands GroupNormalization into forty nodes: half the time.
    """
    graph = model.graph
    shapes = {
        v.name: [d.dim_value or None for d in v.type.tensor_type.shape.dim] for v in (*graph.value_info, *graph.input)
    }
    types = types_of(model)
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

    replace_nodes(model, NORM, expand)
    graph.initializer.extend(made.values())
