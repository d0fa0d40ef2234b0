"""LanePool: lanes that wait for the next call. On a GPU they are dear to make."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain

from epsrt.engine import Engine, Lanes, Sample
from epsrt.errors import Cancelled, DeadlineExceeded, OutOfMemoryError
from epsrt.types import Size

KEPT_LANES = 8  # of all graphs, batches and sizes

Key = tuple[str, int, Size]  # the graph's stem, how many samples, and their size


class LanePool:
    """Lanes between calls, `free` by their kind; those used last come last. Threads may share it."""

    def __init__(self) -> None:
        self.free: dict[Key, list[Lanes]] = {}
        self._lock = threading.RLock()  # a stream may be collected, and its lanes come back, anywhere
        self._closed = False

    @contextmanager
    def lanes(self, engine: Engine, samples: list[Sample], size: Size) -> Iterator[Lanes]:
        """Lanes with the samples in them, kept for the next caller unless they failed."""
        key = engine.graph.stem, len(samples), size
        with self._lock:
            free = self.free.get(key)
            lanes = free.pop() if free else None
        try:
            lanes = lanes or engine.lanes(len(samples), size)
        except OutOfMemoryError:
            self.drop()  # others' memory, kept for nobody yet
            lanes = engine.lanes(len(samples), size)
        try:
            for i, sample in enumerate(samples):
                lanes.write(i, sample)
            yield lanes
        except BaseException as error:
            if isinstance(error, Cancelled | DeadlineExceeded) and error.between_steps:
                self._put(key, lanes)
            else:
                lanes.close()  # its state is anyone's guess
            raise
        self._put(key, lanes)

    def drop(self) -> None:
        """Close the lanes that are free, each, whatever another's close raises."""
        with self._lock:
            kept, self.free = self.free, {}
        with ExitStack() as stack:
            for lanes in chain.from_iterable(kept.values()):
                stack.callback(lanes.close)

    def close(self) -> None:
        """Close the lanes that are free, and from now on those that come back."""
        with self._lock:
            self._closed = True
        self.drop()

    def _put(self, key: Key, lanes: Lanes) -> None:
        with self._lock:
            surplus = lanes if self._closed else self._keep(key, lanes)
        if surplus is not None:
            surplus.close()

    def _keep(self, key: Key, lanes: Lanes) -> Lanes | None:
        """Put lanes by, and return those that make room for them: the ones that were not used for longest."""
        self.free[key] = [*self.free.pop(key, []), lanes]
        if sum(map(len, self.free.values())) <= KEPT_LANES:
            return None
        oldest = next(k for k, kept in self.free.items() if kept)
        return self.free[oldest].pop(0)
