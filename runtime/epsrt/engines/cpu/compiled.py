"""OpenVINO's compiled models in the engine cache, and the proof of what each bundle is worth in bf16.

A cache that cannot be used costs time alone: it is said, and the model is compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from epsrt.bundle import Bundle
from epsrt.engines.cache.key import Key, Options
from epsrt.engines.cache.private import ELSEWHERE
from epsrt.engines.cache.store import EngineCache
from epsrt.errors import EngineError, one_line
from epsrt.manifest import Rung, StepGraph
from epsrt.types import UInt8

RECIPE = 3  # of how OpenVino compiles a step graph: models and proofs of another are not used
KEPT_FILES = 16  # of a step graph: a model takes as much room as the weights

log = logging.getLogger("epsrt")


@dataclass(frozen=True)
class Compiled:
    """A model, and the memory that its weights lie in: both live as long as its inference requests."""

    model: Any
    memory: UInt8 | None = None


@dataclass(frozen=True)
class CompiledModels:
    """The models of one step graph in one precision, by one version of the library on one processor."""

    bundle: Bundle
    graph: StepGraph
    precision: str
    version: str
    processor: str

    def get(self, batch: int, options: Options, load: Callable[[UInt8], Any], compile: Callable[[], Any]) -> Compiled:
        """The model for a batch: `load` makes it from a kept, mapped file; else `compile` does, and it is kept."""
        key = self._key(((batch, batch, batch),), options)
        cache = None
        try:
            cache = EngineCache()
            if entry := cache.have(key):
                memory = np.frombuffer(cache.map(entry), np.uint8)
                return Compiled(load(memory), memory)
        except (EngineError, OSError, RuntimeError) as error:  # RuntimeError: OpenVINO refuses what it wrote
            log.warning("a compiled model is not taken from the engine cache: %s", one_line(error))
        model = compile()
        try:
            if cache is not None:
                with cache.lock(key):
                    cache.store(key, model.export_model().getbuffer(), bundle_name=self.bundle.path.name)
                self._shrink(cache)
        except (EngineError, OSError, RuntimeError) as error:
            log.warning("a compiled model is not kept: %s", one_line(error))
        return Compiled(model)

    def _shrink(self, cache: EngineCache) -> None:
        """Remove the models that were used longest ago: each batch has one, with all weights."""
        mine = [e for e in cache.entries() if e.record and self._alike(e.record.key)]
        for entry in sorted(mine, key=lambda e: e.used, reverse=True)[KEPT_FILES:]:
            cache.remove(entry)

    def _alike(self, key: Key) -> bool:
        return (key.engine, key.bundle, key.graph) == ("openvino", self.bundle.manifest.digest, self.graph.file)

    def _key(self, profiles: tuple[tuple[int, int, int], ...], options: Options) -> Key:
        return Key(
            self.bundle.manifest.digest,
            self.graph.file,
            "openvino",
            self.version,
            self.processor,
            (),
            self.precision,
            profiles,
            {**options, "recipe": RECIPE},
        )

    def proof(self) -> list[Rung] | None:
        """What `keep_proof` kept; None if nothing."""
        try:
            kept = EngineCache().blob(self._proof)
            return None if kept is None else msgspec.json.decode(kept, type=list[Rung])
        except (EngineError, OSError, msgspec.DecodeError):
            return None

    def keep_proof(self, rungs: list[Rung]) -> None:
        """Keep what the golden file said of this precision, if the cache can be written."""
        try:
            if EngineCache().keep_blob(self._proof, msgspec.json.encode(rungs)):
                return
            reason = ELSEWHERE
        except (EngineError, OSError) as error:
            reason = str(error)
        log.warning("what %s is worth is not kept, and measured again next time: %s", self.precision, reason)

    @contextmanager
    def proving(self) -> Iterator[None]:
        """Hold the right to prove, one process at a time, where there is a cache to find another's proof in."""
        with ExitStack() as stack:
            with suppress(EngineError, OSError):
                stack.enter_context(EngineCache().lock(self._key((), {"proof": True})))
            yield

    @property
    def _proof(self) -> str:
        parts = (self.bundle.manifest.digest[:16], self.graph.stem, "openvino", self.version, self.processor)
        return "-".join((*filter(None, parts), f"{self.precision}-{RECIPE}.parity"))
