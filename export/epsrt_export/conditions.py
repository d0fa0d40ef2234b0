"""What a network takes beside x and t: how its forward is called, and the values that a golden file keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from epsrt import noise
from epsrt.condition import LABEL, Condition
from epsrt.errors import InputError, one_line, one_of
from epsrt.manifest import Manifest
from epsrt.parity.golden import value_of
from epsrt.types import Arrays, Int64, Shape

SEED = 2020  # of all that a golden file draws
KEPT = (4, 2)  # values of each condition: two where its owner gives fewer than four
FIRST = 3  # noise index of the first condition's; the golden file's other draws of the stream come before

Network = Callable[..., Tensor]
Given = Mapping[str, Tensor]  # by a condition's name, [B, *its shape]


def call(network: Network, takes: Sequence[Condition], x: Tensor, t: Tensor, given: Given) -> Tensor:
    """network(x, t[, label], **others): images are concatenated behind x [B, C, …], and the label is third."""
    of = {c.name: given[c.name] for c in takes}
    images = [of.pop(c.name) for c in takes if c.role == "image"]
    label = [of.pop(LABEL)] if LABEL in of else []
    return network(torch.cat([x, *images], 1) if images else x, t, *label, **of)


def trial(takes: Sequence[Condition], extents: Shape, batch: int) -> dict[str, Tensor]:
    """Values to try a network with; floats are normal, so that a norm of them is none of a constant."""
    made = {}
    for i, c in enumerate(takes):
        shape, generator = (batch, *c.of(extents)), torch.Generator().manual_seed(i + 1)
        if c.dtype == "float32":
            made[c.name] = torch.randn(shape, generator=generator)
        else:
            made[c.name] = torch.full(shape, c.dtype == "bool", dtype=getattr(torch, c.dtype))
    return made


def checked(given: Any, conditions: Sequence[Condition], shape: Shape) -> Arrays:
    """Examples of conditions, as `Values` takes them. Raises InputError for those that do not fit."""
    if not isinstance(given, Mapping):
        raise InputError(f"examples are a {type(given).__name__}, not a dict of arrays by the names of conditions")
    by_name = {c.name: c for c in conditions}
    for name in given:
        if name not in by_name:
            raise InputError(f"examples has {name!r}, which is no condition: {one_of(name, by_name)}")
    for c in conditions:
        if c.dtype == "int64" and c.name not in given:
            raise InputError(
                f"condition {c.name!r} is int64, and nothing says which numbers it takes: give "
                f"examples={{{c.name!r}: an array {_kept(c)} of some}}"
            )
    return {name: _example(by_name[name], value) for name, value in given.items()}


def _kept(c: Condition) -> str:
    return f"[{', '.join(map(str, ('k', *c.shape)))}]"


def _example(c: Condition, given: Any) -> NDArray[Any]:
    want, like = f"{c.dtype} {_kept(c)} with k at least {KEPT[1]}", c.dtype
    try:
        value = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"examples of {c.name!r} are no array ({one_line(error)}): give {want}") from None
    if value.shape[1:] != c.shape or value.ndim != len(c.shape) + 1 or len(value) < KEPT[1]:
        raise InputError(f"examples of {c.name!r} have shape {list(value.shape)}: give {want}")
    if not np.can_cast(value.dtype, like, "same_kind") or (value.dtype == bool) != (like == "bool"):
        raise InputError(f"examples of {c.name!r} are {value.dtype}: give {want}")
    if not np.isfinite(value).all():
        raise InputError(f"examples of {c.name!r} are not finite: give {want}")
    return value.astype(like)


@dataclass(frozen=True, eq=False)
class Choice:
    """Which of the kept values each of some states or images has: fields of the golden file's records."""

    label: Int64
    given: Int64 | None = None
    null_label: Int64 | None = None
    null_given: Int64 | None = None

    def __getitem__(self, some: slice | NDArray[Any]) -> Choice:
        parts = {name: which[some] for name, which in vars(self).items() if which is not None}
        return Choice(**parts)

    @property
    def plain(self) -> dict[str, Any]:
        """Of a record that is not guided."""
        return {"label": self.label, "given": self.given}

    @property
    def against(self) -> dict[str, Any]:
        return {"null_label": self.null_label, "null_given": self.null_given}


