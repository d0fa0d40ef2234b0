"""Graphs: the step graphs that a sampler has open, each an engine. Threads may share them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from epsrt.engine import Engine
from epsrt.errors import InputError
from epsrt.forks import Unforkable
from epsrt.manifest import StepGraph


class Graphs(Unforkable):
    """The step graphs of an engine's bundle, opened when first needed by `engine.on`, until they are closed.

    `own` are the engines that are closed then: those that it opened, and whatever else is put there.
    """

    def __init__(self, engine: Engine):
        self.own: list[Engine] = []
        self.calls: set[object] = set()  # in work
        self._engine, self._engines = engine, {engine.graph.stem: engine}
        self._opening = threading.Lock()
        self._lock = threading.RLock()  # of calls and closed: a stream may be collected anywhere, and a call so end
        self._closed = False

    @contextmanager
    def running(self, features: tuple[str, ...]) -> Iterator[Engine]:
        """The engine of the smallest step graph that has the features. It stays open until the call ends.

        Raises InputError once the graphs are closed, EngineError in a fork of their process.
        """
        first = self._engine
        self.check_process()  # before a lock that another thread may have held at the fork
        own = features == first.graph.features
        graph = first.graph if own else first.bundle.graph(first.graph.precision, features)
        call = object()  # a number would stay one too high where a signal's handler raises between it and try
        try:
            with self._lock:
                if self._closed:
                    raise InputError(f"the sampler of {first.bundle.path.name} is closed: open it again")
                self.calls.add(call)
            if graph.stem not in self._engines:  # or it waited for others, which a build takes minutes to open
                self._open(graph)
            yield self._engines[graph.stem]
        finally:
            self.calls.discard(call)
            self._release()

    def close(self) -> None:
        """Refuse new calls, and close the engines once no call is in work."""
        with self._lock:
            self._closed = True
        self._release()

    def _open(self, graph: StepGraph) -> None:
        with self._opening:
            if graph.stem not in self._engines:
                engine = self._engine.on(graph)
                self.own.append(engine)
                self._engines[graph.stem] = engine

    def _release(self) -> None:
        with self._lock:
            if not self._closed or self.calls:
                return
            own, self.own = self.own, []
        with ExitStack() as stack:
            for engine in own:
                stack.callback(engine.close)
