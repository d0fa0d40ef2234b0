"""What epsrt.verify said of an engine on this machine: measured once, before its first use, and kept in the cache.

A cache that cannot be used costs time alone: it is said, and the engine is measured again next time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from epsrt.engine import Engine
from epsrt.engines.cache.brought import Brought
from epsrt.engines.cache.entry import Entry
from epsrt.engines.cache.key import Key
from epsrt.engines.cache.private import ELSEWHERE
from epsrt.engines.cache.store import EngineCache
from epsrt.errors import EngineError
from epsrt.manifest import Rung
from epsrt.parity.golden import GoldenError
from epsrt.raised import foreign, passed_over
from epsrt.types import OnProgress
from epsrt.verify import verify

WAIT = 60.0  # seconds that another process is given to measure: a proof takes 6 to 35

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
        with self._alone(on_progress) as alone:
            rungs = self._measured()  # by another process, just now
            if rungs is None:
                try:
                    tell = on_progress and (lambda name, share: on_progress(f"{self.what} {name}", share))
                    rungs = verify(engine, tell, parts=False)
                except GoldenError as error:
                    log.warning("%s cannot be proven: %s", self.what, error)
                    return None
                if alone:
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
        except (EngineError, OSError, msgspec.DecodeError) as error:
            if foreign(error):
                raise
            return None

    def keep(self, rungs: list[Rung]) -> None:
        """Keep rungs for the key, if the cache can be written."""
        try:
            if EngineCache().keep_blob(self._name, msgspec.json.encode(rungs)):
                return
            reason = ELSEWHERE
        except (EngineError, OSError) as error:
            if foreign(error):
                raise
            reason = str(error)
        log.warning("what %s is worth is not kept, and measured again next time: %s", self.what, reason)

    @contextmanager
    def _alone(self, on_progress: OnProgress | None) -> Iterator[bool]:
        """Wait for another process that measures the same, WAIT seconds at most; False where it still does.

        True too without a cache, where nobody finds another's proof.
        """

        def say(_: str) -> None:
            how = "waiting for it, %g s at most, and then measuring it here too"
            log.warning(f"another process is measuring what %s is worth: {how}", self.what, WAIT)
            if on_progress is not None:
                on_progress(f"{self.what} waits for another process", 0.0)

        with ExitStack() as stack:
            alone = True
            with passed_over(EngineError, OSError):
                alone = stack.enter_context(EngineCache().lock(self.key, say, WAIT))
            yield alone

    @property
    def _name(self) -> str:
        k = self.key
        words = (k.bundle[:16], Path(k.graph).stem, k.engine, k.version, k.gpu, *k.capabilities, k.precision, k.name)
        return "-".join((*filter(None, words),)) + ".parity"


@dataclass(frozen=True)
class Kept:
    """What lanes came from: a file of the engine cache, where the engine keeps one, and what lets the engine run it."""

    entry: Entry | None
    proofs: tuple[Proof, ...]
