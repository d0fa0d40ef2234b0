"""A graph as its ONNX file says it: operators, constants, inputs and outputs, and nothing else that a file may hold.

What no export of epsrt holds is refused: functions, training, sparse tensors, graphs within attributes, metadata.
Numbers of fields are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache, partial
from math import prod
from typing import Any, NamedTuple

from epsrt.operators.wire import (
    FIXED32,
    LENGTH,
    VARINT,
    Damaged,
    Schema,
    floating,
    floats,
    integers,
    message,
    one,
    same,
    signed,
    text,
)

FLOAT, UINT8, INT8, INT32, INT64, BOOL, FLOAT16, DOUBLE, BFLOAT16 = 1, 2, 3, 6, 7, 9, 10, 11, 16
SIZES = {FLOAT: 4, UINT8: 1, INT8: 1, INT32: 4, INT64: 8, BOOL: 1, FLOAT16: 2, DOUBLE: 8, BFLOAT16: 2}  # bytes
CODES = {FLOAT: "f", UINT8: "B", INT8: "b", INT32: "i", INT64: "q", BOOL: "B", FLOAT16: "e", DOUBLE: "d"}  # struct's
MOST_AXES = 8
MOST_EXTENT = 2**31 - 1
LONGEST_NAME = 4096  # bytes

Numbers = tuple[float, ...]


class Tensor(NamedTuple):
    """A constant: `data` its bytes, little-endian; None where they lie in the weights file."""

    name: str
    dtype: int
    dims: tuple[int, ...]
    data: bytes | None
    external: tuple[tuple[str, str], ...] = ()  # as the file says them

    @property
    def nbytes(self) -> int:
        return prod(self.dims) * SIZES[self.dtype]

    def numbers(self) -> Numbers | None:
        """Its values; None where they lie elsewhere."""
        if self.data is None or self.dtype not in CODES:
            return None
        return struct.unpack(f"<{prod(self.dims)}{CODES[self.dtype]}", self.data)


class Node(NamedTuple):
    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]  # int, float, bytes, Tensor, or lists of the first three


class Value(NamedTuple):
    """An input or an output. A free extent is None; outputs may leave out their extents, dims None."""

    name: str
    dtype: int
    dims: tuple[int | None, ...] | None


class Graph(NamedTuple):
    opsets: dict[str, int]  # by domain
    nodes: tuple[Node, ...]
    constants: dict[str, Tensor]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    between: tuple[Value, ...]  # what the file says of other tensors, as int8 graphs do


def read(data: bytes) -> Graph:
    """The graph of an ONNX file. Raises Damaged for what is none, and for what no export of epsrt holds."""
    model = message(data, _MODEL)
    opsets: dict[str, int] = {}
    for each in model.get("opsets", ()):
        if each.get("domain", "") in opsets:
            raise Damaged(f'names the operator set "{each.get("domain", "")}" twice')
        opsets[each.get("domain", "")] = each.get("version", 0)
    if any(
        each.get("key") != "onnx.infer" for each in model.get("metadata", ())
    ):  # onnxruntime's quantiser writes that
        raise Damaged("has metadata")
    if "graph" not in model:
        raise Damaged("has no graph")
    graph = message(model["graph"], _graph_schema())
    constants = {t.name: t for t in graph.get("constants", ())}
    if len(constants) != len(graph.get("constants", ())) or "" in constants:
        raise Damaged("has two constants of one name, or one without a name")
    return Graph(
        opsets,
        tuple(graph.get("nodes", ())),
        constants,
        tuple(graph.get("inputs", ())),
        tuple(graph.get("outputs", ())),
        tuple(graph.get("between", ())),
    )


def name_of(data: bytes) -> str:
    if len(data) > LONGEST_NAME:
        raise Damaged(f"has a name of {len(data)} bytes")
    return text(data)


def _tensor(data: bytes) -> Tensor:
    found = message(data, _TENSOR)
    name, dtype, dims = found.get("name", ""), found.get("dtype", 0), tuple(found.get("dims", ()))
    if dtype not in SIZES:
        raise Damaged(f"has a constant {name!r} of ONNX's type {dtype}")
    if len(dims) > MOST_AXES or any(not 0 <= n <= MOST_EXTENT for n in dims) or (0 in dims and len(dims) != 1):
        raise Damaged(f"has a constant {name!r} of the extents {list(dims)[:16]}")
    tensor = Tensor(
        name, dtype, dims, None, tuple((e.get("key", ""), e.get("value", "")) for e in found.get("external", ()))
    )
    held = [kind for kind in ("raw", "floats", "ints", "longs", "doubles") if kind in found]
    if found.get("location", 0) not in (0, 1) or bool(found.get("location", 0)) != bool(tensor.external):
        raise Damaged(f"does not say where the constant {name!r} lies")
    if tensor.external:
        if held:
            raise Damaged(f"has a constant {name!r} that lies in two places")
        return tensor
    if len(held) > 1:
        raise Damaged(f"has a constant {name!r} that is given twice")
    raw = _bytes(tensor, held[0], found[held[0]]) if held else b""
    if len(raw) != tensor.nbytes:
        raise Damaged(
            f"has a constant {name!r} of {len(raw)} bytes, where its extents {list(dims)} are {tensor.nbytes}"
        )
    return tensor._replace(data=raw)


def _bytes(tensor: Tensor, kind: str, values: Any) -> bytes:
    """The bytes of a constant that is written in one of the fields that ONNX has for them."""
    if kind == "raw":
        return bytes(values)
    fits = {"floats": (FLOAT,), "doubles": (DOUBLE,), "longs": (INT64,)}.get(
        kind, (UINT8, INT8, INT32, BOOL, FLOAT16, BFLOAT16)
    )
    if tensor.dtype not in fits:
        raise Damaged(f"has a constant {tensor.name!r} whose values are of another type than it says")
    if kind in ("floats", "doubles"):
        return struct.pack(f"<{len(values)}{CODES[tensor.dtype]}", *values)
    size = SIZES[tensor.dtype]
    try:  # half floats come as the number that their bits are
        return b"".join(v.to_bytes(size, "little", signed=tensor.dtype in (INT8, INT32, INT64)) for v in values)
    except OverflowError as error:
        raise Damaged(f"has a constant {tensor.name!r} with a value that its type does not hold") from error


def _attribute(data: bytes) -> tuple[str, Any]:
    found = message(data, _ATTRIBUTE)
    name, kind = found.pop("name", ""), found.pop("type", 0)
    for graphs in ("graph", "graphs"):
        if graphs in found:
            raise Damaged(f"holds a graph in its attribute {name!r}")
    if kind not in _KINDS:
        raise Damaged(f"has an attribute {name!r} of ONNX's type {kind}")
    field, empty = _KINDS[kind]
    if set(found) - {field}:
        raise Damaged(f"has an attribute {name!r} of two types")
    value = found.get(field, empty)
    if value is None:
        raise Damaged(f"has an attribute {name!r} without a value")
    if isinstance(value, Tensor) and value.external:
        raise Damaged(f"has an attribute {name!r} that lies in another file")
    return name, value


def _node(data: bytes, attribute: Callable[[bytes], tuple[str, Any]]) -> Node:
    found = message(data, _NODE)
    given = [attribute(each) for each in found.get("attributes", ())]
    attributes = dict(given)
    node = Node(
        found.get("op", ""),
        found.get("domain", ""),
        found.get("name", ""),
        tuple(found.get("inputs", ())),
        tuple(found.get("outputs", ())),
        attributes,
    )
    if len(attributes) != len(given):
        raise Damaged(f"has a node {node.name!r} with two attributes of one name")
    return node


def _value(data: bytes) -> Value:
    found = message(data, _VALUE)
    kind = found.get("type", {}).get("tensor")
    if kind is None:
        raise Damaged(f"has an input or output {found.get('name', '')!r} that is no tensor")
    dims = None
    if "shape" in kind:
        dims = tuple(d.get("extent") for d in kind["shape"].get("dims", ()))
    return Value(found.get("name", ""), kind.get("dtype", 0), dims)


def _sub(schema: Schema) -> Callable[[bytes], dict[str, Any]]:
    return partial(message, schema=schema)


_OPSET = one(1, "domain", LENGTH, name_of) | one(2, "version", VARINT, signed)
_ENTRY = one(1, "key", LENGTH, name_of) | one(2, "value", LENGTH, name_of)
_MODEL = (
    one(1, "ir_version", VARINT, signed)
    | one(2, "producer", LENGTH, name_of)
    | one(3, "producer_version", LENGTH, name_of)
    | one(4, "domain", LENGTH, name_of)
    | one(5, "version", VARINT, signed)
    | one(6, "doc", LENGTH, name_of)
    | one(7, "graph", LENGTH, same)
    | one(8, "opsets", LENGTH, _sub(_OPSET), many=True)
    | one(14, "metadata", LENGTH, _sub(_ENTRY), many=True)
)
_TENSOR = (
    integers(1, "dims")
    | one(2, "dtype", VARINT, signed)
    | floats(4, "floats")
    | integers(5, "ints")
    | integers(7, "longs")
    | one(8, "name", LENGTH, name_of)
    | one(9, "raw", LENGTH, same)
    | floats(10, "doubles", "d")
    | one(12, "doc", LENGTH, name_of)
    | one(13, "external", LENGTH, _sub(_ENTRY), many=True)
    | one(14, "location", VARINT, signed)
)
_DIM = one(1, "extent", VARINT, signed) | one(2, "symbol", LENGTH, name_of)
_SHAPE = one(1, "dims", LENGTH, _sub(_DIM), many=True)
_TENSOR_TYPE = one(1, "dtype", VARINT, signed) | one(2, "shape", LENGTH, _sub(_SHAPE))
_TYPE = one(1, "tensor", LENGTH, _sub(_TENSOR_TYPE))
_VALUE = one(1, "name", LENGTH, name_of) | one(2, "type", LENGTH, _sub(_TYPE)) | one(3, "doc", LENGTH, name_of)
_ATTRIBUTE = (
    one(1, "name", LENGTH, name_of)
    | one(2, "float", FIXED32, partial(floating, code="f"))
    | one(3, "int", VARINT, signed)
    | one(4, "bytes", LENGTH, same)
    | one(5, "tensor", LENGTH, _tensor)
    | one(6, "graph", LENGTH, same)
    | floats(7, "floats")
    | integers(8, "ints")
    | one(9, "strings", LENGTH, same, many=True)
    | one(11, "graphs", LENGTH, same, many=True)
    | one(13, "doc", LENGTH, name_of)
    | one(20, "type", VARINT, signed)
)
# field, and what a writer may leave out; by AttributeProto.AttributeType
_KINDS: dict[int, tuple[str, Any]] = {
    1: ("float", 0.0),
    2: ("int", 0),
    3: ("bytes", b""),
    4: ("tensor", None),
    6: ("floats", []),
    7: ("ints", []),
    8: ("strings", []),
}
_NODE = (
    one(1, "inputs", LENGTH, name_of, many=True)
    | one(2, "outputs", LENGTH, name_of, many=True)
    | one(3, "name", LENGTH, name_of)
    | one(4, "op", LENGTH, name_of)
    | one(5, "attributes", LENGTH, same, many=True)
    | one(6, "doc", LENGTH, name_of)
    | one(7, "domain", LENGTH, name_of)
)


def _graph_schema() -> Schema:
    attribute = cache(_attribute)  # a graph has few different ones, each many times
    return (
        one(1, "nodes", LENGTH, partial(_node, attribute=attribute), many=True)
        | one(2, "name", LENGTH, name_of)
        | one(5, "constants", LENGTH, _tensor, many=True)
        | one(10, "doc", LENGTH, name_of)
        | one(11, "inputs", LENGTH, _value, many=True)
        | one(12, "outputs", LENGTH, _value, many=True)
        | one(13, "between", LENGTH, _value, many=True)
    )
