"""Files of native code: written whole with a record of their bytes, read if those are the bytes and nobody else's.

Whoever can write such a file runs as the user who loads it. So a directory of them is used only if no other user can
write it, or put another in its place.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shlex
import shutil
import stat
from pathlib import Path

import msgspec

from epsrt.errors import EngineError
from epsrt.files import whole_file
from epsrt.raised import foreign

ELSEWHERE = "set EPSRT_CACHE to a directory that you can write"
Data = bytes | bytearray | memoryview


def cache_directory() -> Path:
    """$EPSRT_CACHE, else $XDG_CACHE_HOME/epsrt, else ~/.cache/epsrt."""
    if chosen := os.environ.get("EPSRT_CACHE"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(home):  # a relative one is to be ignored, its specification says
        return Path(home, "epsrt")
    try:
        return Path.home() / ".cache" / "epsrt"
    except RuntimeError as error:
        if foreign(error):
            raise
        raise EngineError(f"there is no home directory to keep engines in: {ELSEWHERE}") from error


def check(directory: Path, path: Path) -> None:
    """Raise EngineError unless only this user can have written `path`, which is or lies in the resolved `directory`.

    `directory` and all below it must be the user's, closed to others, and no link. Above it no directory may be open to
    everyone, unless it is sticky like /tmp; groups may write there, since many systems give each user his own.
    Raises OSError where something is missing.
    """
    for each in (*reversed(path.parents), path):
        found, quoted, fault = each.lstat(), shlex.quote(str(each)), None
        mode = stat.S_IMODE(found.st_mode)
        if not each.is_relative_to(directory):
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                fault = "lets everyone write", f'run "chmod o-w {quoted}"'
        elif stat.S_ISLNK(found.st_mode):
            fault = "is a symbolic link, and may lead to what is another's", "remove it"
        elif found.st_uid != os.getuid():
            fault = f"belongs to another user than you ({os.getuid()})", "remove it"
        elif mode & (stat.S_IWGRP | stat.S_IWOTH):
            fault = "lets others write", f'run "chmod go-w {quoted}"'
        if fault:
            raise EngineError(
                f"{each} (mode {mode:o}, owner {found.st_uid}) {fault[0]}: an engine file is native code, and "
                f"whoever can write there runs as you: {fault[1]}, or set EPSRT_CACHE to a private directory"
            )


def folder(directory: Path, *parts: str) -> Path:
    """A directory below `directory`, made if it is missing, and checked. Raises EngineError."""
    path = directory.joinpath(*parts)
    try:
        for each in (*reversed(path.parents), path):
            if not each.exists():
                each.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        if foreign(error):
            raise
        raise EngineError(f"{error.filename} cannot be made ({error.strerror}): {ELSEWHERE}") from error
    check(directory, path)
    return path


def write(path: Path, data: Data, record_path: Path, record: msgspec.Struct, mode: int = 0o600) -> None:
    """Write a file and its record, both or neither; the record is in its place last. Raises OSError."""
    with whole_file(record_path, mode) as record_beside, whole_file(path, mode) as beside:
        _write(record_beside, render(record))
        _write(beside, data)


def render(record: msgspec.Struct) -> bytes:
    """The bytes of a record's file."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2)


def _write(path: Path, data: Data) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # a full disk shows here, where neither file is in its place yet


def read(path: Path, sha256: str, size: int) -> bytes | None:
    """A file's bytes, read once; None if they are not those of the size and hash. Raises OSError."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != size:
            return None
        data = file.read()
    return data if hashlib.sha256(data).hexdigest() == sha256 else None


def mapped(path: Path, sha256: str, size: int) -> mmap.mmap | None:
    """Like `read`, but the system keeps the bytes: a page takes memory while it is used, once for all processes.

    Writes stay this process's own. What is written into the file from now on may be seen, so its writers replace it.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != size or not size:
            return None
        data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    return data if hashlib.sha256(data).hexdigest() == sha256 else None


def unlink(path: Path) -> int:
    """Remove a file, or a temporary folder of whole_file; returns its bytes, 0 if it was gone."""
    try:
        if stat.S_ISDIR(path.lstat().st_mode):
            size = sum(p.lstat().st_size for p in path.iterdir())
            shutil.rmtree(path)
        else:
            size = path.lstat().st_size
            path.unlink()
    except FileNotFoundError:
        return 0
    return size
