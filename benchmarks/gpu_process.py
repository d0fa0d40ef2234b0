"""A case in a process of its own: key on stdin, result in a file, its memory watched from outside, its end sure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import CACHE

from epsrt.errors import EpsrtError
from epsrt.files import whole_file

LOG = CACHE / "gpu-case.log"  # what the last case printed
LINGER = 20.0  # seconds that a process may take to end after its result is there

Row = dict[str, Any]


def run_case(command: list[str], key: Row, seconds: float, free: Callable[[], int] | None) -> Row | None:
    """A case's result from a process of its own; None where it took longer than `seconds`, and was ended.

    The GPU's memory is watched from here until the case says that it times: `peak_mib` is what this process and its
    CUDA context took at most. A process that dies gives {"error": …}.
    """
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, LOG.open("wb") as log:
        out = Path(folder) / "result.json"
        least = most = free() if free else 0  # most: the last case's memory may still be on its way back
        process = subprocess.Popen(
            [*command, str(out)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_hear_interrupts,
        )
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(key).encode())
                process.stdin.close()
            begin = time.monotonic()
            there, late = float("inf"), False  # since when the result is; whether it took too long
            while process.poll() is None:
                now = time.monotonic()
                late = now - begin > seconds
                if late or now - there > LINGER:
                    break
                if there == float("inf") and out.exists():
                    there = now
                if free and not timing(out).exists():
                    now_free = free()
                    least, most = min(least, now_free), max(most, now_free)
                    time.sleep(0.01)
                else:
                    time.sleep(0.05)
        finally:
            end(process)
        if out.exists():
            result: Row = json.loads(out.read_text())
            return {**result, "peak_mib": round((most - least) / 2**20)} if least < most else result
    return None if late else {"error": died(process.returncode)}


def timing(out: Path) -> Path:
    """The file by which a case says that it begins to time, and wants no neighbour."""
    return out.with_suffix(".timing")


def died(code: int) -> str:
    """How a process ended that left no result, with the last that it said."""
    try:
        how = (
            f"its process ended with {signal.Signals(-code).name}"
            if code < 0
            else f"its process ended with status {code}"
        )
    except ValueError:
        how = f"its process ended with signal {-code}"
    said = [line.strip() for line in LOG.read_text(errors="replace").splitlines() if line.strip()]
    return f"{how}: {said[-1][:400]}" if said else how


def _hear_interrupts() -> None:
    """What a shell began in the background ignores SIGINT, and its children would too: `end` asks by it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process of ours, and those that it began: kindly, so that it cleans up, then for good."""
    for kind, patience in ((signal.SIGINT, 8.0), (signal.SIGKILL, 60.0)):
        if process.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def serve(cases: dict[str, Callable[[Row, Callable[[], None]], Row]], out: Path) -> None:
    """Run the case whose key comes on stdin, in this process; its result goes to `out`."""
    key = json.load(sys.stdin)
    try:
        result = cases[key["what"]](key, timing(out).touch)
    except EpsrtError as error:
        result = {"error": str(error)}
    except Exception as error:  # of anybody's library: a case that fails is a finding, and the others go on
        import traceback

        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
    with whole_file(out) as beside:
        beside.write_text(json.dumps(result))
