"""ONNX files by hand, a field at a time: where there is no onnx package, and where it would refuse to write them."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11}


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | float | str | bytes) -> bytes:
    """One field of a message: a whole number, a float of 32 bits, or a text, bytes or message with its length."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def constant(name: str, value: Any) -> bytes:
    """A TensorProto that holds its values."""
    array = np.asarray(value)
    dims = b"".join(field(1, n) for n in array.shape)
    return dims + field(2, TYPES[array.dtype.name]) + field(8, name) + field(9, array.tobytes())


def outside(name: str, dims: Sequence[int], said: Sequence[tuple[str, str]], dtype: int = 1) -> bytes:
    """A TensorProto whose values lie in another file."""
    entries = b"".join(field(13, field(1, key) + field(2, value)) for key, value in said)
    return b"".join(field(1, n) for n in dims) + field(2, dtype) + field(8, name) + entries + field(14, 1)


def attribute(name: str, value: Any) -> bytes:
    match value:
        case int():
            return field(1, name) + field(3, value) + field(20, 2)
        case float():
            return field(1, name) + field(2, value) + field(20, 1)
        case str():
            return field(1, name) + field(4, value) + field(20, 3)
        case bytes():  # a tensor
            return field(1, name) + field(5, value) + field(20, 4)
        case _:
            return field(1, name) + b"".join(field(8, v) for v in value) + field(20, 7)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any) -> bytes:
    return (
        b"".join(field(1, name) for name in inputs)
        + b"".join(field(2, name) for name in outputs)
        + field(3, f"a {op} for {', '.join(outputs)[:99]}")
        + field(4, op)
        + b"".join(field(5, attribute(name, value)) for name, value in attributes.items())
        + (field(7, domain) if domain else b"")
    )


def value(name: str, dtype: int = 1, dims: Sequence[int | str] = ("batch", 1, 8, 8)) -> bytes:
    shape = b"".join(field(1, field(2, n) if isinstance(n, str) else field(1, n)) for n in dims)
    return field(1, name) + field(2, field(1, field(1, dtype) + field(2, shape)))


def graph(
    nodes: Sequence[bytes],
    constants: Sequence[bytes] = (),
    inputs: Sequence[bytes] = (value("x"), value("label", 7, ("batch",))),
    outputs: Sequence[bytes] = (value("y"),),
) -> bytes:
    """A GraphProto."""
    return (
        b"".join(field(1, each) for each in nodes)
        + field(2, "step")
        + b"".join(field(5, each) for each in constants)
        + b"".join(field(11, each) for each in inputs)
        + b"".join(field(12, each) for each in outputs)
    )


def model(graph: bytes, opsets: Mapping[str, int] = {"": 21}, more: bytes = b"") -> bytes:
    sets = b"".join(field(8, (field(1, domain) if domain else b"") + field(2, n)) for domain, n in opsets.items())
    return field(1, 10) + field(7, graph) + sets + more


def of_node(
    op: str, *constants: Any, inputs: Sequence[str] = ("x",), outputs: Sequence[str] = ("y",), **more: Any
) -> bytes:
    """A model of one node: its inputs, then constants c0, c1, …; None leaves one out."""
    names = [*inputs, *("" if c is None else f"c{i}" for i, c in enumerate(constants))]
    held = [constant(f"c{i}", c) for i, c in enumerate(constants) if c is not None]
    return model(graph([node(op, names, outputs, **more)], held))
