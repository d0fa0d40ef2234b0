"""The `epsrt` command. Needs the extra [cli]; nothing else in epsrt imports this package."""

from __future__ import annotations

import os
import signal
import sys

from epsrt.errors import EpsrtError


def main() -> None:
    """Entry point. Bad input: one sentence on stderr, exit 1, nothing half-written."""
    try:
        from epsrt_command.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("typer", "click", "rich", "PIL"):
            raise
        _fail(f'the epsrt command needs {error.name}: pip install "epsrt[cli]"')
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that files in work are removed
    try:
        app()
    except EpsrtError as error:
        _fail(str(error))
    except BrokenPipeError:  # `epsrt inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MemoryError:
        _fail("this takes more memory than there is: ask for less at once")
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}")


def _fail(sentence: str) -> None:
    print(f"epsrt: {sentence}", file=sys.stderr)
    sys.exit(1)
