"""A step graph for OpenVINO, whose weights are in this process's memory.

OpenVINO reads an ONNX file's external weights by their name on disk, from bytes too. But as onnxruntime's own provider
of OpenVINO does, a model may say that they are in memory: at the location "*/_ORT_MEM_ADDR_/*", by an offset that is
the address (since 2025.4). What is read then are the bytes that were hashed, whatever has become of the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from epsrt.errors import EngineError
from epsrt.operators.wire import FIXED32, FIXED64, LENGTH, VARINT, varint

LOCATION = b"*/_ORT_MEM_ADDR_/*"
GRAPH, INITIALIZER, EXTERNAL_DATA, KEY, VALUE = 7, 5, 13, 1, 2  # field numbers of onnx.proto
SIZES = {FIXED64: 8, FIXED32: 4}


class Field(NamedTuple):
    number: int
    raw: bytes  # as it stands, key and all
    body: bytes  # of a message, a string, bytes


def addressed(model: bytes, name: str, weights: bytes) -> bytes:
    """An ONNX model whose tensors in the file `name` are in the bytes `weights` instead.

    They must live until the model was read and compiled. Raises EngineError where it is no model, or a tensor lies
    outside the weights.
    """
    address, size = np.frombuffer(weights, np.uint8).ctypes.data, len(weights)

    def tensor(data: bytes) -> bytes:
        parts = list(_fields(data))
        said = dict(_entry(part.body) for part in parts if part.number == EXTERNAL_DATA)
        if said.get(b"location") != name.encode():
            return data
        offset, length = int(said.get(b"offset", 0)), int(said.get(b"length", -1))
        if not 0 <= offset <= offset + length <= size:
            raise ValueError("a tensor lies outside the weights file")
        now = {b"location": LOCATION, b"offset": b"%d" % (address + offset), b"length": b"%d" % length}
        entries = (_message(KEY, key) + _message(VALUE, value) for key, value in now.items())
        kept = (part.raw for part in parts if part.number != EXTERNAL_DATA)
        return b"".join([*kept, *(_message(EXTERNAL_DATA, entry) for entry in entries)])

    try:
        return _with(model, GRAPH, lambda graph: _with(graph, INITIALIZER, tensor))
    except (ValueError, IndexError) as error:
        raise EngineError(f"a step graph cannot be read ({error}): export the bundle again") from error


def _with(data: bytes, number: int, change: Callable[[bytes], bytes]) -> bytes:
    """A message with its fields of a number changed."""
    return b"".join(_message(number, change(f.body)) if f.number == number else f.raw for f in _fields(data))


def _entry(data: bytes) -> tuple[bytes, bytes]:
    found = {field.number: field.body for field in _fields(data)}
    return found.get(KEY, b""), found.get(VALUE, b"")


def _fields(data: bytes) -> Iterator[Field]:
    at = 0
    while at < len(data):
        begin = at
        key, at = varint(data, at)
        wire, body = key & 7, at
        if wire == VARINT:
            _, at = varint(data, at)
        elif wire == LENGTH:
            size, body = varint(data, at)
            at = body + size
        elif wire in SIZES:
            at += SIZES[wire]
        else:
            raise ValueError(f"it has a field of wire type {wire}")
        if at > len(data):
            raise ValueError("it ends in the middle of a field")
        yield Field(key >> 3, data[begin:at], data[body:at])


def _message(number: int, body: bytes) -> bytes:
    return _number(number << 3 | LENGTH) + _number(len(body)) + body


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
