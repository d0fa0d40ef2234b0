"""Protobuf's wire format, as far as ONNX needs it: https://protobuf.dev/programming-guides/encoding.

The reader is stricter than protobuf: what an engine's own reader would merge, drop or overlook is refused here. So both
see the same graph. A message's schema says which messages it holds, and no schema holds itself: the depth is bounded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4 are groups, which ONNX does not have
MOST = 20_000  # fields of one name in a message, such as a graph's nodes or its constants

Message = dict[str, Any]


class Damaged(ValueError):
    """Bytes that are no such message. The message says what is wrong, without a subject."""


class Field(NamedTuple):
    name: str
    of: Callable[[Any], Any]  # what is on the wire -> the value
    many: bool = False
    packed: bool = False  # `of` returns a list


Schema = Mapping[int, Field]  # by number << 3 | wire type


def message(data: bytes, schema: Schema) -> Message:
    """The fields of a message by name, those of which there may be many as lists. Raises Damaged.

    Each byte is read once a level. A field that is not in the schema is refused, as is a single one that comes twice.
    """
    found: Message = {}
    at, end = 0, len(data)
    try:
        while at < end:
            key = data[at]
            at += 1
            if key > 127:
                key, at = varint(data, at - 1)
            wire = key & 7
            value: Any
            if wire == LENGTH:
                size = data[at]
                at += 1
                if size > 127:
                    size, at = varint(data, at - 1)
                if size > end - at:
                    raise Damaged("ends in the middle of a field")
                value = data[at : at + size]
                at += size
            elif wire == VARINT:
                value = data[at]
                at += 1
                if value > 127:
                    value, at = varint(data, at - 1)
            elif wire in (FIXED32, FIXED64):
                size = 4 if wire == FIXED32 else 8
                if size > end - at:
                    raise Damaged("ends in the middle of a field")
                value = data[at : at + size]
                at += size
            else:
                raise Damaged(f"has a field of wire type {wire}, which ONNX has not")
            field = schema.get(key)
            if field is None:
                raise Damaged(f"has a field of number {key >> 3} and wire type {wire}, which no export writes")
            name, of, many, packed = field
            if packed:
                found.setdefault(name, []).extend(of(value))
            elif many:
                values = found.setdefault(name, [])
                if len(values) == MOST:
                    raise Damaged(f"has more than {MOST} {name}")
                values.append(of(value))
            elif name in found:
                raise Damaged(f"has two fields {name}")
            else:
                found[name] = of(value)
    except IndexError as error:
        raise Damaged("ends in the middle of a field") from error
    return found


def varint(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned number of up to 64 bits, and where the next field begins."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
        if shift > 63:
            raise Damaged("has a number of more than 64 bits")
    if value >> 64:
        raise Damaged("has a number of more than 64 bits")
    return value, at


def same(value: Any) -> Any:
    return value


def text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Damaged("has a name that is not UTF-8") from error


def signed(value: int) -> int:
    """int64, and int32 and enums, which come as such."""
    return value - (1 << 64) if value >> 63 else value


def packed_signed(data: bytes) -> list[int]:
    values, at = [], 0
    try:
        while at < len(data):
            value, at = varint(data, at)
            values.append(signed(value))
    except IndexError as error:
        raise Damaged("ends in the middle of a number") from error
    return values


def packed_floats(data: bytes, code: str) -> list[float]:
    size = struct.calcsize(code)
    if len(data) % size:
        raise Damaged("ends in the middle of a number")
    return list(struct.unpack(f"<{len(data) // size}{code}", data))


def floating(data: bytes, code: str) -> float:
    return float(struct.unpack(f"<{code}", data)[0])


def integers(number: int, name: str) -> dict[int, Field]:
    """Repeated int64 or int32, packed or not."""
    return {
        number << 3 | VARINT: Field(name, signed, many=True),
        number << 3 | LENGTH: Field(name, packed_signed, packed=True),
    }


def floats(number: int, name: str, code: str = "f") -> dict[int, Field]:
    """Repeated float ("f") or double ("d"), packed or not."""
    return {
        number << 3 | (FIXED32 if code == "f" else FIXED64): Field(name, partial(floating, code=code), many=True),
        number << 3 | LENGTH: Field(name, partial(packed_floats, code=code), packed=True),
    }


def one(number: int, name: str, wire: int, of: Callable[[Any], Any], many: bool = False) -> dict[int, Field]:
    return {number << 3 | wire: Field(name, of, many)}
