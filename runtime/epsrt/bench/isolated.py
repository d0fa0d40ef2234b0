"""A function in a process of its own, whose end is sure; and what `epsrt bench` runs so: a case that does nothing else.

`epsrt bench` measures a case's peak memory and the seconds to its first image in such a process, and gives rivals their
turns in others. The scripts in benchmarks/ measure their cases in one.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from epsrt.bench import child
from epsrt.engine import Closing
from epsrt.errors import EngineError

LINGER_S = 20.0  # that a process may take to end once its result is there
PATIENCE_S = 8.0  # that a process may take to end once it was asked to
WATCH_S, WAIT_S = 0.01, 0.5  # between two calls of `watch`; between two looks at the clock without it
START_LIMIT_S = 20.0  # for the image of a start
MEMORY_S, MEMORY_STEPS = 0.3, 2  # of the batch: buffers have grown after the first steps

Heard = Callable[[float, Any], object]


@dataclass(frozen=True)
class Done:
    """What a function returned, the seconds from its process's start until then, and the process's peak memory."""

    value: Any
    seconds: float
    memory: int | None  # bytes; None where the system does not tell


class LateError(EngineError):
    """The function took longer than it was given; its process was ended."""


def call(
    function: Callable[[Any], Any],
    given: object,
    *,
    seconds: float = math.inf,
    heard: Heard = lambda at, value: None,
    watch: Callable[[], object] | None = None,
    log: Path | None = None,
) -> Done:
    """What `function(given)` returns in a process of its own, which is over when this returns.

    function  at the top of a module; a script's own too
    given     JSON, as what it returns and says must be
    heard     is called with whatever the function passes to `say`, and the seconds since the process was started
    watch     is called every WATCH_S until the function first says something
    log       the file to which what the process prints is appended

    Raises EngineError with the function's sentence where it fails, or says how its process died; LateError after
    `seconds`.
    """
    with _Process(function, given, seconds, log) as process:
        while True:
            at, said = process.message(watch)
            if "said" not in said:
                return Done(said["result"], at, said["memory"])
            watch = None
            heard(at, said["said"])


class Turns(Closing):
    """A generator in a process of its own, which takes a turn when it is told to, and waits in between.

    `function(given)` is a generator of JSON values; the rest is as in `call`. The process is over once this is closed.
    """

    def __init__(self, function: Callable[[Any], Generator[Any, Any, None]], given: object):
        self._process = _Process(function, given, told=True)

    def next(self, told: object = None) -> Any:
        """What the generator yields next, `told` being what it is sent: None the first time.

        Raises EngineError with the generator's sentence where it fails, or says how its process died.
        """
        self._process.tell(told)
        _, said = self._process.message()
        if "said" not in said:
            raise EngineError("it ended before its turn")
        return said["said"]

    def close(self) -> None:
        self._process.close()


def say(value: object) -> None:
    """Tell the process that called; nothing happens where nobody did."""
    tell: Callable[[object], None] | None = getattr(sys.modules["__main__"], "epsrt_say", None)
    if tell is not None:
        tell(value)


class _Process(Closing):
    """A function's process, and what it says, line by line. It has `seconds` from its start on."""

    def __init__(
        self,
        function: Callable[[Any], Any],
        given: object,
        seconds: float = math.inf,
        log: Path | None = None,
        told: bool = False,
    ):
        module = sys.modules[function.__module__]
        name, folder = module.__name__, ""
        if "." not in name:  # a script's, or of a module beside one
            file = Path(str(module.__file__)).resolve()
            name, folder = file.stem, str(file.parent)
        argument = msgspec.json.encode(given).decode()
        command = [sys.executable, "-P", child.__file__, folder, name, function.__name__, argument]
        printed: Callable[[], IO[bytes]] = tempfile.TemporaryFile if log is None else lambda: log.open("ab+")
        self._seconds = seconds
        self._over = False  # it has said its last word
        self._lines: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        with ExitStack() as stack:
            self._printed: IO[bytes] = stack.enter_context(printed())
            self._start, self._begin = self._printed.seek(0, os.SEEK_END), time.perf_counter()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if told else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._printed,
                start_new_session=True,
            )
            self._open = stack.pop_all()
        threading.Thread(target=self._read, daemon=True).start()

    def tell(self, value: object) -> None:
        """Give a generator its turn."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: `message` says how
            self._process.stdin.write(msgspec.json.encode(value) + b"\n")
            self._process.stdin.flush()

    def message(self, watch: Callable[[], object] | None = None) -> tuple[float, dict[str, Any]]:
        """What the process says next, or its last word, a result; and the seconds from its start until then."""
        ended = False
        while True:
            left = self._begin + self._seconds - time.perf_counter()
            try:
                at, line = self._lines.get(timeout=max(0.0, min(WATCH_S if watch else WAIT_S, left)))
            except queue.Empty as error:
                if left <= 0:
                    raise LateError(f"it took more than the {self._seconds:.0f} s that it was given") from error
                if not ended:
                    ended = self._process.poll() is not None
                    if watch:
                        watch()
                    continue
                at, line = 0.0, b""  # a process that it forked may hold the pipe open
            said: dict[str, Any] = json.loads(line or b"{}")
            self._over = "said" not in said
            if not said:
                _end(self._process, LINGER_S)
                raise EngineError(f"its process ended with {_how(self._process.returncode)}{self._last_words()}")
            if "error" in said:
                raise EngineError(said["error"])
            return at, said

    def close(self) -> None:
        """The process ends by itself after its last word, else it is ended."""
        try:
            if self._process.stdin is not None:
                with suppress(BrokenPipeError):
                    self._process.stdin.close()
            _end(self._process, LINGER_S if self._over else 0.0)
        finally:
            self._open.close()

    def _read(self) -> None:
        out = self._process.stdout
        assert out is not None
        for line in out:
            self._lines.put((time.perf_counter() - self._begin, line))
        self._lines.put((0.0, b""))
        out.close()

    def _last_words(self) -> str:
        self._printed.seek(self._start)
        words = self._printed.read().decode(errors="replace").strip().splitlines()
        return f": {words[-1].strip()[:400]}" if words else ""


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for a process; end it after `seconds`, kindly first, so that it cleans up."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return
    if sys.platform != "win32":
        for kind, patience in ((signal.SIGINT, PATIENCE_S), (signal.SIGKILL, None)):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, kind)
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
                return
    process.kill()
    process.wait()


def _how(code: int) -> str:
    try:
        return f"status {code}" if code >= 0 else signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bench's process does: with `start` a request for one image, then some steps of `batch`; 0: none."""

    bundle: str
    engine: str
    precision: str
    threads: int | None
    trust_engines: bool
    method: str | None
    steps: int | None
    label: int | None
    batch: int
    start: bool = True


