"""Files appear whole or not at all: write beside, then rename."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. On success it is flushed and renamed to `path`, else it is removed."""
    path = Path(path).resolve()  # a link is followed, not replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    beside.touch(exist_ok=False)
    try:
        yield beside
        _settle(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`. On success it takes the place of `path`, else it is removed."""
    path = Path(path).resolve()  # a link is followed, not replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    old = beside.with_name(beside.name + ".old")
    beside.mkdir()
    try:
        yield beside
        for file in beside.iterdir():
            _settle(file)
        if path.exists():  # a directory cannot be renamed over a full one
            path.rename(old)
        beside.rename(path)
    finally:
        if old.exists() and not path.exists():  # interrupted between the two
            old.rename(path)
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{secrets.token_hex(6)}{path.suffix}")


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _settle(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
