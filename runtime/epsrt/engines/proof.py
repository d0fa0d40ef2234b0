"""What epsrt.verify said of an engine on this machine: measured once, before its first use, and kept in the cache.

A cache that cannot be used costs time alone: it is said, and the engine is measured again next time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from epsrt.engine import Engine
from epsrt.engines.cache.brought import Brought
from epsrt.engines.cache.key import Key
from epsrt.engines.cache.private import ELSEWHERE
from epsrt.engines.cache.store import EngineCache
from epsrt.errors import BundleError, EngineError
from epsrt.manifest import Rung
from epsrt.types import OnProgress
from epsrt.verify import verify

log = logging.getLogger("epsrt")


@dataclass(frozen=True)
class Proof:
    """The rungs of an engine for `key`, which holds all that they depend on; `what` names it in sentences."""

    key: Key
    what: str
    brought: Brought | None = None  # by the engine's bundle: what is kept there counts too

    def of(self, engine: Engine, on_progress: OnProgress | None = None, may_measure: bool = True) -> list[Rung] | None:
        """The engine's rungs of epsrt.verify, kept or measured now.

        None where they were not measured and may not be, or the golden file does not suffice.
        """
        rungs = self.kept()
        if rungs is not None or not may_measure:
            return rungs
        with self._alone():
            rungs = self._measured()  # by another process, just now
            if rungs is None:
                try:
                    tell = on_progress and (lambda name, share: on_progress(f"{self.what} {name}", share))
                    rungs = verify(engine, tell)
                except BundleError as error:
                    log.warning("%s cannot be proven: %s", self.what, error)
                    return None
                self.keep(rungs)
        return rungs

    def kept(self) -> list[Rung] | None:
        """What the bundle brings, or `keep` kept; None if nothing."""
        rungs = None if self.brought is None else self.brought.rungs(self.key)
        return self._measured() if rungs is None else rungs

    def _measured(self) -> list[Rung] | None:
        """What the cache has."""
        try:
            kept = EngineCache().blob(self._name)
            return None if kept is None else msgspec.json.decode(kept, type=list[Rung])
        except (EngineError, OSError, msgspec.DecodeError):
            return None

    def keep(self, rungs: list[Rung]) -> None:
        """Keep rungs for the key, if the cache can be written."""
        try:
            if EngineCache().keep_blob(self._name, msgspec.json.encode(rungs)):
                return
            reason = ELSEWHERE
        except (EngineError, OSError) as error:
            reason = str(error)
        log.warning("what %s is worth is not kept, and measured again next time: %s", self.what, reason)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the right to measure, one process at a time, where there is a cache to find another's proof in."""
        with ExitStack() as stack:
            with suppress(EngineError, OSError):
                stack.enter_context(EngineCache().lock(self.key))
            yield

    @property
    def _name(self) -> str:
        k = self.key
        words = (k.bundle[:16], Path(k.graph).stem, k.engine, k.version, k.gpu, *k.capabilities, k.precision, k.name)
        return "-".join((*filter(None, words),)) + ".parity"
