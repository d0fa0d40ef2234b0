"""Step graphs that mean harm: each is a step of a bundle with something added that crashes, hangs or reads elsewhere.

What is added feeds on an input and feeds an output, unless it says that it is constant: an engine may fold constants,
and leave out what nobody reads.
"""

from __future__ import annotations

from functools import partial

import onnx
from onnx import TensorProto, helper

from trust.computed import INT_MIN, counts_by, divides_by, folds_columns, largest_of_nothing, nan_in_bounds, product
from trust.nodes import (
    FLOAT,
    INT64,
    STRING,
    Edit,
    branches,
    convolves,
    divides,
    gathers_nd,
    image,
    loops,
    node,
    of_input,
    to_output,
    vector,
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
        f"{op} by {by.__name__}": partial(divides_by, op=op, by=by)
        for op in ("Div", "Mod")
        for by in (product, largest_of_nothing, nan_in_bounds)
    },
    **{f"{op} by a product that is 0": partial(counts_by, op=op) for op in ("Range", "DFT")},
    "Col2Im of computed sizes": folds_columns,
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
