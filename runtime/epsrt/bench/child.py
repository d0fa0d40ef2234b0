"""What isolated.call and isolated.Turns run in the new process: python -P child.py FOLDER MODULE FUNCTION JSON

It imports nothing but what Python itself has: the process's start and its memory are the function's own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Generator
from importlib import import_module
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def main() -> None:
    folder, module, name, given = sys.argv[1:]
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever prints, prints into the log
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background lets its children ignore
    if folder:
        sys.path.insert(0, folder)

    def write(message: dict[str, Any]) -> None:
        pipe.write(json.dumps(message) + "\n")

    def say(value: object) -> None:
        write({"said": value})

    sys.modules["__main__"].epsrt_say = say  # type: ignore[attr-defined]
    try:
        result = getattr(import_module(module), name)(json.loads(given))
        if isinstance(result, Generator):
            take_turns(result, say)
            result = None
        write({"result": result, "memory": peak_memory()[0]})
    except Exception as error:  # anybody's library may fail
        import traceback

        traceback.print_exc()
        write({"error": sentence(error)})


def take_turns(generator: Generator[Any, Any, None], say: Callable[[object], None]) -> None:
    """Each line of stdin is sent to the generator, and what it yields is said; until stdin ends, or the generator."""
    for line in sys.stdin:
        try:
            say(generator.send(json.loads(line)))
        except StopIteration:
            return


def sentence(error: Exception) -> str:
    """What epsrt's own errors say; of others also what they are."""
    own = sys.modules.get("epsrt.errors")
    if own is not None and isinstance(error, own.EpsrtError):
        return str(error)
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


def peak_memory() -> tuple[int | None, str]:
    """This process's peak resident memory in bytes, and what that is. VmHWM begins with the program, as it should;
    ru_maxrss, where there is no /proc, begins with that of the process that started it."""
    try:
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10, "VmHWM"
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None, "not measured"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10, "ru_maxrss"


if __name__ == "__main__":
    main()
