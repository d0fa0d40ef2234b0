"""OpenVINO's compiled models in the engine cache, or brought by a bundle.

A cache that cannot be used costs time alone: it is said, and the model is compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from epsrt.bundle import Bundle
from epsrt.engines.cache.brought import Brought
from epsrt.engines.cache.entry import Entry
from epsrt.engines.cache.key import Key, Options, Profiles
from epsrt.engines.cache.private import ELSEWHERE
from epsrt.engines.cache.store import EngineCache
from epsrt.errors import EngineError, one_line
from epsrt.machine import instructions
from epsrt.manifest import StepGraph
from epsrt.part import Part
from epsrt.raised import foreign
from epsrt.types import UInt8

RECIPE = 4  # of how OpenVino compiles a step graph: models and proofs of another are not used
KEPT_FILES = 16  # of a step graph or a part: a model takes as much room as the weights
KEEPING = 60.0  # seconds that another process is given to keep a model

log = logging.getLogger("epsrt")


@dataclass(frozen=True)
class Compiled:
    """A model, and the memory that its weights lie in: both live as long as its inference requests."""

    model: Any
    memory: UInt8 | None = None


@dataclass(frozen=True)
class CompiledModels:
    """The models of one step graph or part in one precision, by one version of the library on one processor."""

    bundle: Bundle
    graph: StepGraph | Part
    precision: str
    version: str
    processor: str
    brought: Brought

    def get(
        self, key: Key, load: Callable[[UInt8], Any], compile: Callable[[], Any], export: Callable[[Any], memoryview]
    ) -> Compiled:
        """The model of a key: `load` makes it from a file that is there.

        Else `compile` makes it, and what `export` makes of it is kept, unless another process is just keeping it.
        """
        try:
            if (memory := self.brought.model(key)) is not None:
                return Compiled(load(memory), memory)
        except EngineError as error:
            log.warning("a compiled model that came with the bundle is not used: %s", one_line(error))
        cache = None
        try:
            cache = EngineCache()
            if entry := cache.have(key):
                memory = np.frombuffer(cache.map(entry), np.uint8)
                return Compiled(load(memory), memory)
        except (EngineError, OSError) as error:
            if foreign(error):
                raise
            log.warning("a compiled model is not taken from the engine cache: %s", one_line(error))
        model = compile()
        try:
            if cache is not None:
                with cache.lock(key, seconds=0) as mine:
                    if mine:
                        cache.store(key, export(model), bundle_name=self.bundle.name)
                self._shrink(cache)
        except (EngineError, OSError) as error:
            if foreign(error):
                raise
            log.warning("a compiled model is not kept: %s", one_line(error))
        return Compiled(model)

    def kept(self, key: Key, what: str) -> Entry:
        """The file of a model that was made; `what` names it. Raises EngineError where the cache does not keep it."""
        cache = EngineCache()
        entry = cache.have(key)
        if entry is None:
            said = f"another process is keeping {what}"
            say = lambda _: log.warning("%s: waiting for it, %g s at most", said, KEEPING)  # noqa: E731
            with cache.lock(key, say, KEEPING) as held:
                entry = cache.have(key)
            if entry is None and not held:
                raise EngineError(f"{said} for more than {KEEPING:g} s: try again when it has ended")
        if entry is None:
            raise EngineError(f"{what} was compiled, and is not kept: {ELSEWHERE}")
        return entry

    def _shrink(self, cache: EngineCache) -> None:
        """Remove the models that were used longest ago: each batch has one, with all weights."""
        mine = [e for e in cache.entries() if e.record and self._alike(e.record.key)]
        for entry in sorted(mine, key=lambda e: e.used, reverse=True)[KEPT_FILES:]:
            cache.remove(entry)

    def _alike(self, key: Key) -> bool:
        return (key.engine, key.bundle, key.graph) == ("openvino", self.bundle.manifest.digest, self.graph.file)

    def key(self, profiles: Profiles, options: Options) -> Key:
        """What makes one file, or one proof, of these another."""
        return Key(
            self.bundle.manifest.digest,
            self.graph.file,
            "openvino",
            self.version,
            self.processor,
            instructions(),  # hypervisors give many processors one name
            self.precision,
            profiles,
            {**options, "recipe": RECIPE},
        )
