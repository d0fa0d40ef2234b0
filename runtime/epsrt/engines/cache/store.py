"""The engine cache: engine files that were built here, in the user's cache directory, or came with a bundle.

    engines/<bundle, 16 hex>/<key, 16 hex>.engine  what the library built
                             <key, 16 hex>.json    its record: the key, the file's size and SHA-256; its time: last used
                             <key, 16 hex>.lock    held while it is built
    timing/NAME.bin, timing/NAME.json              other native data that a library wants back; its size and SHA-256
    libraries/NAME/                                what a library keeps and loads by itself

An engine file is native code. Nothing in the cache is used that another user could have written, and no engine file
whose bytes are not those that were recorded. A bundle may bring engine files in its own `engines/`: whoever loads one
says that it is trusted.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from mmap import mmap
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from filelock import FileLock, Timeout

from epsrt.engines.cache import private
from epsrt.engines.cache.entry import ENGINES, Entry, entries_in, fitting, look, names_in
from epsrt.engines.cache.key import Key, Record, Wanted, differences
from epsrt.errors import EngineError
from epsrt.files import sweep
from epsrt.manifest import FileEntry
from epsrt.raised import foreign, passed_over, resolved

log = logging.getLogger("epsrt")

T = TypeVar("T")
TIMING, LIBRARIES = "timing", "libraries"
LOCK = ".lock"
POLL = 0.2  # seconds between two looks at another process's lock
USING = 300.0  # seconds that another process is given with a library's files: it may be building an engine
_LEFT = re.compile(
    r"\.?([0-9a-f]{16})\.([0-9a-f]{12}\.(engine|plan|json)|lock|plan)"
)  # temporaries of whole_file, locks, OLD
OLD = ".plan"  # the suffix of what version 0.1 built: nothing uses it any more


class EngineCache:
    """The cache in `directory`, by default the user's own. It is made when something is first locked or stored."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = resolved(directory or private.cache_directory())  # links that lead here are the user's own

    def find(self, wanted: Wanted) -> list[Entry]:
        """The engine files that fit, the latest built first. Raises EngineError if others can write the cache."""
        return fitting(self._of(wanted.bundle), wanted)

    def have(self, key: Key) -> Entry | None:
        """The engine file of exactly this key, if it seems whole. Raises EngineError if others can write the cache."""
        return next((e for e in self._of(key.bundle) if e.path.stem == key.name and not e.damage), None)

    def _of(self, bundle: str) -> list[Entry]:
        folder = self.directory / ENGINES / bundle[:16]
        try:
            private.check(self.directory, folder)
        except (FileNotFoundError, NotADirectoryError):
            return []  # nothing was built yet
        return entries_in(folder)

    def why_rebuild(self, wanted: Wanted) -> str:
        """One sentence for when `find` finds nothing: how the nearest of the bundle, or of its name, differs."""
        near = [
            (differences(e.record.key, wanted), e.damage)
            for e in sorted(self.entries(), key=lambda e: e.built, reverse=True)
            if e.record and e.record.key.engine == wanted.engine
            if wanted.bundle == e.record.key.bundle or wanted.bundle_name == e.record.bundle_name
        ]
        if not near:
            return f"no engine file of {wanted.bundle_name} for {wanted.engine} was built yet"
        parts, damage = min(near, key=lambda one: len(one[0]))
        nearest = "; ".join(parts) or f"built for just this, but {damage}"
        return f"{wanted.bundle_name} has no engine file for this: the nearest was {nearest}"

    def read(self, entry: Entry) -> bytes:
        """An engine file's bytes like `load`, but it does not count as used."""
        return self._get(entry, private.read)

    def _get(self, entry: Entry, read: Callable[[Path, str, int], T | None], used: bool = False) -> T:
        mend = 'run "epsrt cache --prune", then "epsrt build"'
        if entry.shipped:
            mend = f"copy the bundle again, or remove {entry.path.parent}"
        try:
            if not entry.shipped:
                private.check(self.directory, entry.path)
                private.check(self.directory, entry.record_path)
            data = read(entry.path, entry.record.sha256, entry.record.size) if entry.record else None
        except OSError as error:
            if foreign(error):
                raise
            raise EngineError(f"{entry.path} cannot be read ({error.strerror}): {mend}") from error
        if data is None:
            fault = entry.damage or "its SHA-256 differs"
            raise EngineError(f"{entry.path} does not hold the bytes that its record tells of ({fault}): {mend}")
        if used and not entry.shipped:
            with passed_over(OSError):
                os.utime(entry.record_path)
            for path in (entry.path, entry.record_path):
                sweep(path)
        return data

    def load(self, entry: Entry) -> bytes:
        """An engine file's bytes, to be used: read once, their size and SHA-256 compared with the record.

        Raises EngineError if they differ, or if others can write the cache. A bundle's own directory may be anyone's.
        """
        return self._get(entry, private.read, used=True)

    def map(self, entry: Entry) -> mmap:
        """Like `load`, but mapped: see private.mapped."""
        return self._get(entry, private.mapped, used=True)

    def store(self, key: Key, data: private.Data, *, bundle_name: str, summary: dict[str, Any] | None = None) -> Entry:
        """Keep an engine file, in the place of an older one of its key. Call it under `lock(key)`.

        Raises EngineError, and leaves nothing behind, if the disk is full, or the cache not writable or not private.
        """
        path = private.folder(self.directory, ENGINES, key.bundle[:16]) / f"{key.name}.engine"
        built, size = datetime.now(UTC).isoformat(timespec="microseconds"), memoryview(data).nbytes
        record = Record(key, hashlib.sha256(data).hexdigest(), size, built, bundle_name, summary or {})
        try:
            private.write(path, data, path.with_suffix(".json"), record)
        except OSError as error:
            if foreign(error):
                raise
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise EngineError(f"{path} cannot be written ({error.strerror}): {private.ELSEWHERE}") from error
            takes, free = size / 2**20, shutil.disk_usage(path.parent).free / 2**20
            raise EngineError(
                f"{self.directory} is full ({error.strerror}): the engine file takes {takes:.1f} MiB, {free:.1f} MiB "
                'are free: run "epsrt cache --prune", or set EPSRT_CACHE to a larger place'
            ) from error
        return look(path)

    @contextmanager
    def lock(
        self, key: Key, on_wait: Callable[[str], object] | None = None, seconds: float | None = None
    ) -> Iterator[bool]:
        """Hold the right to build an engine file; whether it is held. `find` it again: another may have built it.

        on_wait  gets one sentence where another process holds the lock, before waiting for it
        seconds  to wait at most; None: until it lets go, as a process that ends does, however it ends
        """
        path = private.folder(self.directory, ENGINES, key.bundle[:16]) / f"{key.name}{LOCK}"
        with _held(path, "is building the same engine file", on_wait, seconds) as held:
            yield held

    def entries(self) -> list[Entry]:
        """All engine files in the cache, damaged ones too."""
        return [entry for folder in _folders(self.directory / ENGINES) for entry in entries_in(folder)]

    def remove(self, entry: Entry) -> int | None:
        """Remove an engine file; returns the bytes freed, None if a process is building it and it was left alone."""
        with _idle(entry.path.with_suffix(".lock")) as idle:
            return private.unlink(entry.record_path) + private.unlink(entry.path) if idle else None

    def sweep(self) -> list[tuple[Path, int]]:
        """Remove what killed processes and version 0.1 left: files, locks, empty directories.

        Returns the files and their bytes.
        """
        swept = []
        for folder in _folders(self.directory / ENGINES):
            for name in names_in(folder, _LEFT):
                with _idle(folder / f"{name}.lock") as idle:
                    left = [*sorted(folder.glob(f".{name}.*")), *folder.glob(f"{name}{OLD}")] if idle else []
                    swept += [(p, private.unlink(p)) for p in left]
            with passed_over(OSError):  # it is not empty
                folder.rmdir()
        left = [p for folder in _folders(self.directory) if folder.name == TIMING for p in folder.glob(".*")]
        return swept + [(p, private.unlink(p)) for p in left]

    def blob(self, name: str) -> bytes | None:
        """What `keep_blob` kept; None if it is missing or damaged, or if others can write it."""
        path, record = self._blob(name)
        try:
            private.check(self.directory, path)
            private.check(self.directory, record)
            kept = msgspec.json.decode(record.read_bytes(), type=FileEntry)
            for each in (path, record):
                sweep(each)
            return private.read(path, kept.sha256, kept.size)
        except (EngineError, OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            if foreign(error):
                raise
            return None

    def keep_blob(self, name: str, data: private.Data) -> bool:
        """Keep native data that only saves time, a timing cache, say; False if it could not be kept."""
        path, record = self._blob(name)
        try:
            private.folder(self.directory, TIMING)
            private.write(path, data, record, FileEntry(hashlib.sha256(data).hexdigest(), memoryview(data).nbytes))
        except (EngineError, OSError) as error:
            if foreign(error):
                raise
            return False
        return True

    def directory_for(self, name: str) -> Path:
        """A directory for what a library keeps by itself, and loads unchecked. Raises EngineError."""
        folder = private.folder(self.directory, LIBRARIES, name)
        folder.chmod(0o700)  # its files have what mode the library gives them
        return folder

    @contextmanager
    def kept_by(self, library: str) -> Iterator[Path | None]:
        """`directory_for` a library, for one process at a time: only what is as it was at the last end is still there.

        Where an exception ends it, nothing is vouched for that is new. Another process is waited for USING seconds at
        most, with a warning; None where it still has the folder: go on without. Raises EngineError.
        """
        folder = self.directory_for(_plain(library))
        with _held(folder / LOCK, f"is using the files of {library}", log.warning, USING) as held:
            if not held:
                log.warning("another process still uses the files of %s: this one goes on without them", library)
                yield None
                return
            known = msgspec.json.decode(self.blob(f"{library}.files") or b"{}", type=dict[str, str])
            for name, sha256 in _hashes(folder).items():
                if known.get(name) != sha256:
                    private.unlink(folder / name)
            yield folder
            self.keep_blob(f"{library}.files", msgspec.json.encode(_hashes(folder)))

    def blobs(self) -> list[Path]:
        """All files beside the engine files: those of `keep_blob` and their records, and what libraries keep."""
        folders = [f for f in _folders(self.directory) if f.name == TIMING] + _folders(self.directory / LIBRARIES)
        return sorted(p for folder in folders for p in folder.iterdir() if not p.is_dir())

    def _blob(self, name: str) -> tuple[Path, Path]:
        plain = _plain(name)
        return self.directory / TIMING / f"{plain}.bin", self.directory / TIMING / f"{plain}.json"

    def ship(self, entry: Entry, bundle: Path) -> Entry:
        """Copy an engine file into a bundle's own `engines/`.

        Raises EngineError as `load` does, OSError if the copy cannot be written.
        """
        data, path = self.read(entry), bundle / ENGINES / entry.path.name
        assert entry.record is not None  # or read had refused
        private.write(path, data, path.with_suffix(".json"), entry.record, mode=0o666)
        return look(path, shipped=True)


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)


