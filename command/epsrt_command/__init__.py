"""The `epsrt` command. Needs the extra [cli]; nothing else in epsrt imports this package."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Any, NoReturn

from epsrt.errors import EpsrtError, of_system, seen
from epsrt.files import naming
from epsrt.raised import handlers_own
from epsrt_command.foreign import needs


def main() -> None:
    """Entry point. Bad input: one sentence on stderr, exit 1 (2 for what is no option), nothing half-written."""
    if sys.stderr is None:  # it was closed: print(file=None) is for stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        with needs("the epsrt command", "cli"):
            from epsrt_command.app import app
            from epsrt_command.wording import said
    except EpsrtError as error:
        _fail(str(error))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None, where it was closed
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack ×, and a file's name be no UTF-8
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does it
            signal.signal(number, lambda number, frame: sys.exit(128 + number))  # so that files in work are removed
    try:
        sys.exit(_run(app))
    except Exception as error:
        if (own := handlers_own(error)) is not None:  # which a library made another exception of
            raise own from None
        match error:
            case EpsrtError():
                _fail(said(error, sys.argv[1:]))
            case BrokenPipeError():  # `epsrt inspect … | head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(1)
            case MemoryError():
                _fail("this takes more memory than there is: ask for less at once")
            case OSError():
                _fail(of_system(error))
        raise


def _run(app: Any) -> int:
    """What it exits with. All that it prints is printed, or an error says why not."""
    from epsrt_command.wording import misused

    try:
        return app(standalone_mode=not sys.argv[1:]) or 0  # by itself it shows its help
    except Exception as error:
        if (sentence := misused(error)) is None:
            raise
        _fail(sentence, 2)
    finally:
        with naming("standard output"):
            print(end="", flush=True)


def _fail(sentence: str, code: int = 1) -> NoReturn:
    print(f"epsrt: {seen(sentence)}", file=sys.stderr)
    sys.exit(code)
