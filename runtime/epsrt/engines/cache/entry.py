"""An engine file's entry in the engine cache, or in a bundle: where it is, its record, and what is wrong with it."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shlex
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from epsrt.engines.cache.key import Record, Wanted, differences
from epsrt.engines.cache.private import render
from epsrt.errors import EngineError
from epsrt.raised import foreign, passed_over

ENGINES = "engines"  # the directory of engine files, in the cache and in a bundle
RECORD_LIMIT = 1 << 20  # bytes
_KEPT = re.compile(r"([0-9a-f]{16})\.(engine|json)")


@dataclass(frozen=True)
class Entry:
    """An engine file's place. `damage` says what one sees wrong without reading it; "" if nothing is."""

    path: Path
    record: Record | None  # None: it cannot be read
    damage: str
    size: int  # bytes on disk, the record's too
    used: float  # when it was last loaded, or else built: seconds since 1970
    shipped: bool  # it came with a bundle

    @property
    def record_path(self) -> Path:
        return self.path.with_suffix(".json")

    def is_in(self, signed: Mapping[str, str]) -> bool:
        """Whether these bytes of the record, and those that it tells of, are signed: SHA-256 by path in the bundle."""
        if self.record is None:
            return False
        sums = {self.path: self.record.sha256, self.record_path: hashlib.sha256(render(self.record)).hexdigest()}
        return all(signed.get(f"{ENGINES}/{path.name}") == sha256 for path, sha256 in sums.items())

    @property
    def built(self) -> str:
        """An ISO time in UTC; "" if it is not known."""
        return self.record.built if self.record else ""


def fitting(entries: Iterable[Entry], wanted: Wanted) -> list[Entry]:
    """The entries that fit, the most recently built first."""
    fit = [e for e in entries if e.record and e.path.is_file() and not differences(e.record.key, wanted)]
    return sorted(fit, key=lambda e: e.built, reverse=True)


def shipped(bundle: Path, signed: Mapping[str, str] | None = None) -> list[Entry]:
    """The engine files that came with a bundle: `fitting` finds those that fit, `refusal` is for one not trusted.

    `signed` is Bundle.signed: where a signature was required, they are those that it covers.
    """
    return [e for e in entries_in(bundle / ENGINES, shipped=True) if signed is None or e.is_in(signed)]


def refusal(entry: Entry, command: str = "") -> EngineError:
    """What to raise instead of loading an engine file that came with a bundle, where nobody said that it is trusted.

    `command` is what builds one's own; "" for that of the bundle's plainest graph.
    """
    bundle, engine = shlex.quote(str(entry.path.parents[1])), entry.record.key.engine if entry.record else "auto"
    command = command or f"epsrt build {bundle} --engine {engine}"
    return EngineError(
        f"{entry.path} came with the bundle: an engine file is native code that runs unchecked, and hashes only detect "
        f'damage: pass --trust-engines if you trust who sent it, or run "{command}" to build your own'
    )


def names_in(folder: Path, pattern: re.Pattern[str]) -> list[str]:
    """The engine files that the matching files of a directory belong to."""
    matches = (pattern.fullmatch(p.name) for p in folder.iterdir()) if folder.is_dir() else ()
    return sorted({match[1] for match in matches if match})


def entries_in(folder: Path, shipped: bool = False) -> list[Entry]:
    return [look(folder / f"{name}.engine", shipped) for name in names_in(folder, _KEPT)]


def look(path: Path, shipped: bool = False) -> Entry:
    """An engine file's entry, whatever state it is in."""
    record, damage, stats = None, "", []
    for each in (path.with_suffix(".json"), path):
        with passed_over(OSError):
            stats.append(each.lstat())
    try:
        record = msgspec.json.decode(_record_bytes(path.with_suffix(".json")), type=Record)
        if record.key.name != path.stem:
            record, damage = None, "its record is another engine file's"
        elif not path.is_file():
            damage = "the engine file is missing"
        elif path.stat().st_size != record.size:
            damage = f"it has {path.stat().st_size} bytes, its record says {record.size}"
    except FileNotFoundError:
        damage = "its record is missing"
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if foreign(error):
            raise
        damage = f"its record cannot be read: {error}"
    return Entry(path, record, damage, sum(s.st_size for s in stats), stats[0].st_mtime if stats else 0.0, shipped)


def _record_bytes(path: Path) -> bytes:
    """Raises OSError where it is no plain file of a record's size: a bundle may bring a pipe, or a link to a device."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if found.st_size > RECORD_LIMIT:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return path.read_bytes()