@dataclass(frozen=True)
class Found:
    startup_s: float | None  # from the process's start to the first image; None where that takes too long
    memory: int | None  # bytes


def run(task: Task) -> Found:
    """Do a task in a process of its own. Raises EngineError where it fails, or its process dies."""
    startup: list[float] = []
    done = call(serve, task, heard=lambda at, first: startup.append(at) if first else None)
    return Found(startup[0] if startup else None, done.memory)


def serve(given: dict[str, Any]) -> None:
    """Do a task here, and say whether the first image came in time."""
    from epsrt import Sampler

    task, begin = msgspec.convert(given, Task), time.perf_counter()
    with Sampler.open(
        task.bundle, task.engine, precision=task.precision, threads=task.threads, trust_engines=task.trust_engines
    ) as sampler:
        rows = len(sampler.plan(task.method, task.steps))
        late = False

        def in_time(done: int, total: int) -> bool:
            nonlocal late
            late = done < total and time.perf_counter() - begin > START_LIMIT_S
            return not late

        asked: dict[str, Any] = {"method": task.method, "steps": task.steps, "labels": task.label}
        if task.start:
            sampler.sample(1, **asked, on_step=in_time, every=max(1, rows // 10))
            say(not late)
        if task.batch:
            start = time.perf_counter()

            def going(done: int, total: int) -> bool:
                return done < MEMORY_STEPS or time.perf_counter() - start < MEMORY_S

            sampler.sample(task.batch, **asked, batch=task.batch, on_step=going)
