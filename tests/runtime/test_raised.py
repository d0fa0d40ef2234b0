"""Who raised an exception: the call, or a signal's handler in the middle of it."""

from __future__ import annotations

import functools
import signal
import subprocess
from pathlib import Path

import msgspec
import pytest

from epsrt import EngineError
from epsrt.raised import by_handler, foreign, passed_over


class TimeLimit(Exception):
    """As a task queue has one."""


class Late(OSError):
    """As others have one."""


class Stopped(RuntimeError):
    """And others."""


@pytest.fixture
def raises(monkeypatch):
    """raises(error, how) is what comes out of code in whose middle a signal's handler raises `error`."""
    before = signal.getsignal(signal.SIGUSR1)

    def run(error, how="function"):
        def handler(number, frame):
            raise error

        class Handler:
            def __call__(self, number, frame):
                raise error

            def method(self, number, frame):
                raise error

        handlers = {
            "function": handler,
            "object": Handler(),
            "method": Handler().method,
            "partial": functools.partial(lambda error, number, frame: handler(number, frame), error),
        }
        signal.signal(signal.SIGUSR1, handlers[how])
        try:
            signal.raise_signal(signal.SIGUSR1)
        except Exception as raised:
            return by_handler(raised), foreign(raised)
        return pytest.fail("nothing was raised")

    yield run
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("how", ["function", "object", "method", "partial"])
@pytest.mark.parametrize("kind", [TimeLimit, Late, Stopped, RuntimeError, TimeoutError, KeyError, EngineError])
def test_what_a_handler_raises_is_foreign(raises, kind, how):
    assert raises(kind("too long"), how) == (True, True)


@pytest.mark.parametrize("kind", [TimeLimit, Late, Stopped, subprocess.SubprocessError])
def test_other_classes_are_foreign(kind):
    assert foreign(kind("too long"))


def test_a_kind_of_oserror_without_its_number_is_no_systems():
    assert foreign(TimeoutError("too long"))
    assert not foreign(OSError("libcuda.so.1: cannot open shared object file"))
    assert not foreign(TimeoutError(110, "Connection timed out"))


@pytest.mark.parametrize("make", [lambda: Path("/nowhere").stat(), lambda: int("x"), lambda: msgspec.json.decode(b"{")])
def test_what_a_call_raises_is_its_own(make):
    with pytest.raises(Exception) as caught:
        make()
    assert not foreign(caught.value)
    assert not foreign(EngineError("a sentence"))


def test_a_librarys_classes_are_its_own_by_its_name():
    assert foreign(subprocess.SubprocessError())
    assert not foreign(subprocess.SubprocessError(), "subprocess")


def test_passed_over():
    with passed_over(OSError):
        Path("/nowhere").stat()
    with pytest.raises(Late), passed_over(OSError):
        raise Late
    with pytest.raises(KeyError), passed_over(OSError):
        raise KeyError
