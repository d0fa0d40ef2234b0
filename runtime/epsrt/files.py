"""Files appear whole or not at all: they are written in a folder beside, then renamed.

The folder is `.STEM.XXXXXXXXXXXX.SUFFIX` beside its target, and whoever works in it holds its lock (flock). A killed
process lets go of the lock, and the next write of the same target removes what it left, as `sweep` does.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from epsrt.raised import foreign, passed_over, resolved

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # writes that fail so tell no name


@contextmanager
def whole_file(path: str | Path, mode: int = 0o666) -> Iterator[Path]:
    """Yield an empty temporary file of the same name. On success it becomes `path`, else it is removed.

    `mode` are its permissions, less the umask. Raises FileExistsError where `path` is a directory or a device. An
    OSError of the disk names `path`.
    """
    path = _target(path)
    _check_kind(path, stat.S_ISREG, "file")
    with _folder_of(path) as folder:
        beside = folder / path.name
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        chosen = stat.S_IMODE(beside.stat().st_mode)
        yield beside
        beside.chmod(chosen)  # some libraries replace the file by one of theirs
        _settle(beside)
        beside.replace(path)


@contextmanager
def whole_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary directory of the same name. On success it takes the place of `path`, else it is removed.

    What was there is whole until then, and its files stay open to whoever has them open. Linux and macOS let the two
    change places at once. Where a file system does not, a process that is killed in between leaves neither there, and
    the next write puts the old one back. Raises FileExistsError where `path` is no directory. An OSError of the disk
    names `path`.
    """
    path = _target(path)
    _check_kind(path, stat.S_ISDIR, "directory")
    with _folder_of(path) as folder:
        beside = folder / path.name
        beside.mkdir()
        yield beside
        for file in beside.iterdir():
            _settle(file)
        _replace(path, beside)


@contextmanager
def naming(path: str | Path, beside: Path | None = None) -> Iterator[None]:
    """Around writes: an OSError of the disk names the file, not its temporary `beside`, nor nothing."""
    try:
        yield
    except OSError as error:
        names = [
            n for n in (error.filename2, error.filename) if isinstance(n, str)
        ]  # of a copy, where one writes first
        if beside is not None and (mine := [n for n in names if n.startswith(str(beside))]):
            error.filename, error.filename2 = mine[0].replace(str(beside), str(path), 1), None
        elif error.filename is None and error.errno in _DISK:
            error.filename = str(path)
        raise


def is_utf8(name: str | Path) -> bool:
    """Whether a path is text. Linux has files whose names are any bytes, and other people's formats have not."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        return False
    return True


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _target(path: str | Path) -> Path:
    return resolved(Path(path))  # a link is followed, not replaced


def _check_kind(path: Path, of_kind: Callable[[int], bool], kind: str) -> None:
    with passed_over(FileNotFoundError, NotADirectoryError):
        if not of_kind(path.stat().st_mode):  # one look: others may move it away and back
            raise FileExistsError(errno.EEXIST, f"It is no {kind} that can be replaced", str(path))


@contextmanager
def _folder_of(path: Path) -> Iterator[Path]:
    """A temporary folder of a target, held until the end, when it is removed with what is left in it."""
    made = [each for each in path.parents if not each.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    held = None
    while held is None:  # another's sweep may take it before it is held
        folder = path.with_name(f".{path.stem}.{secrets.token_hex(6)}{path.suffix}")
        with naming(path, folder):
            folder.mkdir()
            held = _hold(folder, wait=True)
    try:
        with naming(path, folder / path.name):
            yield folder
            made.clear()
    finally:
        _clear(folder, path)
        os.close(held)
        with passed_over(OSError):  # another writes there too
            for each in made:
                each.rmdir()


def sweep(path: str | Path) -> None:
    """Remove what killed processes left of a target, or put it back: for who finds it whole, and writes nothing."""
    path = _target(path)
    name = re.compile(rf"\.{re.escape(path.stem)}\.[0-9a-f]{{12}}{re.escape(path.suffix)}")
    with passed_over(OSError):  # of a directory that cannot be listed
        for left in [other for other in path.parent.iterdir() if name.fullmatch(other.name)]:
            with passed_over(OSError):
                if (held := _hold(left)) is not None:
                    _clear(left, path)
                    os.close(held)


def _clear(folder: Path, path: Path) -> None:
    """Remove a folder, but not what was moved aside into it and is missing in its place."""
    with passed_over(OSError):
        if (aside := _aside(folder / path.name)).exists() and not os.path.lexists(path):
            _moved(aside, path)
        if folder.is_dir():
            shutil.rmtree(folder)
        else:  # of version 0.1
            folder.unlink()


def _hold(folder: Path, wait: bool = False) -> int | None:
    """A descriptor that holds a folder's lock; None where another has the lock, or the folder is gone.

    Some network file systems have no such locks. There a folder is held without one, and none is swept.
    """
    import fcntl  # which Windows lacks

    try:
        held = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if foreign(error):
            os.close(held)
            raise
        if wait:
            return held
    else:
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(held), os.lstat(folder)):
                return held
    os.close(held)
    return None


def _aside(beside: Path) -> Path:
    return beside.with_name(f"{beside.name}.old")


def _replace(path: Path, beside: Path) -> None:
    """Put a directory in the place of another, or of none."""
    while not (_moved(beside, path) or _exchanged(beside, path)):
        shutil.rmtree(_aside(beside), ignore_errors=True)  # another process put its own there, and that is old now
        with suppress(FileNotFoundError):
            path.rename(_aside(beside))
    shutil.rmtree(_aside(beside), ignore_errors=True)  # or it would come back while another has the new one aside


def _moved(beside: Path, path: Path) -> bool:
    """Rename a directory over nothing, or over an empty one; False where a full one is there."""
    try:
        beside.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _exchanged(a: Path, b: Path) -> bool:
    """Let two directories change places at once; False where the system or the file system cannot."""
    name, here = ("renamex_np", ()) if sys.platform == "darwin" else ("renameat2", (-100,))  # AT_FDCWD
    try:
        exchange = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError) as error:  # an old C library
        if foreign(error):
            raise
        return False
    swap = ctypes.c_uint(2)  # RENAME_EXCHANGE, RENAME_SWAP
    return bool(exchange(*here, os.fsencode(a), *here, os.fsencode(b), swap) == 0)


def _settle(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
