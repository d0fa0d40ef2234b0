"""Timing on the device: a bare engine, and whole trajectories through its lanes.

This is the one place that looks inside DeviceLanes. Events are recorded on its stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsrt import Engine, EngineError, Plan, Sample, Sampler
from epsrt.bench import timing
from epsrt.bench.report import paired_ratio
from epsrt.engines.gpu import cuda
from epsrt.engines.gpu.lanes import DeviceLanes
from epsrt.engines.gpu.table import Table

Run = Callable[[], Any]
Row = dict[str, Any]


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """Median, 95th percentile and how many."""
    p50, p95 = np.percentile(values, (50, 95))
    return {"p50": round(float(p50), digits), "p95": round(float(p95), digits), "n": len(values)}


def median_ratio(a: list[float], b: list[float], scale: float = 1.0) -> float:
    """report.paired_ratio, rounded."""
    return round(paired_ratio(a, b, scale), 4)


def rounds(runs: dict[str, Run], most: int, least: int = 3, seconds: float = 8.0) -> dict[str, list[Any]]:
    """timing.rounds, after one and a quarter of a second that warm the device up; `seconds` beside them."""
    return timing.rounds(runs, most, least=least, seconds=seconds, warm=1, warm_s=0.25)


class Watch:
    """Two events on the stream of a lanes object: the milliseconds between them on the device's clock."""

    def __init__(self, stack: ExitStack, lanes: DeviceLanes):
        self._stream = lanes._stream
        self._begin, self._end = cuda.Event(timing=True), cuda.Event(timing=True)
        stack.callback(self._begin.close)
        stack.callback(self._end.close)

    def begin(self) -> None:
        self._begin.record(self._stream)

    def end(self) -> None:
        self._end.record(self._stream)

    def ms(self) -> float:
        """Waits for the end."""
        self._end.synchronize()
        return self._end.since(self._begin)

    def time(self, work: Run) -> float:
        """Milliseconds that the device spends on what `work` gives to the stream."""
        self.begin()
        work()
        self.end()
        return self.ms()


def samples(engine: Engine, plan: Plan, batch: int) -> list[Sample]:
    classes = engine.bundle.manifest.classes
    return [
        Sample(seed=1, index=i, start=plan.start, conditions={"label": i % classes} if classes else {})
        for i in range(batch)
    ]


def whole(stack: ExitStack, lanes: DeviceLanes, engine: Engine, method: str, steps: int) -> Run:
    """A trajectory, from writing all lanes to reading them all: its (wall, device) milliseconds.

    The device's are those of `advance` alone: the upload of samples and rows, and every kernel.
    """
    plan = Sampler(engine).plan(method, steps)
    begins, one = samples(engine, plan, lanes.batch), plan.rows(engine.columns)
    rows = np.broadcast_to(one[:, None], (len(one), lanes.batch, one.shape[1]))
    watch = Watch(stack, lanes)

    def run() -> tuple[float, float]:
        begin = time.perf_counter()
        for i, sample in enumerate(begins):
            lanes.write(i, sample)
        watch.begin()
        lanes.advance(rows)
        watch.end()
        for i in range(lanes.batch):
            lanes.read(i)
        wall = 1e3 * (time.perf_counter() - begin)
        return wall, watch.ms()

    return run


def bare_runs(stack: ExitStack, lanes: DeviceLanes, steps: int, sizes: set[int]) -> dict[str, Run]:
    """The engine's steps alone, milliseconds a step: no noise, no check, and idle rows, which keep x as it is.

    By the number of steps in a captured graph, which is replayed; "alone" where nothing of ours can be captured.
    """
    stream, runner, watch, chunk = lanes._stream, lanes._runner, Watch(stack, lanes), lanes._chunk
    idle = upload(stack, lanes, lanes._idle(chunk))

    def enqueue(count: int, rows: int) -> None:
        for i in range(count):
            runner.enqueue(i % 2, rows + i % chunk * lanes._row_bytes)

    def captured(size: int) -> Run:
        graph, replays = stream.capture(lambda: enqueue(size, lanes._slots)), steps // size
        stack.callback(graph.close)

        def run() -> float:
            stream.copy(lanes._slots, idle, chunk * lanes._row_bytes)  # whole trajectories leave theirs
            return watch.time(lambda: [stream.replay(graph) for _ in range(replays)]) / (replays * size)

        return run

    if lanes.capturing and runner.capturable:
        try:
            return {str(size): captured(size) for size in sorted(sizes)}
        except EngineError as error:
            print(f"the bare engine is not captured: {error}")
    return {"alone": lambda: watch.time(lambda: enqueue(steps, idle)) / steps}


def upload(stack: ExitStack, lanes: DeviceLanes, rows: NDArray[np.float32]) -> int:
    """The address of a copy of rows that lives as long as the stack."""
    table = Table(lanes._stream, "the benchmark")
    stack.callback(table.close)
    at = table.upload(rows)
    lanes._stream.synchronize()
    return at
