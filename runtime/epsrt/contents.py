"""Contents: the files of a bundle, held to the hashes of its manifest for as long as the bundle is open.

What was hashed is what is used. A library that takes bytes gets the very bytes that were hashed. One that insists on
reading files by itself reads them while they provably stay as they were. A bundle that is replaced at its path, or
overwritten in place, is refused from then on; what was loaded before goes on as it is.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from epsrt.errors import BundleError, EpsrtError, one_line
from epsrt.manifest import MANIFEST, SIGNATURE, FileEntry
from epsrt.raised import foreign, passed_over, resolved

AGAIN = "copy or export the bundle again"
TICK = 100_000_000  # ns: two writes so close may leave a file the same times


class Stamp(NamedTuple):
    """What tells one state of a file from another without reading it."""

    device: int
    inode: int
    size: int
    modified: int  # ns since 1970
    changed: int  # ns since 1970; nobody sets this one back
    settled: bool  # whether a write after the stamp was taken would be seen in the times

    def is_of(self, file: Stamp) -> bool:
        """Whether nobody has touched the file between two stamps."""
        return self[:-1] == file[:-1]


@dataclass(frozen=True)
class Contents:
    """The files of the bundle at `path`. Those that its manifest does not list are an export's: read as they are."""

    path: Path
    entries: Mapping[str, FileEntry]
    _seen: dict[str, Stamp] = field(default_factory=dict, compare=False, repr=False)  # of files that were hashed

    def check(self, place: Path | None = None) -> None:
        """Hash every file, of the directory that stands at the path now or in `place`.

        Raises BundleError that names the first that is not as the manifest says.
        """
        with standing(self.path) if place is None else nullcontext(place) as here:
            for name in self.entries:
                self._hash(here, name)

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises BundleError if they are not those that the manifest says."""
        entry = self.entries.get(name)
        with standing(self.path) as place, self._reading(name), open_plain(place / name) as file:
            data = file.read() if entry is None else file.read(entry.size + 1)
        if entry is not None and hashlib.sha256(data).hexdigest() != entry.sha256:
            raise self.replaced(name)
        return data

    @contextmanager
    def reading(self, *names: str) -> Iterator[Path]:
        """The directory, for a library that reads these files of it by itself, whoever takes its name meanwhile.

        Raises BundleError if one of them is not as the manifest says, or was touched before the context ended: throw
        away what was read. It must not map the files beyond the context.
        """
        listed = [name for name in names if name in self.entries]
        with standing(self.path) as place:
            before = {name: self._known(place, name) for name in listed}
            try:
                yield place
            except EpsrtError as error:
                self._compare(place, before, error)
                raise
            self._compare(place, before)

    def _known(self, place: Path, name: str) -> Stamp:
        """A file's stamp, once it is known that its bytes are those of the manifest."""
        with self._reading(name):
            stamp = stamp_of(place / name)
        seen = self._seen.get(name)
        if seen is None or not stamp.is_of(seen):  # copied back, say, or touched
            try:
                return self._hash(place, name)
            except BundleError as error:
                raise self.replaced(name) from error
        return stamp

    def _compare(self, place: Path, before: dict[str, Stamp], error: Exception | None = None) -> None:
        for name, stamp in before.items():
            with self._reading(name):
                same = stamp_of(place / name).is_of(stamp)
                if same and not stamp.settled:
                    same = _sha256(place / name) == self.entries[name].sha256
            if not same:
                raise self.replaced(name) from error

    def _hash(self, place: Path, name: str) -> Stamp:
        """The stamp of a file that has the manifest's bytes. Raises BundleError."""
        file, entry, shown = place / name, self.entries[name], self.path / name
        with self._reading(name):
            if file.is_symlink() or not file.is_file():
                what = "is a link, not a file" if file.is_symlink() else "is missing"
                raise BundleError(f"{shown} {what}: {AGAIN}")
            stamp = stamp_of(file)
            if stamp.size != entry.size:
                raise BundleError(f"{shown} has {stamp.size} bytes, the manifest says {entry.size}: {AGAIN}")
            if _sha256(file) != entry.sha256:
                raise BundleError(f"{shown} was changed (its SHA-256 differs from the manifest's): {AGAIN}")
        if stamp.settled:
            self._seen[name] = stamp
        return stamp

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if foreign(error):
                raise
            if error.errno in (errno.ENOENT, errno.ELOOP):  # ELOOP: it is a link now
                raise self.replaced(name) from error
            raise unreadable(self.path / name, error) from error

    def replaced(self, name: str) -> BundleError:
        """What to raise where a file is not what it was."""
        return BundleError(f"{self.path} was replaced since it was opened (its {name} is another): open it again")


def stamp_of(path: Path) -> Stamp:
    found, now = os.stat(path, follow_symlinks=False), time.time_ns()
    settled = now - max(found.st_mtime_ns, found.st_ctime_ns) > TICK
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, settled)


def open_plain(path: Path) -> BufferedReader:
    """Open a file to be read. FileNotFoundError for what is none: a pipe would be waited for."""
    held = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(held).st_mode):
        os.close(held)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return os.fdopen(held, "rb")


def _sha256(path: Path) -> str:
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unreadable(path: Path, error: OSError) -> BundleError:
    """The sentence of a file or directory that the system does not let this process read."""
    ways = {errno.EACCES: "give this user the right to", errno.EMFILE: "raise the limit on open files"}
    return BundleError(f"{path} cannot be read ({error.strerror or error}): {ways.get(error.errno or 0, AGAIN)}")


@contextmanager
def standing(path: Path) -> Iterator[Path]:
    """The directory that is at `path` now, by a name that stays its own if another is put there.

    Where the system has no /proc it is the path itself. Raises BundleError if there is none.
    """
    try:
        held = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if foreign(error):
            raise
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise unreadable(path, error) from error
        what = "is a file" if isinstance(error, NotADirectoryError) and os.path.lexists(path) else "does not exist"
        raise BundleError(f'{path} {what}: a bundle is a directory that "epsrt export" wrote') from error
    try:
        place = Path(f"/proc/self/fd/{held}")
        yield place if place.is_dir() else path
    finally:
        os.close(held)


def absolute(path: Path) -> Path:
    """The path that is meant now: neither a later change of directory nor one of links leads elsewhere."""
    try:
        return resolved(path)
    except (OSError, RuntimeError, ValueError) as error:  # too long, links in a circle, a NUL
        if foreign(error, "pathlib"):
            raise
        raise BundleError(f"{path} is no path of a bundle ({one_line(error)}): give another") from error


def is_at(place: Path, path: Path) -> bool:
    """Whether a directory that was opened is the one at the path still."""
    with passed_over(OSError):
        return os.path.samestat(os.stat(place), os.stat(path))
    return False


def check_names(path: Path, place: Path, files: Mapping[str, FileEntry]) -> None:
    """Raise BundleError if the directory holds more than its manifest names, engine files and a signature."""
    try:
        found = sorted(place.iterdir())
    except OSError as error:
        if foreign(error):
            raise
        raise unreadable(path, error) from error
    for file in found:
        if file.name == "engines" and file.is_dir() and not file.is_symlink():
            continue  # engine files that someone added are no part of the bundle
        if file.name == SIGNATURE and file.is_file() and not file.is_symlink():
            continue
        if file.name != MANIFEST and file.name not in files:
            raise BundleError(f"{path} holds {file.name}, which its manifest does not name: remove it")
