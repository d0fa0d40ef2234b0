"""Other people's libraries: their errors as sentences. What is missing is named with the extra that brings it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from epsrt.errors import EpsrtError, InputError, one_line


@contextmanager
def needs(what: str, extra: str) -> Iterator[None]:
    """Around imports: InputError where a package of other people's is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("epsrt.", "epsrt_command.")):
            raise
        raise InputError(f'{what} needs {error.name}: pip install "epsrt[{extra}]"') from None


@contextmanager
def reading(file: object, what: str, way_out: str) -> Iterator[None]:
    """Around a decoder, which raises whatever occurs to it over damaged and hostile files: InputError."""
    try:
        yield
    except (EpsrtError, MemoryError, PermissionError):
        raise
    except Exception as error:
        why = one_line(error) or type(error).__name__
        raise InputError(f"{file} {what} ({why}): {way_out}") from None
