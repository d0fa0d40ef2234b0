"""Plan: a sampler as a table. One row a step, one named column a coefficient.

    out = net(in_scale * x, t, label)
    x0  = min(max(p*x + q*out, -clip), clip)
    x'  = a*x + b*x0 + h*out + c*m + d*z          z ~ N(0, I); d*exp(r*v)*z where the network returns a variance v
    m'  = e*x + f*x0 + o*out + g*m

x is the noisy image and m one memory register, 0 at first. The step runs inside the exported graph; an engine gets
rows. A graph may have more features:

    guidance    out = u + w*(c - u), u and c the network's outputs for the null label and for the label; then
                out *= 1 + phi*(std(c)/std(out) - 1)
    classifier  out += s*j*grad log p(target | in_scale*x)
    mask        x' = mask*(ka*known + kb*z2) + (1 - mask)*x'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from epsrt.errors import InputError, typed
from epsrt.types import Float32, Float64

CLIP_OFF = 1e30  # larger than any sample, and finite in float32

# name -> the value of a column that a sampler does not name
DEFAULTS: dict[str, float] = {
    "t": 0.0, "in_scale": 1.0,
    "p": 0.0, "q": 0.0, "clip": CLIP_OFF,
    "a": 0.0, "b": 0.0, "h": 0.0, "c": 0.0, "d": 0.0,
    "e": 0.0, "f": 0.0, "o": 0.0, "g": 0.0,
    "n": 0.0, "r": 0.0, "w": 1.0, "phi": 0.0, "s": 0.0, "j": 0.0, "ka": 1.0, "kb": 0.0,
}  # fmt: skip
COLUMNS = tuple(DEFAULTS)
STEP_COLUMNS = COLUMNS[: COLUMNS.index("n") + 1]  # what the plainest step graph takes
# what a step graph may have beyond the plain step, and the columns that it takes for it
FEATURES: dict[str, tuple[str, ...]] = {
    "learned variance": ("r",), "thresholding": (), "guidance": ("w", "phi"), "classifier": ("s", "j"),
    "mask": ("ka", "kb"),
}  # fmt: skip
# a graph without the feature can only run the column's default
NEEDS_FEATURE = {"r": "learned variance", "w": "guidance", "s": "classifier"}
MAX_N = 1 << 24  # n travels as float32


@dataclass(frozen=True, eq=False)
class Plan:
    """A sampler: `table` float64 [steps, len(COLUMNS)], and `start`: x begins as start[0]·init + start[1]·z.

    `level` is (α, σ) of x = α·x0 + σ·ε as the first row reads it. The columns ka and kb are α and σ of the x that each
    row leaves. `name` is for people; nothing downstream depends on it.

    Raises InputError when the table is empty, has another width, is not finite in float32, or has a noise index n that
    is not an integer in [0, 2^24).
    """

    table: Float64
    start: tuple[float, float] = (0.0, 1.0)
    name: str = "plan"
    level: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        table = np.array(self.table, dtype=np.float64)  # a copy: nobody else holds it
        if table.ndim != 2 or table.shape[1] != len(COLUMNS) or not len(table):
            raise InputError(f"a plan is a table [steps ≥ 1, {len(COLUMNS)}], not {list(table.shape)}: see Plan.of")
        with np.errstate(over="ignore", invalid="ignore"):
            bad = np.argwhere(~np.isfinite(table.astype(np.float32)))  # as an engine takes it
        if len(bad):
            row, column = bad[0]
            raise InputError(f"plan {self.name!r}: {COLUMNS[column]} is {table[row, column]} in row {row}")
        n = table[:, COLUMNS.index("n")]
        if np.any((n != np.floor(n)) | (n < 0) | (n >= MAX_N)):
            raise InputError(f"plan {self.name!r}: noise indices n must be integers in 0 … {MAX_N - 1}")
        for field, pair in (("start", self.start), ("level", self.level)):
            two = tuple(typed(f"plan {self.name!r}: {field}", value, 0.0) for value in pair)
            if len(two) != 2 or not np.isfinite(two).all():
                raise InputError(f"plan {self.name!r}: {field} = {pair} is not (signal, noise), two finite numbers")
        table.flags.writeable = False
        object.__setattr__(self, "table", table)

    @classmethod
    def of(
        cls,
        name: str,
        start: tuple[float, float] = (0.0, 1.0),
        level: tuple[float, float] = (0.0, 1.0),
        **columns: ArrayLike,
    ) -> Plan:
        """A plan of named columns, each a number or a list [steps]; n counts 0, 1, … unless it is given.

        >>> Plan.of("euler", t=[2, 1], p=1.0, a=1.0, h=[-0.5, -0.5])
        """
        unknown = sorted(set(columns) - set(COLUMNS))
        if unknown:
            raise InputError(f"plan {name!r}: no column {unknown[0]!r}; the columns are {', '.join(COLUMNS)}")
        arrays = {key: np.asarray(value, dtype=np.float64) for key, value in columns.items()}
        try:
            (steps,) = np.broadcast_shapes(*(a.shape for a in arrays.values()), (1,))
        except ValueError as error:
            shapes = ", ".join(f"{k} {list(a.shape)}" for k, a in arrays.items())
            raise InputError(f"plan {name!r}: columns must be lists of one length, got {shapes}") from error
        table = np.tile(np.array(list(DEFAULTS.values())), (steps, 1))
        table[:, COLUMNS.index("n")] = np.arange(steps)
        for key, value in arrays.items():
            table[:, COLUMNS.index(key)] = value
        return cls(table, start, name, level)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.table, self.start, self.name, self.level)  # checked again, and read-only

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, column: str) -> Float64:
        """One column by name, float64 [steps]."""
        if column not in DEFAULTS:
            raise InputError(f"no column {column!r}; the columns are {', '.join(COLUMNS)}")
        return self.table[:, COLUMNS.index(column)]

    def cut(self, first: int, last: int | None = None, start: tuple[float, float] | None = None) -> Plan:
        """The plan of rows first … last−1. Each row keeps its noise index."""
        begin, end, _ = slice(first, last).indices(len(self))
        if begin >= end:
            raise InputError(f"cut({first}, {last}) leaves none of the {len(self)} rows of plan {self.name!r}")
        level = self._level_at(begin)
        table = self.table[first:last]
        return replace(self, table=table, start=self.start if start is None else start, level=level)

    def begun(self, first: int) -> Plan:
        """The plan of rows first …, which begins from images that are noised to the level of row `first` (img2img).

        Its start has both parts, (α, σ): Sampler.sample noises `init` by them, as strength= does. Each row keeps its
        noise index. A row that would read the previous x0 from m takes its own x0 instead, as the first step of a
        multistep method does. Where it would read anything else, as Heun's second row, the plan begins a row earlier.
        """
        if not 0 <= first < len(self):
            raise InputError(f"row {first} is outside 0 … {len(self) - 1}, the rows of plan {self.name!r}")
        at = {name: i for i, name in enumerate(COLUMNS)}
        table = self.table[first:].copy()
        row = table[0]
        if first and (row[at["c"]] or row[at["g"]]):
            before = self.table[first - 1]
            if any(before[at[name]] for name in "eog"):
                return self.begun(first - 1)
            for own, read in (("b", "c"), ("f", "g")):
                row[at[own]] += row[at[read]] * before[at["f"]]
                row[at[read]] = 0.0
        level = self._level_at(first)
        return replace(self, table=table, start=level, level=level)

    def _level_at(self, row: int) -> tuple[float, float]:
        alpha, sigma = self.levels[row]
        return float(alpha), float(sigma)

    @property
    def levels(self) -> Float64:
        """(α, σ) of x before each row and after the last one, float64 [steps + 1, 2]."""
        return np.vstack([self.level, np.column_stack([self["ka"], self["kb"]])])

    @property
    def features(self) -> tuple[str, ...]:
        """The FEATURES that a step graph must have to run the plan."""
        return tuple(f for name, f in NEEDS_FEATURE.items() if np.any(self[name] != DEFAULTS[name]))

    @property
    def stochastic(self) -> bool:
        """Whether a step adds noise."""
        return bool(np.any(self["d"] != 0))

    def rows(self, columns: Sequence[str]) -> Float32:
        """The table as an engine takes it, float32 [steps, len(columns)].

        Raises InputError when the plan uses a column that is not among these.
        """
        for name, feature in NEEDS_FEATURE.items():
            if name not in columns and feature in self.features:
                raise InputError(f"plan {self.name!r} uses {feature} (column {name!r}), which this step graph lacks")
        chosen = self.table[:, [COLUMNS.index(name) for name in columns]]
        return np.ascontiguousarray(chosen, dtype=np.float32)


def idle_row(columns: Sequence[str]) -> Float32:
    """The identity row, float32 [len(columns)]: x' = x, m' = m. It is for lanes without work.

    Where a lane has a mask, the row makes x' the clean known pixels. So write a sample when it is to run, not before.
    """
    return np.array([{**DEFAULTS, "a": 1.0, "g": 1.0}[name] for name in columns], dtype=np.float32)
