"""The `epsrt` command. Needs the extra [cli]; nothing else in epsrt imports this package."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from epsrt.errors import EpsrtError
from epsrt_command.foreign import needs


def main() -> None:
    """Entry point. Bad input: one sentence on stderr, exit 1, nothing half-written."""
    try:
        with needs("the epsrt command", "cli"):
            from epsrt_command.app import app
            from epsrt_command.wording import said
    except EpsrtError as error:
        _fail(str(error))
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does it
            signal.signal(number, lambda number, frame: sys.exit(128 + number))  # so that files in work are removed
    try:
        app()
    except EpsrtError as error:
        _fail(said(error, sys.argv[1:]))
    except BrokenPipeError:  # `epsrt inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MemoryError:
        _fail("this takes more memory than there is: ask for less at once")
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}")


def _fail(sentence: str) -> NoReturn:
    print(f"epsrt: {sentence}", file=sys.stderr)
    sys.exit(1)
