"""The `epsrt` command. Needs the extra [cli]; nothing else in epsrt imports this package."""

from __future__ import annotations

import os
import signal
import sys

from epsrt.errors import EpsrtError
from epsrt_command.foreign import needs


def main() -> None:
    """Entry point. Bad input: one sentence on stderr, exit 1, nothing half-written."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that files in work are removed
    try:
        with needs("the epsrt command", "cli"):
            from epsrt_command.app import app
        app()
    except EpsrtError as error:
        _fail(_said(error))
    except BrokenPipeError:  # `epsrt inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MemoryError:
        _fail("this takes more memory than there is: ask for less at once")
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}")


def _said(error: EpsrtError) -> str:
    try:
        import typer

        from epsrt_command.app import app
        from epsrt_command.wording import said
    except (EpsrtError, ModuleNotFoundError):  # without [cli]
        return str(error)
    return said(error, typer.main.get_command(app), sys.argv[1:])


def _fail(sentence: str) -> None:
    print(f"epsrt: {sentence}", file=sys.stderr)
    sys.exit(1)
