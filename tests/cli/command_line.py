"""`epsrt` and its arguments, in this process: a tenth of the time of a new one.

test_cli.py has what only a process of its own shows: streams, signals, limits.
"""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from epsrt_command import main


def run(
    *arguments: object, code: int = 0, cwd: Path | None = None, columns: int = 200
) -> subprocess.CompletedProcess[str]:
    words = ["epsrt", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "argv", words)
        patch.setattr(signal, "signal", lambda number, handler: None)
        patch.setenv("COLUMNS", str(columns))
        stack.enter_context(contextlib.chdir(cwd or "."))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        with pytest.raises(SystemExit) as exited:
            main()
    done = subprocess.CompletedProcess(words, exited.value.code or 0, out.getvalue(), err.getvalue())
    assert done.returncode == code, done.stderr
    return done


def refusal(*arguments: object, cwd: Path | None = None) -> str:
    """The sentence: the last line on stderr, behind the progress; exit 1, nothing on stdout."""
    done = run(*arguments, code=1, cwd=cwd)
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("epsrt: ")
    return last
