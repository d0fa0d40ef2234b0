"""What came with a bundle in its engines/ besides TensorRT's files: compiled models, and proofs of what they are worth.

epsrt.pack puts them there, for machines of one kind. Like all engine files they are used only where that was asked for.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import msgspec
import numpy as np

from epsrt.bundle import Bundle
from epsrt.engines.cache import private
from epsrt.engines.cache.entry import ENGINES, look, shipped
from epsrt.engines.cache.key import Key, Record
from epsrt.engines.cache.store import EngineCache
from epsrt.errors import EngineError, one_line
from epsrt.manifest import Rung
from epsrt.types import UInt8

MODEL, PROOF = ".engine", ".parity"

log = logging.getLogger("epsrt")


@dataclass(frozen=True)
class Brought:
    """The models and proofs that a bundle brings, none of them unless it is trusted."""

    bundle: Bundle
    trusted: bool = False

    def model(self, key: Key) -> UInt8 | None:
        """A compiled model's bytes, this process's own; None where the bundle brings none of this key."""
        data = self._read(key, MODEL)
        return None if data is None else np.frombuffer(bytearray(data), np.uint8)

    def rungs(self, key: Key) -> list[Rung] | None:
        """The rungs of a proof; None where the bundle brings none of this key."""
        data = self._read(key, PROOF)
        try:
            return None if data is None else msgspec.json.decode(data, type=list[Rung])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            log.warning("a proof that came with %s is not used: %s", self.bundle.path.name, one_line(error))
            return None

    def say_if_foreign(self, key: Key) -> None:
        """Log one line, once a process, where all that the bundle brings for an engine is for others than `key`."""
        if self.trusted:
            records = [e.record for e in shipped(self.bundle.path, self.bundle.signed) if e.record]
            theirs = [_kind(record.key) for record in records if record.key.engine == key.engine]
            if theirs and _kind(key) not in theirs:
                _say(self.bundle.path.name, theirs[0], _kind(key))

    def _read(self, key: Key, suffix: str) -> bytes | None:
        if not self.trusted:
            return None
        entry = look(self.bundle.path / ENGINES / f"{key.name}{suffix}", shipped=True)
        if not entry.path.is_file():
            return None
        if self.bundle.signed is not None and not entry.is_in(self.bundle.signed):
            _say_unsigned(self.bundle.name)
            return None
        try:
            return EngineCache(entry.path.parent).load(entry)
        except EngineError as error:
            log.warning("what came with %s is not used: %s", self.bundle.path.name, error)
            return None


def ship_proof(key: Key, rungs: list[Rung], folder: Path, *, bundle_name: str) -> Path:
    """Write a proof into a bundle's own engines/, where Brought finds it. Raises OSError."""
    data, path = msgspec.json.encode(rungs), folder / ENGINES / f"{key.name}{PROOF}"
    built = datetime.now(UTC).isoformat(timespec="microseconds")
    record = Record(key, hashlib.sha256(data).hexdigest(), len(data), built, bundle_name, {})
    private.write(path, data, path.with_suffix(".json"), record, mode=0o666)
    return path


Kind = tuple[str, str, str, tuple[str, ...]]


def _kind(key: Key) -> Kind:
    """What tells machines of one kind, and a bundle, from others."""
    return key.bundle, f"{key.engine} {key.version}", key.gpu, key.capabilities


@cache
def _say(name: str, theirs: Kind, here: Kind) -> None:
    words = (
        "of another export",
        f"for {theirs[1]}, this is {here[1]}",
        f"for {theirs[2]}, this is {here[2]}",
        f"for a processor with {_list(theirs[3])}, this one has {_list(here[3])}",
    )
    differ = [word for word, a, b in zip(words, theirs, here, strict=True) if a != b]
    log.warning("%s brings models %s: they are not used", name, " and ".join(differ))


@cache
def _say_unsigned(name: str) -> None:
    log.warning("%s brings what its signature does not cover: it is not used", name)


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none of these"
