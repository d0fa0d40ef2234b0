"""The one declaration of what a step graph or a part takes and gives, and the one check that an engine's graph is so.

Engines bind raw addresses: a graph that is not what the manifest implies would read and write elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsrt.bundle import Bundle
from epsrt.errors import EngineError
from epsrt.manifest import StepGraph
from epsrt.part import FREE, Part, Port
from epsrt.types import Shape, Size

MOVING = ("x", "m", "rows")  # the inputs that change their address from step to step
OUTPUTS = ("x_next", "m_next", "x0")


@dataclass(frozen=True)
class Tensor:
    """An input or an output: `dtype` is NumPy's word, or a library's own for one that no step graph has."""

    dtype: str
    extents: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join('?' if n == FREE else str(n) for n in self.extents)}]"

    @property
    def nbytes(self) -> int:
        """Bytes of a tensor whose extents are all given."""
        return prod(self.extents) * np.dtype(self.dtype).itemsize

    def zeros(self) -> NDArray[Any]:
        """A tensor whose extents are all given, in the host's memory."""
        return np.zeros(self.extents, self.dtype)


@dataclass(frozen=True)
class Signature:
    """A step graph's inputs and outputs by name."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]

    @classmethod
    def of(cls, bundle: Bundle, graph: StepGraph | Part, batch: int = FREE, shape: Shape | None = None) -> Signature:
        """What the manifest implies for a graph, with free extents, or for a batch and a shape [C, …].

        Without a shape, the extents that other sizes change are free.
        """
        m = bundle.manifest
        if isinstance(graph, Part):
            return cls.of_part(graph, m.latent.factor if m.latent else 1, batch, None if shape is None else shape[1:])
        extents = shape or m.free
        image = Tensor("float32", (batch, *extents))
        inputs = {"x": image, "m": image, "z": image, "rows": Tensor("float32", (batch, len(graph.columns)))}
        inputs |= {c.name: Tensor(c.dtype, (batch, *c.of(extents))) for c in m.takes}
        inputs |= {c.null_name: Tensor(c.dtype, (batch, *c.of(extents))) for c in m.nulls(graph.features)}
        if "classifier" in graph.features:
            inputs["target"] = Tensor("int64", (batch,))
        if "mask" in graph.features:
            inputs |= dict.fromkeys(("known", "mask", "z2"), image)
        return cls(inputs, dict.fromkeys(OUTPUTS, image))

    @classmethod
    def of_part(cls, part: Part, factor: int, batch: int = FREE, extents: Size | None = None) -> Signature:
        """What a part's ports say, with free extents, or for a batch and the extents of its latents."""

        def named(ports: tuple[Port, ...]) -> dict[str, Tensor]:
            shapes = (port.shape if extents is None else port.of(extents, factor) for port in ports)
            return {p.name: Tensor(p.dtype, (batch, *shape)) for p, shape in zip(ports, shapes, strict=True)}

        return cls(named(part.inputs), named(part.outputs))

    @property
    def fixed(self) -> dict[str, Tensor]:
        """The inputs that stay at one address: z, conditions, target, known, mask, z2, those that there are."""
        return {name: tensor for name, tensor in self.inputs.items() if name not in MOVING}

    def check(self, found: Mapping[str, Tensor], where: object, way_out: str) -> None:
        """Raise EngineError unless the tensors of a graph are these; `where` they were found, for the sentence."""
        implied = {**self.inputs, **self.outputs}
        for name in {**implied, **found}:
            if found.get(name) != implied.get(name):
                raise EngineError(
                    f"{where}: {name} is {found.get(name, 'missing')}, the manifest implies "
                    f"{implied.get(name, 'none')}: {way_out}"
                )
