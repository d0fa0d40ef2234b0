"""Forked processes that do jobs one at a time, so that a crash or a hang is one job's, and the next goes on."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

J = TypeVar("J")
R = TypeVar("R")

MEMORY = 8 << 30  # bytes of address space: a hostile file may ask for any number
RETIRES = 200  # jobs of one process: what a library leaks a job is not what is tried here
FORK = multiprocessing.get_context("fork")


class Worker(Generic[J, R]):
    """Calls `do(job)` in a process that is replaced when it dies, or takes longer than `limit` seconds.

    A third of them is what the processor may need for it: the machine may have other work.

    The parent must have one thread alone: whatever starts threads is imported by `do`.
    """

    def __init__(self, do: Callable[[J], R], limit: float = 60.0, retires: int = RETIRES):
        self.do, self.limit, self.retires = do, limit, retires
        self.process: Any = None
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the worker)

    def __call__(self, job: J) -> tuple[str, R | str]:
        """("done", what it returned), ("crash", its signal or status and last words) or ("hang", its limit)."""
        if self.process is None:
            self._start()
        self.said.seek(0)  # the process writes on from there
        self.said.truncate()
        self.pipe.send(job)
        try:
            if not self.pipe.poll(self.limit):
                self.close()
                return "hang", f"over {self.limit:g} s"
            answer, seconds = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            self.process = None
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            return "crash", f"{how} {self._last_words()}".strip()
        self.left -= 1
        if not self.left:
            self.close()
        if seconds > self.limit / 3:
            return "hang", f"over {self.limit / 3:g} s of the processor's time"
        return "done", answer

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def _start(self) -> None:
        self.pipe, theirs = FORK.Pipe()
        self.process, self.left = FORK.Process(target=self._serve, args=(theirs,), daemon=True), self.retires
        self.process.start()
        theirs.close()

    def _serve(self, pipe: Any) -> None:
        self.pipe.close()
        faulthandler.disable()  # pytest's: the parent tells of a crash
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for stream in (1, 2):
            os.dup2(self.said.fileno(), stream)
        while True:
            try:
                job = pipe.recv()
            except EOFError:
                os._exit(0)
            began = time.process_time()
            pipe.send((self.do(job), time.process_time() - began))

    def _last_words(self) -> str:
        self.said.seek(0, os.SEEK_END)
        self.said.seek(max(0, self.said.tell() - 300))
        return " ".join(self.said.read().decode(errors="replace").split())


def each(do: Callable[[J], R], jobs: Iterable[J], limit: float = 60.0) -> Iterator[tuple[J, str, R | str]]:
    """Every job with what Worker says of it, in order."""
    worker = Worker(do, limit)
    try:
        for job in jobs:
            yield job, *worker(job)
    finally:
        worker.close()
