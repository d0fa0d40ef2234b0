"""What can be said of a graph's numbers without running it: each tensor's type, and the range that constants imply.

A range is that of sizes which memory holds: it bounds how much a graph asks for, and proves nothing to an engine that
crashes on a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from math import prod

from epsrt.operators.graph import INT8, INT32, INT64, UINT8, Node, Numbers, Tensor

Range = tuple[float, float]  # least and largest of all values of a tensor

EXTENT: Range = (0, 4096)  # of a tensor that is there: it fits into memory, and a constant that multiplies it may not
INTEGERS = {UINT8: (0, 255), INT8: (-128, 127), INT32: (-(2**31), 2**31 - 1), INT64: (-(2**63), 2**63 - 1)}
MOST_NUMBERS = 512  # of a constant that is looked into
WHOLE = 2**31  # OpenVINO computes whole numbers in 32 bits: what exceeds them is not known


class Known:
    """The types and ranges of the tensors that have been seen, in the order of the nodes."""

    def __init__(self, constants: dict[str, Tensor]):
        self.constants = constants
        self.types = {name: tensor.dtype for name, tensor in constants.items()}
        self._numbers: dict[str, Numbers | None] = {}
        self._ranges: dict[str, Range | None] = {}

    def numbers(self, name: str) -> Numbers | None:
        """The values of a small constant that is in the graph itself; None where there is none."""
        if name not in self._numbers:
            tensor = self.constants.get(name)
            small = tensor is not None and prod(tensor.dims) <= MOST_NUMBERS
            self._numbers[name] = tensor.numbers() if tensor is not None and small else None
        return self._numbers[name]

    def range(self, name: str) -> Range | None:
        """The range of a tensor; None where it is not known."""
        if name not in self._ranges:
            self._ranges[name] = _hull(self.numbers(name))
        return self._ranges[name]

    def add(self, node: Node, dtype: int) -> None:
        """Note the range of a node's outputs, whose type is `dtype`."""
        of = _RANGES.get(node.op)
        found = None if of is None else of(node, self)
        if found is not None and (math.isnan(found[0] + found[1]) or not _holds(dtype, found)):
            found = None
        for name in node.outputs:
            self._ranges[name] = found


def _hull(values: Iterable[float] | None) -> Range | None:
    values = tuple(values or ())
    if not values or any(v != v for v in values):
        return None
    return min(values), max(values)


def _holds(dtype: int, found: Range) -> bool:
    least, largest = INTEGERS.get(dtype, (-math.inf, math.inf))
    return max(least, -WHOLE) <= found[0] and found[1] < min(largest + 1, WHOLE) if dtype in INTEGERS else True


def _all(node: Node, known: Known) -> list[Range] | None:
    """The ranges of a node's inputs; None where one is not known."""
    found = [known.range(name) for name in node.inputs]
    return None if None in found else found  # type: ignore[return-value]


def _first(node: Node, known: Known) -> Range | None:
    return known.range(node.inputs[0]) if node.inputs else None


def _union(node: Node, known: Known) -> Range | None:
    found = _all(node, known)
    return (min(a for a, _ in found), max(b for _, b in found)) if found else None


def _picked(node: Node, known: Known) -> Range | None:
    """Of Gather: 0 too, which is what OpenVINO gives for places that are not there."""
    found = _first(node, known)
    return None if found is None else (min(0, found[0]), max(0, found[1]))


def _chosen(node: Node, known: Known) -> Range | None:
    """Of Where: of its last two inputs."""
    return _union(node._replace(inputs=node.inputs[1:]), known)


def _corners(of: Callable[[float, float], float]) -> Callable[[Node, Known], Range | None]:
    """Of an operation of two numbers that is monotonic in each."""

    def between(node: Node, known: Known) -> Range | None:
        found = _all(node, known)
        if found is None or len(found) != 2:
            return None
        return _hull([of(a, b) for a in found[0] for b in found[1]])

    return between


def _quotient(node: Node, known: Known) -> Range | None:
    found = _all(node, known)
    if found is None or len(found) != 2 or found[1][0] <= 0:
        return None
    values = [a / b for a in found[0] for b in found[1]]
    return (
        (math.floor(min(values)), math.ceil(max(values)))
        if known.types.get(node.inputs[0]) in INTEGERS
        else _hull(values)
    )


def _remainder(node: Node, known: Known) -> Range | None:
    found = _all(node, known)
    if found is None or len(found) != 2 or found[1][0] <= 0 or node.attributes.get("fmod"):
        return None
    return (0, found[1][1])


def _extreme(of: Callable[[Iterable[float]], float]) -> Callable[[Node, Known], Range | None]:
    """Of Max and Min."""

    def between(node: Node, known: Known) -> Range | None:
        found = _all(node, known)
        return (of(a for a, _ in found), of(b for _, b in found)) if found else None

    return between


def _each(of: Callable[[float], float]) -> Callable[[Node, Known], Range | None]:
    """Of a function of one number that nowhere falls, or nowhere rises."""

    def mapped(node: Node, known: Known) -> Range | None:
        found = _first(node, known)
        return None if found is None or not all(map(math.isfinite, found)) else _hull(map(of, found))

    return mapped


def _cast(node: Node, known: Known) -> Range | None:
    found, whole = _first(node, known), node.attributes.get("to") in INTEGERS
    if found is None or not all(map(math.isfinite, found)):
        return None
    return (math.trunc(found[0]), math.trunc(found[1])) if whole else found


def _filled(node: Node, known: Known) -> Range | None:
    value = node.attributes.get("value")
    return _hull(value.numbers()) if isinstance(value, Tensor) else (0, 0)


_MOVES = (
    "Expand", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
)  # fmt: skip
_RANGES: dict[str, Callable[[Node, Known], Range | None]] = {
    **dict.fromkeys(_MOVES, _first),
    **dict.fromkeys(("Shape", "Size"), lambda node, known: EXTENT),
    "Gather": _picked,
    "Concat": _union,
    "Where": _chosen,
    "Add": _corners(lambda a, b: a + b),
    "Sub": _corners(lambda a, b: a - b),
    "Mul": _corners(lambda a, b: a * b),
    "Div": _quotient,
    "Mod": _remainder,
    "Max": _extreme(max),
    "Min": _extreme(min),
    "Neg": _each(lambda a: -a),
    "Floor": _each(math.floor),
    "Ceil": _each(math.ceil),
    "Cast": _cast,
    "ConstantOfShape": _filled,
}
