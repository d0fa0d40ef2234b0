"""The device buffers that a step reads and writes, and samples on their way there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsrt.condition import LABEL
from epsrt.engine import Sample
from epsrt.engines.signature import Signature
from epsrt.types import Float32, Shape

BEGIN = np.dtype(
    [
        ("seed", "u8"),
        ("label", "i8"),
        ("target", "i8"),
        ("index", "u4"),
        ("stream", "u4"),
        ("lane", "i4"),
        ("signal", "f4"),
        ("scale", "f4"),
        ("init", "i4"),
        ("known", "i4"),
        ("unused", "i4"),
    ]
)  # struct Begin of kernels.cu


@dataclass(frozen=True)
class Buffers:
    """The device addresses that a step reads and writes, for `width` lanes of images of `shape`.

    Two buffers of x alternate, and two of m: a step reads one and writes the other.

    signature  of the step graph, for this width and shape
    fixed      the address of each of signature.fixed
    slots      where captured steps find their rows, one address a step of a chunk
    """

    width: int
    shape: Shape
    signature: Signature
    x: tuple[int, int]
    m: tuple[int, int]
    x0: int
    fixed: Mapping[str, int]
    slots: tuple[int, ...] = ()

    def sources(self, now: int, rows: int) -> dict[str, int]:
        """Address of each input that moves, for a step from x[now]."""
        return {"x": self.x[now], "m": self.m[now], "rows": rows}

    def results(self, now: int) -> dict[str, int]:
        """Address of each output of a step from x[now]."""
        return {"x_next": self.x[1 - now], "m_next": self.m[1 - now], "x0": self.x0}

    def optional(self, *names: str) -> tuple[int, ...]:
        """Address of each of these inputs, 0 for those that the graph does not take."""
        return tuple(self.fixed.get(name, 0) for name in names)


def pack(samples: Mapping[int, Sample]) -> tuple[NDArray[Any], list[Float32]]:
    """Samples by lane, as the kernel `begin` takes them: BEGIN [len(samples)], and the images that it numbers."""
    begins, images = np.zeros(len(samples), BEGIN), list[Float32]()

    def placed(*given: Float32 | None) -> int:
        if given[0] is None:
            return -1
        images.extend(image.ravel() for image in given if image is not None)
        return len(images) - len(given)

    for i, (lane, s) in enumerate(samples.items()):
        init = placed(s.init if s.start[0] != 0 else None)
        known = placed(s.known, s.mask)
        label = int(np.asarray(s.conditions.get(LABEL, 0)))
        begins[i] = (s.seed, label, s.target, s.index, s.stream, lane, *s.start, init, known, 0)
    return begins, images
