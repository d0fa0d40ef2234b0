"""Conditioning: what a request gives the network besides x and t, checked against the bundle, one a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from epsrt.bundle import Bundle
from epsrt.condition import LABEL, Condition
from epsrt.errors import InputError, one_of
from epsrt.images import array_of
from epsrt.types import Arrays, Shape

KINDS = {"float32": ("f", "float"), "int64": ("iu", "whole numbers"), "bool": ("b", "bool")}  # NumPy's, and for people


@dataclass(frozen=True, eq=False)
class Conditioned:
    """Each condition of `count` samples by name, [count, *shape], and what those that are guided are guided against.

    A condition without a null lacks in `nulls` where a caller gave none. `given` are the names that a caller gave.
    """

    count: int
    values: Arrays
    nulls: Arrays
    given: frozenset[str]

    def of(self, i: int) -> tuple[Arrays, Arrays]:
        """Sample.conditions and Sample.null_conditions of a sample."""
        return {name: a[i] for name, a in self.values.items()}, {name: a[i] for name, a in self.nulls.items()}

    @property
    def told(self) -> NDArray[np.bool_]:
        """Which samples are told something by a guided condition: [count], true where one is not what it is against."""
        found = np.zeros(self.count, np.bool_)
        for name, null in self.nulls.items():
            found |= (self.values[name] != null).reshape(self.count, -1).any(axis=1)
        return found

    def lacks(self, guided: Sequence[Condition]) -> Condition | None:
        """The first of some guided conditions that has nothing to be weighed against."""
        return next((c for c in guided if c.name not in self.nulls), None)


def lengths_of(
    given: Mapping[str, ArrayLike] | None, negatives: Mapping[str, ArrayLike] | None, bundle: Bundle
) -> dict[str, int]:
    """How many samples each condition is given for, by what it is called; one for all says nothing."""
    found = {}
    for kind, values in (("conditions", given), ("null_conditions", negatives)):
        for name, value in (values or {}).items():
            c = next((c for c in bundle.manifest.takes if c.name == name), None)
            array = array_of(f"{kind}[{name!r}]", value)
            if c is not None and array.ndim == len(c.shape) + 1:
                found[f"{kind} {name}"] = len(array)
    return found


def nbytes_of(given: Mapping[str, ArrayLike] | None, negatives: Mapping[str, ArrayLike] | None) -> int:
    """Bytes of what a request gives."""
    return sum(array_of(name, v).nbytes for values in (given, negatives) for name, v in (values or {}).items())


def conditioned(
    bundle: Bundle,
    labels: Sequence[int],
    given: Mapping[str, ArrayLike] | None,
    negatives: Mapping[str, ArrayLike] | None,
    count: int,
    shape: Shape,
) -> Conditioned:
    """The conditions of samples of a shape; `labels` are the network's own, one a sample.

    Raises InputError for conditions that are missing, surplus, of another shape or dtype, or that hold NaN, and for a
    null of one that is not guided.
    """
    m, given, negatives = bundle.manifest, given or {}, negatives or {}
    known = {c.name: c for c in m.takes}
    for kind, named in (("conditions", given), ("null_conditions", negatives)):
        for name in named:
            if name not in known:
                way = f": {one_of(str(name), known)}" if known else ", which takes none: leave it out"
                raise InputError(f"{kind} has {name!r}, and that is no condition of {bundle.path.name}{way}")
            if kind == "null_conditions" and not known[name].guided:
                raise InputError(
                    f"null_conditions has {name!r}, and {bundle.path.name} is not guided by it: leave it out"
                )
    if LABEL in negatives and m.format < 6:
        raise InputError(
            f"{bundle.path.name} was exported by an older epsrt, whose graphs hold the null label: export it again for "
            "null_conditions"
        )
    if LABEL in given:
        raise InputError(f"conditions has {LABEL!r}: give labels=, one a sample")
    values: Arrays = {}
    nulls: Arrays = {}
    for name, c in known.items():
        values[name] = np.asarray(labels, np.int64) if name == LABEL else _each(bundle, c, given, count, shape)
        if not c.guided:
            continue
        if name == LABEL and name in negatives:
            chosen = np.atleast_1d(array_of("null_conditions['label']", negatives[name])).tolist()
            if len(chosen) not in (1, count):
                raise InputError(f"{len(chosen)} null_conditions label for {count} samples: give one each")
            nulls[name] = np.broadcast_to(np.array([bundle.label_of(one) for one in chosen], np.int64), (count,))
        elif name in negatives:
            nulls[name] = _array("null_conditions", c, negatives[name], count, shape)
        elif c.null is not None:
            nulls[name] = _all(c.filled(shape), count)
    return Conditioned(count, values, nulls, frozenset(given))


def _each(bundle: Bundle, c: Condition, given: Mapping[str, Any], count: int, shape: Shape) -> NDArray[Any]:
    if c.name in given:
        return _array("conditions", c, given[c.name], count, shape)
    filled = c.filled(shape)
    if filled is None:
        raise InputError(
            f"{bundle.path.name} needs the condition {c.name!r}, {_want(c, count, shape)}: give "
            f"conditions={{{c.name!r}: …}}"
        )
    return _all(filled, count)


def _array(kind: str, c: Condition, given: ArrayLike, count: int, shape: Shape) -> NDArray[Any]:
    """[count, *shape] of a condition, from that, from one for all, or from one without a batch."""
    array, own = array_of(f"{kind}[{c.name!r}]", given), c.of(shape)
    if array.shape == own:
        array = array[None]
    letters, _ = KINDS[c.dtype]
    if array.ndim == 0 or array.shape[1:] != own or len(array) not in (1, count) or array.dtype.kind not in letters:
        have = f"{array.dtype} {list(array.shape)}"
        raise InputError(f"{kind}[{c.name!r}] is {have}, not {_want(c, count, shape)}")
    if c.dtype == "float32" and not np.isfinite(array).all():
        raise InputError(f"{kind}[{c.name!r}] holds NaN or infinity")
    with np.errstate(over="ignore"):
        made = np.array(array, c.dtype, order="C")  # a copy: the caller's may change before it is drawn
    if c.dtype == "float32" and not np.isfinite(made).all():
        raise InputError(f"{kind}[{c.name!r}] holds numbers that no float32 holds: scale it")
    return np.broadcast_to(made, (count, *own))


def _all(one: NDArray[Any] | None, count: int) -> NDArray[Any]:
    assert one is not None
    return np.broadcast_to(one, (count, *one.shape))


def _want(c: Condition, count: int, shape: Shape) -> str:
    return f"{KINDS[c.dtype][1]} [{', '.join(map(str, (count, *c.of(shape))))}]"
