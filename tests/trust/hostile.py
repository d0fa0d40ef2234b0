"""Step graphs that mean harm: each is a step of a bundle with something added that crashes, hangs or reads elsewhere.

What is added feeds on an input and feeds an output, unless it says that it is constant: an engine may fold constants,
and leave out what nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import onnx
from onnx import TensorProto, helper

Edit = Callable[[onnx.ModelProto], None]
INT_MIN = -(2**31)
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


def lies_elsewhere(model: onnx.ModelProto, location: str, offset: str = "0", length: str | None = None) -> None:
    """An initializer of 1,024 floats that an engine shall read at another place."""
    tensor = TensorProto(name="elsewhere", data_type=FLOAT, dims=[1024], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    model.graph.initializer.append(tensor)
    to_output(model, "elsewhere")


def moved(model: onnx.ModelProto, key: str, value: str) -> None:
    """Every initializer outside of the graph has another location, offset or length."""
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value


def declared(model: onnx.ModelProto, dims: list[int], kind: int = FLOAT) -> None:
    """An initializer that says other extents than it has bytes for."""
    model.graph.initializer.append(TensorProto(name="declared", data_type=kind, dims=dims, raw_data=b"\0" * 4))
    to_output(model, "declared")


def with_names(model: onnx.ModelProto, name: str) -> None:
    model.graph.node.append(helper.make_node("Identity", ["x"], [name], name=name))


def runs_in_circles(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Add", ["circle", "x"], ["circle2"]))
    model.graph.node.append(helper.make_node("Add", ["circle2", "x"], ["circle"]))


def chain(model: onnx.ModelProto, length: int, op: str = "Neg") -> None:
    last = of_input(model, [1.0], FLOAT)
    for _ in range(length):
        last = node(model, op, last)
    to_output(model, last)


def doubles(model: onnx.ModelProto, times: int) -> None:
    """A tensor that is concatenated with itself again and again."""
    last = of_input(model, [1.0] * 64, FLOAT)
    for _ in range(times):
        last = node(model, "Concat", last, last, axis=0)
    to_output(model, last)


def calls_itself(model: onnx.ModelProto) -> None:
    inner = helper.make_node("Again", ["a"], ["b"], domain="local")
    opset = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    model.functions.append(helper.make_function("local", "Again", ["a"], ["b"], [inner], opset))
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node.append(helper.make_node("Again", ["x"], ["again"], domain="local"))


def of_domain(model: onnx.ModelProto, domain: str, op: str) -> None:
    model.opset_import.append(helper.make_opsetid(domain, 1))
    to_output(model, node(model, op, of_input(model, [1.0], FLOAT), domain=domain))


def of_opset(model: onnx.ModelProto, version: int) -> None:
    model.opset_import[0].version = version


def of_ir(model: onnx.ModelProto, version: int) -> None:
    model.ir_version = version


GRAPHS: dict[str, Edit] = {
    **{
        f"{op} INT_MIN by −1{how}": partial(divides, op=op, a=INT_MIN, b=-1, folded=folded)
        for op in ("Div", "Mod")
        for how, folded in (("", False), (", constant", True))
    },
    **{
        f"{op} 1 by 0{how}": partial(divides, op=op, a=1, b=0, folded=folded)
        for op in ("Div", "Mod")
        for how, folded in (("", False), (", constant", True))
    },
    "Div of int64": partial(divides, op="Div", a=-(2**63), b=-1, kind=INT64),
    "Mod of int64": partial(divides, op="Mod", a=-(2**63), b=-1, kind=INT64),
    **{
        f"{op} of group {group}": partial(convolves, op=op, group=group)
        for op in ("Conv", "ConvTranspose")
        for group in (0, -1, 2**31, 2**62)
    },
    **{
        f"{op} with {name} {value}": partial(convolves, op=op, **{name: value})
        for op in ("Conv", "ConvTranspose")
        for name, value in (
            ("strides", [0, 0]),
            ("dilations", [0, 0]),
            ("pads", [-9, -9, -9, -9]),
            ("pads", [2**40] * 4),
            ("kernel_shape", [0, 0]),
            ("strides", [-1, -1]),
            ("dilations", [2**40, 2**40]),
        )
    },
    "ConvTranspose of a huge output": partial(convolves, op="ConvTranspose", output_shape=[2**30, 2**30]),
    **{f"GatherND at {i}": partial(gathers_nd, index=i) for i in (4, -5, 2**40, -(2**62))},
    **{
        f"{op} at {i}": vector(op, ([i], INT64), axis=0)
        for op in ("Gather", "GatherElements")
        for i in (64, -65, 2**40)
    },
    **{
        f"{op} at {i}": vector(op, ([i], INT64), ([1.0], FLOAT), axis=0)
        for op in ("ScatterElements",)
        for i in (64, 2**40, -(2**40))
    },
    "Slice by 0": vector("Slice", ([0], INT64), ([64], INT64), ([0], INT64), ([0], INT64)),
    "Slice of INT_MIN": vector("Slice", ([-(2**63)], INT64), ([2**63 - 1], INT64), ([0], INT64), ([-(2**63)], INT64)),
    "Split of 0 parts": vector("Split", axis=0, num_outputs=0),
    "TopK of −1": vector("TopK", ([-1], INT64)),
    "TopK of 2^40": vector("TopK", ([2**40], INT64)),
    "CumSum along 9": vector("CumSum", ([9], INT64)),
    "Tile 2^40 times": vector("Tile", ([2**40], INT64)),
    "Expand to 2^50": vector("Expand", ([2**44, 64], INT64)),
    "Reshape to −5": vector("Reshape", ([-5, 64], INT64)),
    "Pad by 2^40": vector("Pad", ([2**40, 2**40], INT64)),
    "Pad by −100": vector("Pad", ([-100, -100], INT64)),
    "Pad by reflection": vector("Pad", ([1000, 1000], INT64), mode="reflect"),
    "LayerNormalization along 9": vector("LayerNormalization", ([1.0], FLOAT), axis=9),
    "Softmax along 99": vector("Softmax", axis=99),
    "Concat along −9": vector("Concat", ([1.0], FLOAT), axis=-9),
    "Flatten along 99": vector("Flatten", axis=99),
    "Transpose by 7": vector("Transpose", perm=[7]),
    "Transpose by nothing of an image": image("Transpose", perm=[0, 0, 0, 0]),
    "Einsum of nonsense": vector("Einsum", equation="a,b,,->" * 100),
    "Cast to nothing": vector("Cast", to=999),
    "Squeeze along 64": image("Squeeze", ([64], INT64)),
    "Unsqueeze along −99": image("Unsqueeze", ([-99], INT64)),
    "ReduceSum along 99": image("ReduceSum", ([99], INT64)),
    "Resize by 10^9": image("Resize", None, ([1.0, 1.0, 1e9, 1e9], FLOAT)),
    "Resize by 0": image("Resize", None, ([0.0, 0.0, 0.0, 0.0], FLOAT)),
    "Resize by NaN": image("Resize", None, ([1.0, 1.0, float("nan"), float("nan")], FLOAT)),
    "DepthToSpace by 0": image("DepthToSpace", blocksize=0),
    "SpaceToDepth by 0": image("SpaceToDepth", blocksize=0),
    "GroupNormalization of 0 groups": image("GroupNormalization", ([1.0], FLOAT), ([0.0], FLOAT), num_groups=0),
    "InstanceNormalization of other channels": image("InstanceNormalization", ([1.0] * 7, FLOAT), ([0.0] * 3, FLOAT)),
    "LRN of size 0": image("LRN", size=0),
    **{
        f"{op} with {name} {value}": image(op, **{"kernel_shape": [2, 2], name: value})
        for op in ("MaxPool", "AveragePool")
        for name, value in (
            ("kernel_shape", [0, 0]),
            ("strides", [0, 0]),
            ("pads", [2**40] * 4),
            ("kernel_shape", [2**40] * 2),
        )
    },
    "GridSample far away": image("GridSample", ([1e30, -1e30], FLOAT)),
    "NonMaxSuppression": image("NonMaxSuppression", ([1.0], FLOAT), ([2**62], INT64)),
    "OneHot of depth −1": vector("OneHot", ([-1], INT64), ([0.0, 1.0], FLOAT)),
    "OneHot of depth 2^40": vector("OneHot", ([2**40], INT64), ([0.0, 1.0], FLOAT)),
    "Loop without end": partial(loops, trips=2**62),
    "Loops in Loops": partial(loops, trips=2**20, nested=5),
    "Loop 20 deep": partial(loops, trips=1, nested=20),
    "If": branches,
    **{
        f"weights at {location or 'nowhere'}": partial(lies_elsewhere, location=location, offset=offset)
        for location, offset in (
            ("*/_ORT_MEM_ADDR_/*", "4096"),
            ("*/_ORT_MEM_ADDR_/*", "140737488355328"),
            ("/etc/passwd", "0"),
            ("../manifest.json", "0"),
            ("manifest.json", "0"),
            ("/dev/zero", "0"),
            ("/dev/random", "0"),
            ("", "0"),
            (".", "0"),
            ("weights-fp32.bin/../manifest.json", "0"),
            ("a" * 5000, "0"),
            ("\0", "0"),
            ("weights-fp32.bin", "18446744073709551615"),
            ("weights-fp32.bin", "-1"),
            ("weights-fp32.bin", "99999999"),
            ("weights-fp32.bin", "ten"),
        )
    },
    **{
        f"all weights of {key} {value[:20]}": partial(moved, key=key, value=value)
        for key, value in (
            ("offset", "-1"),
            ("offset", "1"),
            ("offset", "9223372036854775807"),
            ("offset", ""),
            ("length", "0"),
            ("length", "-1"),
            ("length", "18446744073709551615"),
            ("location", "golden.safetensors"),
        )
    },
    **{
        f"an initializer of {dims}": partial(declared, dims=dims)
        for dims in ([2**62, 2**62], [-1], [0], [2**31, 2**31, 4], [1024], [1] * 1000, [2**63 - 1])
    },
    "an initializer of words": partial(declared, dims=[1], kind=STRING),
    "an initializer of no type": partial(declared, dims=[1], kind=0),
    "an initializer of type 99": partial(declared, dims=[1], kind=99),
    "a name of a megabyte": partial(with_names, name="a" * (1 << 20)),
    "no name": partial(with_names, name=""),
    "a name with a zero byte": partial(with_names, name="a\0b"),
    "an output twice": partial(with_names, name="x0"),
    "an input made again": partial(with_names, name="x"),
    "a circle": runs_in_circles,
    "a chain of 20,000": partial(chain, length=20_000),
    "an unknown operator": partial(chain, length=1, op="Harm"),
    "a tensor doubled 40 times": partial(doubles, times=40),
    "a function that calls itself": calls_itself,
    **{
        f"operator {op} of {domain}": partial(of_domain, domain=domain, op=op)
        for domain, op in (
            ("com.microsoft", "Inverse"),
            ("ai.onnx.ml", "Scaler"),
            ("com.microsoft.nchwc", "Conv"),
            ("org.pytorch.aten", "ATen"),
            ("evil", "Run"),
            ("org.openvinotoolkit", "Swish"),
        )
    },
    **{f"opset {v}": partial(of_opset, version=v) for v in (0, -1, 1, 999, 2**62)},
    **{f"IR version {v}": partial(of_ir, version=v) for v in (0, -1, 1, 999, 2**62)},
}