def _hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a directory, by its name; "" of links, which are nobody's own files."""
    hashes = {}
    for path in folder.iterdir():
        if path.is_symlink():
            hashes[path.name] = ""
        elif path.is_file() and path.name != LOCK:
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _folders(path: Path) -> list[Path]:
    """The directories in a directory. Links are not followed: what they lead to is not the cache's to remove."""
    inside = path.iterdir() if path.is_dir() and not path.is_symlink() else ()
    return sorted(p for p in inside if p.is_dir() and not p.is_symlink())


@contextmanager
def _idle(lock: Path) -> Iterator[bool]:
    """Whether nobody builds under a lock; if so nobody can begin to until the context ends, and its file is removed."""
    with _held(lock, seconds=0) as held:
        try:
            yield held
        finally:
            if held:
                lock.unlink(missing_ok=True)


@contextmanager
def _held(
    path: Path, busy: str = "", on_wait: Callable[[str], object] | None = None, seconds: float | None = None
) -> Iterator[bool]:
    """Hold the lock of a file, waited for as in EngineCache.lock; `busy` says what another process does with it."""
    lock = FileLock(path, mode=0o600)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if seconds != 0:
                if on_wait is not None:
                    most = "" if seconds is None else f", {seconds:g} s at most"
                    on_wait(f"another process {busy}: waiting for it{most}")
                with suppress(Timeout):
                    lock.acquire(timeout=seconds, poll_interval=POLL)
        yield lock.is_locked
    finally:
        lock.release()
