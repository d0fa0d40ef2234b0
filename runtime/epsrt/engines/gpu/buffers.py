"""The device buffers of lanes: what a step reads and writes, and what a sample is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from epsrt import noise
from epsrt.engines.gpu.cuda import Stream
from epsrt.engines.moves import Pairs
from epsrt.engines.signature import Signature
from epsrt.types import Shape

# input -> its stream, and the column that it is multiplied by
NOISES = {"z": (noise.STEP, "d"), "z2": (noise.KNOWN, "kb")}


@dataclass(frozen=True)
class Buffers:
    """The device addresses of what `width` lanes hold, of images of `shape`.

    Two buffers of x alternate, and two of m: a step reads one and writes the other.

    signature  of the step graph, for this width and shape
    fixed      the address of each of signature.fixed
    seeds, indices   of the samples, uint64 and uint32 [width]
    broken     the step since which a lane is not finite, int32 [width], and that step's t, float32 [width]
    slots      where captured steps find their rows, one address a step of a chunk
    """

    width: int
    shape: Shape
    signature: Signature
    x: tuple[int, int]
    m: tuple[int, int]
    x0: int
    fixed: Mapping[str, int]
    seeds: int
    indices: int
    broken: int
    slots: tuple[int, ...] = ()

    def sources(self, now: int, rows: int) -> dict[str, int]:
        """Address of each input that moves, for a step from x[now]."""
        return {"x": self.x[now], "m": self.m[now], "rows": rows}

    def results(self, now: int) -> dict[str, int]:
        """Address of each output of a step from x[now]."""
        return {"x_next": self.x[1 - now], "m_next": self.m[1 - now], "x0": self.x0}

    def shown(self, what: Literal["x", "m", "x0"]) -> int:
        """Address of what lanes hold between two calls of advance."""
        return {"x": self.x[0], "m": self.m[0], "x0": self.x0}[what]

    def kept(self) -> list[tuple[int, int]]:
        """Address, and bytes of one lane, of all that a sample is between two calls of advance."""
        inputs = [(name, tensor.nbytes // self.width) for name, tensor in self.signature.fixed.items()]
        image = 4 * int(np.prod(self.shape))
        return [
            *((self.shown(what), image) for what in ("x", "m", "x0")),
            *((self.fixed[name], size) for name, size in inputs if name not in NOISES),
            *((self.seeds, 8), (self.indices, 4), (self.broken, 4), (self.broken + 4 * self.width, 4)),
        ]

    def take(self, stream: Stream, source: Buffers, pairs: Pairs) -> None:
        """Copy samples between lanes, in a stream: pairs of (lane of source, lane here)."""
        there, here = zip(*pairs, strict=True)
        for (to, size), (start, _) in zip(self.kept(), source.kept(), strict=True):
            for run in runs(there, here):
                many = (run.stop - run.start) * size
                stream.copy(to + here[run.start] * size, start + there[run.start] * size, many)

    def optional(self, *names: str) -> tuple[int, ...]:
        """Address of each of these inputs, 0 for those that the graph does not take."""
        return tuple(self.fixed.get(name, 0) for name in names)


def runs(*lanes: Sequence[int]) -> list[slice]:
    """Parts of lists of lanes, of one length, in which all of them count up by one: a copy serves each part."""
    if not lanes[0]:
        return []
    breaks = np.flatnonzero((np.diff(lanes) != 1).any(axis=0)) + 1
    return [slice(*ends) for ends in pairwise([0, *breaks.tolist(), len(lanes[0])])]
