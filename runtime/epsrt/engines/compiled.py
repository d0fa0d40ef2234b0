"""OpenVINO's compiled models in the engine cache, and what each bundle was found to be worth in bf16.

A cache that cannot be used costs time alone: it is said, and the model is compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from epsrt.bundle import Bundle
from epsrt.engines.cache import EngineCache
from epsrt.engines.key import Key, Options
from epsrt.errors import EngineError
from epsrt.manifest import Graph, Rung

RECIPE = 3  # of how OpenVino compiles a step graph: models and proofs of another are not used

log = logging.getLogger("epsrt")


@dataclass(frozen=True)
class Compiled:
    """A model, and the memory that its weights lie in: both live as long as its inference requests."""

    model: Any
    memory: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class CompiledModels:
    """Of one step graph in one precision, by one version of the library on one processor."""

    bundle: Bundle
    graph: Graph
    precision: str
    version: str
    processor: str

    def get(
        self, batch: int, options: Options, load: Callable[[NDArray[np.uint8]], Any], compile: Callable[[], Any]
    ) -> Compiled:
        """The model for a batch: `load`ed from a mapped file if it is kept, else `compile`d and kept."""
        m = self.bundle.manifest
        key = Key(
            m.digest, self.graph.file, "openvino", self.version, self.processor, (), self.precision,
            ((batch, batch, batch),), {**options, "recipe": RECIPE},
        )  # fmt: skip
        try:
            cache = EngineCache()
            if entry := cache.have(key):
                memory = np.frombuffer(cache.map(entry), np.uint8)
                return Compiled(load(memory), memory)
        except (EngineError, OSError, RuntimeError) as error:  # RuntimeError: OpenVINO refuses what it wrote
            log.warning("a compiled model is not taken from the engine cache: %s", line(error))
        model = compile()
        try:
            with cache.lock(key):
                cache.store(key, model.export_model().getbuffer(), bundle_name=self.bundle.path.name)
        except (EngineError, OSError, RuntimeError) as error:
            log.warning("a compiled model is not kept: %s", line(error))
        return Compiled(model)

    def proof(self) -> list[Rung] | None:
        """What `keep_proof` kept; None if nothing."""
        try:
            kept = EngineCache().blob(self._proof)
            return None if kept is None else msgspec.json.decode(kept, type=list[Rung])
        except (EngineError, msgspec.DecodeError):
            return None

    def keep_proof(self, rungs: list[Rung]) -> None:
        """Keep what the golden file said of this precision, if the cache can be written."""
        try:
            EngineCache().keep_blob(self._proof, msgspec.json.encode(rungs))
        except EngineError as error:
            log.warning("what %s is worth is not kept: %s", self.precision, error)

    @property
    def _proof(self) -> str:
        parts = (self.bundle.manifest.digest[:16], self.graph.stem, "openvino", self.version, self.processor)
        return "-".join((*filter(None, parts), f"{self.precision}-{RECIPE}.parity"))


def line(error: Exception) -> str:
    """What an exception says, in one line."""
    return " ".join(str(error).split())
