"""Numbers that a graph computes: constants seem to bound them, and an engine crashes on what they are."""

from __future__ import annotations

from collections.abc import Callable

import onnx

from trust.nodes import FLOAT, INT32, constant, node, of_input, to_output

INT_MIN = -(2**31)


def product(model: onnx.ModelProto, more: int = 0) -> str:
    """−1 plus `more`: 65,537 times 65,535 in 32 bits, where the first is an extent."""
    filled = node(model, "ConstantOfShape", constant(model, 65537))
    filled = node(model, "Slice", filled, constant(model, 0), of_input(model, 65537))
    extent = node(model, "Cast", node(model, "Shape", filled), to=INT32)
    return node(model, "Add", node(model, "Mul", extent, constant(model, 65535, INT32)), constant(model, more, INT32))


def largest_of_nothing(model: onnx.ModelProto) -> str:
    """−1: the least number and the largest."""
    nothing = node(model, "Slice", of_input(model, 0, INT32), *(constant(model, 1) for _ in range(2)))
    return node(model, "Add", node(model, "ReduceMax", nothing), constant(model, -INT_MIN - 1, INT32))


def nan_in_bounds(model: onnx.ModelProto) -> str:
    """−1: a NaN within the bounds 0 and 0 is cast to the least number."""
    bounds = [constant(model, 0.0, FLOAT, ()) for _ in range(2)]
    clipped = node(model, "Clip", node(model, "Log", of_input(model, -1.0, FLOAT)), *bounds)
    return node(model, "Add", node(model, "Cast", clipped, to=INT32), constant(model, -INT_MIN - 1, INT32))


def divides_by(model: onnx.ModelProto, op: str, by: Callable[[onnx.ModelProto], str]) -> None:
    to_output(model, node(model, op, of_input(model, INT_MIN, INT32), by(model)))


def counts_by(model: onnx.ModelProto, op: str) -> None:
    """A Range by steps of 0, or a DFT of length 0."""
    zero = node(model, "Squeeze", product(model, more=1))
    limits = [constant(model, n, INT32, ()) for n in (0, 10)]
    wave = node(model, "Reshape", of_input(model, [1.0] * 64, FLOAT), constant(model, [1, 32, 2]))
    to_output(model, node(model, op, *(limits if op == "Range" else [wave]), zero))


def folds_columns(model: onnx.ModelProto) -> None:
    """Col2Im of sizes that an input says."""
    columns = node(model, "Reshape", of_input(model, [1.0] * 64, FLOAT), constant(model, [1, 32, 2]))
    sizes = of_input(model, [32, 32])
    to_output(model, node(model, "Col2Im", columns, sizes, sizes))