@dataclass(frozen=True, eq=False)
class Values:
    """The values that a golden file keeps of each condition but the label, [k, *shape] by its name."""

    manifest: Manifest
    conditions: Arrays
    nulls: Arrays

    @classmethod
    def drawn(cls, m: Manifest, examples: Mapping[str, NDArray[Any]]) -> Values:
        """Examples of their owner's where there are any, else drawn."""
        others = [c for c in m.takes if c.name != LABEL]
        fewest = min((len(examples[c.name]) for c in others if c.name in examples), default=KEPT[0])
        k = KEPT[0] if fewest >= KEPT[0] else KEPT[1]
        kept = {c.name: examples[c.name][:k] if c.name in examples else _drawn(c, i, k) for i, c in enumerate(others)}
        nulls = {c.name: kept[c.name][[1, 0]] for c in others if c.guided}
        for c in others:
            if c.null is not None:
                nulls[c.name][0] = c.null
        return cls(m, kept, nulls)

    def choice(self, n: int) -> Choice:
        """What n states or images have in turn: a few classes across all and the null label, and all that is kept.

        Every other one is guided against a negative: a class, or another's values.
        """
        m, turn = self.manifest, np.arange(n)
        classes = range(0, m.classes, max(1, m.classes // (KEPT[0] - 1)))[: KEPT[0] - 1] if m.classes else [0]
        nothing = [] if m.null_label is None else [m.null_label]
        chosen = Choice(np.resize(np.array([*classes, *nothing], np.int64), n))
        if m.null_label is not None:
            chosen = replace(chosen, null_label=np.where(turn % 2, np.roll(chosen.label, 1), m.null_label))
        if self.conditions:
            k = min(map(len, self.conditions.values()))
            chosen = replace(chosen, given=turn % k, null_given=turn % 2 if self.nulls else None)
        return chosen

    def given(self, choice: Choice, extents: Shape) -> dict[str, Tensor]:
        """What the network is given for the samples of a choice, of these extents [C, …]."""
        takes = self.manifest.takes
        return self._batch(takes, self.conditions, choice.label, choice.given, extents, len(choice.label))

    def against(self, choice: Choice, extents: Shape) -> dict[str, Tensor]:
        """What the same are guided against: the rest of what it takes is as given."""
        takes = [c for c in self.manifest.takes if c.guided]
        labels, n = choice.null_label, len(choice.label)
        return self.given(choice, extents) | self._batch(takes, self.nulls, labels, choice.null_given, extents, n)

    @staticmethod
    def _batch(
        takes: Sequence[Condition], kept: Arrays, labels: Int64 | None, which: Int64 | None, extents: Shape, n: int
    ) -> dict[str, Tensor]:
        each = {c.name: [value_of(c, kept, labels, which, i, extents) for i in range(n)] for c in takes}
        return {name: torch.from_numpy(np.stack(values)) for name, values in each.items()}


def _drawn(c: Condition, number: int, k: int) -> NDArray[Any]:
    """k values of a condition: normals, or masks that are true for fewer places each."""
    if c.dtype == "bool":
        places = c.shape[-1]
        counts = np.maximum(1, places - np.arange(k) * places // k)
        rows = np.arange(places) < counts[:, None]
        return np.broadcast_to(rows.reshape(k, *[1] * (len(c.shape) - 1), places), (k, *c.shape)).copy()
    size = int(np.prod(c.shape))
    return noise.normals(SEED, np.arange(k), noise.FORWARD, FIRST + number, size).reshape(k, *c.shape)
