"""A case in a process of its own, which does nothing else: its peak memory, and how soon its first image is there.

The process is `python -m epsrt.bench.isolated TASK`. Its own lines on stdout begin with MARK: libraries print as well.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from epsrt.errors import EngineError, EpsrtError

MARK = "epsrt-bench "
START_LIMIT_S = 20.0  # for the image of a start
END_LIMIT_S = 10.0  # for a process that has said all
MEMORY_S, MEMORY_STEPS = 0.3, 2  # of the batch: buffers have grown after the first steps
STATUS = Path("/proc/self/status")


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the process does: with `start` a request for one image, then some steps of `batch`; 0: none."""

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


class _Said(msgspec.Struct, omit_defaults=True):
    first: bool = False  # the first image is there
    late: bool = False  # it would have taken longer than START_LIMIT_S
    memory: int | None = None
    done: bool = False
    error: str = ""


@dataclass(frozen=True)
class Found:
    startup_s: float | None  # from the process's start to the first image; None where that takes too long
    memory: int | None  # bytes


def run(task: Task) -> Found:
    """Start the process and wait for it. Raises EngineError where the case fails in it, or it dies."""
    argument = msgspec.json.encode(task).decode()
    startup_s: float | None = None
    with tempfile.TemporaryFile() as errors:
        begin = time.perf_counter()
        with _process([sys.executable, "-P", "-m", "epsrt.bench.isolated", argument], errors) as process:
            assert process.stdout is not None
            for line in process.stdout:
                now = time.perf_counter() - begin
                if not line.startswith(MARK.encode()):
                    continue
                said = msgspec.json.decode(line[len(MARK) :], type=_Said)
                if said.error:
                    raise EngineError(said.error)
                if said.first:
                    startup_s = now
                if said.done:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(END_LIMIT_S)
                    process.kill()  # a library that hangs as it ends
                    return Found(startup_s, said.memory)
            code = process.wait()
        errors.seek(0)
        words = errors.read().decode(errors="replace").strip().splitlines()
    raise EngineError(f"its process ended with {_end(code)}{': ' + words[-1].strip()[:300] if words else ''}")


def serve(task: Task) -> None:
    """The process's part."""
    from epsrt import Sampler

    begin = time.perf_counter()
    with Sampler.open(
        task.bundle, task.engine, precision=task.precision, threads=task.threads, trust_engines=task.trust_engines
    ) as sampler:
        rows = len(sampler.plan(task.method, task.steps))
        late = False

        def in_time(done: int, total: int) -> bool:
            nonlocal late
            late = done < total and time.perf_counter() - begin > START_LIMIT_S
            return not late

        asked = {"method": task.method, "steps": task.steps, "labels": task.label}
        if task.start:
            sampler.sample(1, **asked, on_step=in_time, every=max(1, rows // 10))  # type: ignore[arg-type]
            _say(_Said(late=True) if late else _Said(first=True))
        if task.batch:
            start = time.perf_counter()

            def going(done: int, total: int) -> bool:
                return done < MEMORY_STEPS or time.perf_counter() - start < MEMORY_S

            sampler.sample(task.batch, **asked, batch=task.batch, on_step=going)  # type: ignore[arg-type]
    _say(_Said(memory=peak_memory()[0], done=True))


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


@contextmanager
def _process(command: list[str], errors: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block, and hears no Ctrl-C: this one ends it."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
    )
    try:
        yield process
    except BaseException:
        process.kill()
        raise
    finally:
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _end(code: int) -> str:
    import signal

    try:
        return f"status {code}" if code >= 0 else signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _say(said: _Said) -> None:
    print(MARK + msgspec.json.encode(said).decode(), flush=True)


def main() -> None:
    try:
        serve(msgspec.json.decode(sys.argv[1], type=Task))
    except EpsrtError as error:
        _say(_Said(error=str(error)))
    except MemoryError:
        _say(_Said(error="it takes more memory than there is"))


if __name__ == "__main__":
    main()
