"""Forks of a process that has imported what is heavy: each runs chosen tests on a tree of its own."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SOURCES = ("runtime", "export", "trainer", "command")
LIGHT = ("numpy", "msgspec", "safetensors.numpy", "pytest")
HEAVY = ("torch", "onnx", "onnxscript", "diffusers")
MEMORY = 12 << 30  # of address space: a mutant may ask for any number of bytes


def warm(heavy: bool) -> None:
    """Import what the tests import. onnxruntime and OpenVINO start threads, and are left to the forks."""
    plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", **plugins)
    for name in LIGHT + HEAVY * heavy:
        __import__(name)
    sys.dont_write_bytecode = True
    assert len(os.listdir("/proc/self/task")) == 1  # a fork of several threads would not be sound


class Chosen:
    """A pytest plugin: runs chosen tests in their order, and notes seconds and lines of each where it is told to."""

    def __init__(self, order: list[str] | None = None, traced: dict[str, str] | None = None) -> None:
        self.order, self.traced = {name: i for i, name in enumerate(order or [])}, traced or {}
        self.lines: set[tuple[str, int]] = set()
        self.of_fixture: dict[Any, set[tuple[str, int]]] = {}
        self.found: dict[str, tuple[float, list[tuple[str, int]]]] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.order:
            items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    def trace(self, frame: Any, event: str, arg: object) -> Any:
        file = self.traced.get(frame.f_code.co_filename)
        if file is None:
            return None

        def local(frame: Any, event: str, arg: object) -> Any:
            self.lines.add((file, frame.f_lineno))
            return local

        return local(frame, event, arg)

    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        self.lines, began = set(), time.perf_counter()
        if self.traced:
            threading.settrace(self.trace)
            sys.settrace(self.trace)
        yield
        sys.settrace(None)
        for definitions in item._fixtureinfo.name2fixturedefs.values():
            self.lines |= set().union(*(self.of_fixture.get(d, ()) for d in definitions))
        self.found[item.nodeid] = time.perf_counter() - began, sorted(self.lines)

    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        """What a shared fixture runs counts for every test that takes it."""
        before, self.lines = self.lines, set()
        yield
        if fixturedef.scope != "function":
            self.of_fixture[fixturedef] = self.lines
        self.lines = before | self.lines


def in_child(tree: Path, tests: list[str], plugin: Chosen, then: Callable[[Chosen], object] | None = None) -> None:
    """Never returns: the exit status is pytest's."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    log = os.open(tree / "pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(tree)
    import pytest

    for hook in ("pytest_runtest_protocol", "pytest_fixture_setup"):
        setattr(Chosen, hook, pytest.hookimpl(hookwrapper=True)(getattr(Chosen, hook)))
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", f"--basetemp={tree}/temporary"]
    status = pytest.main([*options, *tests], plugins=[plugin])
    if then is not None:
        then(plugin)
    sys.stdout.flush()
    os._exit(int(status))


def fork(tree: Path, limit: float, *child: Any) -> int | None:
    """The exit status of in_child(tree, *child), or None where it took longer than `limit` seconds."""
    pid = os.fork()
    if not pid:
        try:
            in_child(tree, *child)
        finally:
            os._exit(99)
    ends = time.monotonic() + limit
    while time.monotonic() < ends:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def parallel(trees: list[Path], jobs: list[Any], do: Callable[[Path, Any], Any]) -> list[Any]:
    """do(tree, job) of each job, in as many processes as there are trees; they take jobs from a pipe."""
    take, give = os.pipe()
    workers = {}
    for tree in trees:
        if not (pid := os.fork()):
            os.close(give)
            os.environ["PYTHONPATH"] = os.pathsep.join(str(tree / source) for source in SOURCES)
            sys.path[:0] = [str(tree / source) for source in SOURCES]
            with (tree / "results").open("w") as results:
                while raw := os.read(take, 4):
                    i = int.from_bytes(raw, "big")
                    print(json.dumps([i, do(tree, jobs[i])]), file=results, flush=True)
            os._exit(0)
        workers[pid] = tree
    os.close(take)
    for i in range(len(jobs)):
        os.write(give, i.to_bytes(4, "big"))
    os.close(give)
    done: dict[int, Any] = {}
    for pid, tree in workers.items():
        if os.waitpid(pid, 0)[1]:
            raise SystemExit("a worker died: see above")
        done |= dict(map(json.loads, (tree / "results").read_text().splitlines()))
    return [done[i] for i in range(len(jobs))]
