"""Small random edits of an ONNX graph: of nodes, attributes, links, names, types, extents, weights and headers."""

from __future__ import annotations

import random

import onnx
from onnx import helper

OPERATORS = (
    "Add", "Sub", "Mul", "Div", "Mod", "Pow", "Sqrt", "Exp", "Log", "Neg", "Abs", "Sin", "Cos", "Tanh", "Sigmoid",
    "Relu", "Gelu", "Erf", "Softmax", "MatMul", "Gemm", "Conv", "ConvTranspose", "Concat", "Split", "Slice",
    "Gather", "GatherND", "GatherElements", "ScatterND", "ScatterElements", "Reshape", "Transpose", "Squeeze",
    "Unsqueeze", "Expand", "Tile", "Pad", "Resize", "Cast", "Identity", "Where", "Equal", "Greater", "Not", "And",
    "Or", "Clip", "Min", "Max", "ReduceSum", "ReduceMean", "ReduceMax", "GroupNormalization",
    "InstanceNormalization", "LayerNormalization", "BatchNormalization", "MaxPool", "AveragePool",
    "GlobalAveragePool", "Range", "Shape", "Size", "Loop", "If", "Scan", "ConstantOfShape", "Constant", "NonZero",
    "TopK", "Einsum", "CumSum", "OneHot", "Trilu", "DepthToSpace", "RandomNormal", "QuantizeLinear", "Dropout",
    "LSTM",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 7, 99, 2**31 - 1, -(2**31), 2**31, 2**40, 2**63 - 1, -(2**63))
FLOATS = (0.0, -1.0, 1e38, -1e38, 1e-45, float("nan"), float("inf"), -float("inf"))
NAMES = ("", "x", "m", "z", "rows", "x0", "x_next", "m_next", "nothing", "a" * 1000, "\0")


def edited(model: onnx.ModelProto, rng: random.Random) -> str:
    """Change a few things of a graph, and say which."""
    return "; ".join(rng.choice(EDITS)(model, rng) for _ in range(rng.choice((1, 1, 1, 2, 4))))


def _operator(model: onnx.ModelProto, rng: random.Random) -> str:
    changed = rng.choice(model.graph.node)
    old, changed.op_type = changed.op_type, rng.choice(OPERATORS)
    return f"{changed.op_type} for {old}"


def _attribute(model: onnx.ModelProto, rng: random.Random) -> str:
    having = [n for n in model.graph.node if n.attribute]
    changed = rng.choice(having) if having else model.graph.node[0]
    if not changed.attribute:
        return "nothing"
    attribute = rng.choice(changed.attribute)
    what = f"{changed.op_type}.{attribute.name}"
    if rng.random() < 0.15:
        changed.attribute.remove(attribute)
        return f"{what} left out"
    if attribute.type == onnx.AttributeProto.INT:
        attribute.i = rng.choice(NUMBERS)
    elif attribute.type == onnx.AttributeProto.INTS and attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(NUMBERS)
        if rng.random() < 0.2:
            attribute.ints.extend([rng.choice(NUMBERS)] * rng.choice((1, 100)))
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = rng.choice(FLOATS)
    elif attribute.type == onnx.AttributeProto.STRING:
        attribute.s = rng.choice((b"", b"\xff", b"linear", b"a" * 1000))
    elif attribute.type == onnx.AttributeProto.TENSOR:
        _change_tensor(attribute.t, rng)
    else:
        attribute.type = rng.randrange(12)
    return what


def _added_attribute(model: onnx.ModelProto, rng: random.Random) -> str:
    changed, name = (
        rng.choice(model.graph.node),
        rng.choice(("axis", "group", "to", "strides", "pads", "blocksize", "perm")),
    )
    value = (
        [rng.choice(NUMBERS)] * rng.choice((1, 2, 4)) if name in ("strides", "pads", "perm") else rng.choice(NUMBERS)
    )
    changed.attribute.append(helper.make_attribute(name, value))
    return f"{changed.op_type}.{name} = {value}"


def _input(model: onnx.ModelProto, rng: random.Random) -> str:
    changed = rng.choice([n for n in model.graph.node if n.input])
    known = (
        [name for n in model.graph.node for name in n.output] + [t.name for t in model.graph.initializer] + list(NAMES)
    )
    match rng.randrange(4):
        case 0:
            del changed.input[rng.randrange(len(changed.input))]
        case 1:
            changed.input.append(rng.choice(known))
        case 2 if len(changed.input) > 1:
            changed.input.insert(0, changed.input.pop())
        case _:
            changed.input[rng.randrange(len(changed.input))] = rng.choice(known)
    return f"inputs of {changed.op_type}"


def _output(model: onnx.ModelProto, rng: random.Random) -> str:
    changed = rng.choice(model.graph.node)
    changed.output[rng.randrange(len(changed.output))] = rng.choice((*NAMES, *rng.choice(model.graph.node).output))
    return f"outputs of {changed.op_type}"


def _node(model: onnx.ModelProto, rng: random.Random) -> str:
    changed = rng.choice(model.graph.node)
    what = changed.op_type
    match rng.randrange(3):
        case 0:
            model.graph.node.remove(changed)
            return f"{what} left out"
        case 1:
            model.graph.node.insert(rng.randrange(len(model.graph.node)), changed)
            return f"{what} twice"
        case _:
            nodes = list(model.graph.node)
            rng.shuffle(nodes)
            del model.graph.node[:]
            model.graph.node.extend(nodes)
            return "another order"


def _initializer(model: onnx.ModelProto, rng: random.Random) -> str:
    tensor = rng.choice(model.graph.initializer)
    _change_tensor(tensor, rng)
    return f"initializer {tensor.name[:40]}"


def _change_tensor(tensor: onnx.TensorProto, rng: random.Random) -> None:
    match rng.randrange(6):
        case 0:
            tensor.data_type = rng.randrange(30)
        case 1 if tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(NUMBERS)
        case 2:
            tensor.dims.append(rng.choice(NUMBERS))
        case 3 if tensor.external_data:
            entry = rng.choice(tensor.external_data)
            entry.value = rng.choice((*map(str, NUMBERS), "", "weights-fp16.bin", "../x", "*/_ORT_MEM_ADDR_/*", "ten"))
        case 4:
            tensor.raw_data = rng.randbytes(rng.choice((0, 1, 4, 64)))
        case _:
            tensor.name = rng.choice(NAMES)


def _port(model: onnx.ModelProto, rng: random.Random) -> str:
    port = rng.choice([*model.graph.input, *model.graph.output])
    tensor = port.type.tensor_type
    match rng.randrange(3):
        case 0:
            tensor.elem_type = rng.randrange(30)
        case 1 if tensor.shape.dim:
            rng.choice(tensor.shape.dim).dim_value = rng.choice(NUMBERS)
        case _:
            port.name = rng.choice(NAMES)
    return f"port {port.name[:20]!r}"


def _header(model: onnx.ModelProto, rng: random.Random) -> str:
    match rng.randrange(4):
        case 0:
            rng.choice(model.opset_import).version = rng.choice(NUMBERS)
        case 1:
            model.ir_version = rng.choice(NUMBERS)
        case 2:
            rng.choice(model.graph.node).domain = rng.choice(("com.microsoft", "ai.onnx", "evil", "ai.onnx.ml"))
        case _:
            model.metadata_props.add(key="a" * 1000, value="\0" * 100_000)
    return "header"


EDITS = (
    _operator,
    _attribute,
    _attribute,
    _added_attribute,
    _input,
    _input,
    _output,
    _node,
    _initializer,
    _initializer,
    _port,
    _header,
)
