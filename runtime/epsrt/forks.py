"""What does not come along in a fork: threads, and with them what waits for one, a library's workers or a held lock.

A fork of a process that has used an engine gets a sentence, where it would wait for ever. What it inherits it never
destroys, for a library's destructors wait for its threads too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, Self, TypeVar
from weakref import ref

from epsrt.errors import EngineError

SPAWN = "start processes with spawn"

_made: list[ref[Unforkable]] = []  # no WeakSet: it runs Python as objects go, where a handler's exception would be lost
_kept: list[object] = []


class Unforkable:
    """An object of the process that made it. In a fork `close` does nothing, and `check_process` raises."""

    _made_in: int

    def __new__(cls, *_: Any, **__: Any) -> Self:
        made = super().__new__(cls)
        made._made_in = os.getpid()
        for gone in [made for made in _made if made() is None]:
            with suppress(ValueError):  # another thread has just removed it
                _made.remove(gone)
        _made.append(ref(made))
        return made

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "close" in cls.__dict__:
            cls.close = _unless_forked(cls.close)  # type: ignore[attr-defined]

    def check_process(self) -> None:
        """Raise EngineError in a fork of the process that made this."""
        if os.getpid() != self._made_in:
            raise EngineError(
                "what was opened before a fork cannot be used in it, for threads do not come along: open it after the "
                f"fork alone, or {SPAWN}"
            )


T = TypeVar("T", bound=Unforkable)


def living(kind: type[T]) -> list[T]:
    """The objects of a kind that there are."""
    return [found for made in list(_made) if isinstance(found := made(), kind)]


def keep(library_object: object) -> None:
    """Have forks not destroy an object of a library that lives as long as the process."""
    _kept.append(library_object)


def _unless_forked(close: Callable[[Any], None]) -> Callable[[Any], None]:
    @wraps(close)
    def closing(self: Unforkable) -> None:
        if os.getpid() == self._made_in:
            close(self)

    return closing


def _abandon() -> None:
    """In a fork: one reference more to each, so that not even the interpreter's end destroys them."""
    from ctypes import py_object, pythonapi

    for inherited in (*living(Unforkable), *_kept):
        pythonapi.Py_IncRef(py_object(inherited))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon)
