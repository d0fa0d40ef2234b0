"""Who raised an exception that an `except` clause caught: the call in it, or somebody else in the middle of that call.

The handler of a signal runs between any two steps of the main thread, and what it raises (a task queue's time limit,
say) comes out of whatever is under way. It is the caller's own, and must reach the caller as it is.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType

KNOWN = ("builtins", "epsrt", "msgspec")  # the packages whose classes a call of ours raises


def foreign(error: BaseException, *packages: str) -> bool:
    """Whether a call that raises classes of Python, of epsrt, and of `packages` did not raise an exception itself.

    So it is with other classes, though they derive from OSError or RuntimeError; with a kind of OSError that Python
    chooses by the system's number, but without that number; and with whatever a signal's handler raised.
    """
    kind = type(error)
    if kind.__module__.partition(".")[0] not in (*KNOWN, *packages):
        return True
    numbered = isinstance(error, OSError) and (kind is OSError or error.errno is not None)
    return (issubclass(kind, OSError) and not numbered) or by_handler(error)


def by_handler(error: BaseException) -> bool:
    """Whether the handler of a signal raised an exception: one that is still installed is in its traceback."""
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in handlers:
            return True
        trace = trace.tb_next
    return False


def handlers_own(error: BaseException) -> BaseException | None:
    """What the handler of a signal raised, where a library made another exception of it: it is among the causes."""
    seen = set[int]()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if by_handler(found):
            return found
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return None


@contextmanager
def passed_over(*kinds: type[Exception]) -> Iterator[None]:
    """contextlib.suppress, but what is `foreign` comes out."""
    try:
        yield
    except kinds as error:
        if foreign(error):
            raise


def resolved(path: Path) -> Path:
    """Path.resolve, which by itself passes over an OSError that the handler of a signal raises in the middle of it."""
    try:
        return path.resolve(strict=True)
    except OSError as error:
        if foreign(error):
            raise
    return path.resolve()  # not all of it is there


def _code(handler: object) -> CodeType | None:
    """Of a handler that is written in Python; None of others."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    if callable(handler) and not hasattr(handler, "__code__"):
        handler = type(handler).__call__
    code = getattr(handler, "__code__", None)
    return code if isinstance(code, CodeType) else None
