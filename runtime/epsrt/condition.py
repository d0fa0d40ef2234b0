"""Condition: what a network takes besides x and t, one a sample; the label is one of them."""

from __future__ import annotations

import keyword
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from epsrt.types import Shape

Role = Literal["label", "context", "vector", "mask", "image", "scalar"]
DType = Literal["float32", "int64", "bool"]

LABEL, NULL = "label", "_null"  # the name of the built-in condition, and what a guided one's other input ends in
OWN = frozenset(("x", "m", "z", "rows", "t", "target", "known", "mask", "z2", "x_next", "m_next", "x0"))
RANKS: dict[Role, tuple[int, ...]] = {
    "label": (0,), "scalar": (0,), "vector": (1,), "mask": (1, 2), "context": (2,), "image": (2, 3, 4),
}  # fmt: skip
MOST_ELEMENTS = 1 << 26  # of a condition of one sample


class Condition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor that each sample has of its own, written once when it begins and never changed by a step.

    name    an identifier: the keyword of the network's forward, and the input of the step graph
    shape   of one sample; () is a number. Of role image it is [C′, …] with the sample's own extents
    dtype   at the door; the step graph casts floats to what the network computes in
    role    what it is: a class (label), a sequence of vectors [L, D] (context), a vector [D], which places of a
            sequence count (mask, true where they do), pixels that are concatenated behind in_scale·x, not scaled
            (image; SR3, arXiv 2104.07636), or a number (scalar)
    guided  a guided step graph also takes NAME_null: what the network reads as nothing, or a negative
    null    fills NAME_null where a caller gives none, and the condition itself; None: a caller gives both
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    role: Role
    guided: bool = False
    null: bool | int | float | None = None

    @property
    def null_name(self) -> str:
        """The step graph's input for what it is guided against."""
        return self.name + NULL

    def of(self, extents: Shape) -> tuple[int, ...]:
        """Its shape beside samples of these extents [C, …], which an image follows."""
        return (self.shape[0], *extents[1:]) if self.role == "image" else self.shape

    def filled(self, extents: Shape) -> NDArray[Any] | None:
        """`null` as an array beside samples of these extents; None where it has none."""
        return None if self.null is None else np.full(self.of(extents), self.null, self.dtype)

    def fault(self, shape: Shape) -> str | None:
        """What is wrong with it beside samples [C, …], in words that follow its name; None: nothing."""
        if not self.name.isidentifier() or keyword.iskeyword(self.name) or self.name.endswith(NULL):
            return f"is no name of an input: give an identifier that does not end in {NULL}"
        if self.name in OWN or (self.name == LABEL) != (self.role == "label"):
            return "is a name that step graphs have for something else: choose another"
        if len(self.shape) not in RANKS[self.role] or not all(0 < n <= MOST_ELEMENTS for n in self.shape):
            ranks = " or ".join(map(str, RANKS[self.role]))
            return f"has shape {list(self.shape)}, and the role {self.role} has {ranks} axes, each at least 1"
        if np.prod(self.shape, dtype=float) > MOST_ELEMENTS:
            return f"has {list(self.shape)} elements a sample, over {MOST_ELEMENTS}"
        if self.role == "image" and self.shape[1:] != tuple(shape[1:]):
            return f"has shape {list(self.shape)}, and an image has the samples' own extents, {list(shape[1:])}"
        if self.role in ("context", "vector", "image") and self.dtype != "float32":
            return f"is {self.dtype}, and the role {self.role} is float32"
        if (self.role == "mask") != (self.dtype == "bool"):
            return f"is {self.dtype}, and the role {self.role} is {'bool' if self.role == 'mask' else 'no bool'}"
        if self.role == "label" and self.dtype != "int64":
            return f"is {self.dtype}, and a label is int64"
        if self.null is not None and not self.guided:
            return "has a null, and is not guided: leave one of them out"
        if self.null is not None and not _holds(self.dtype, self.null):
            return f"has the null {self.null!r}, which is no {self.dtype}"
        return None


def _holds(dtype: str, value: float) -> bool:
    """Whether an array of a dtype holds a number as it is."""
    try:
        return bool(np.asarray(value).astype(dtype) == value)
    except OverflowError:  # a whole number of many digits
        return False
