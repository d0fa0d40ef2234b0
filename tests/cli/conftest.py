"""Fixtures of the command's tests."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from epsrt_command import main

Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """test_cli's `refusal` in this process, for the many: a tenth of the time."""

    def refuse(*arguments: object, cwd: Path) -> str:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["epsrt", *map(str, arguments)])
        monkeypatch.setattr(signal, "signal", lambda number, handler: None)
        with pytest.raises(SystemExit) as exited:
            main()
        out, err = capsys.readouterr()
        assert (exited.value.code, out) == (1, "")
        (line,) = err.splitlines()  # so nothing was begun
        assert line.startswith("epsrt: ")
        return line

    return refuse
