"""Timing on the device: a bare engine, whole trajectories through its lanes, one kernel of ours alone.

This is the one place that looks inside DeviceLanes. Events are recorded on its stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsrt import Engine, EngineError, Plan, Sample, Sampler
from epsrt.bench import timing
from epsrt.bench.report import paired_ratio
from epsrt.engines.gpu import cuda
from epsrt.engines.gpu.lanes import DeviceLanes

Run = Callable[[], Any]
Row = dict[str, Any]
KERNEL_RUNS = 50  # launches of a kernel that are timed as one


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """Median, 95th percentile and how many."""
    p50, p95 = np.percentile(values, (50, 95))
    return {"p50": round(float(p50), digits), "p95": round(float(p95), digits), "n": len(values)}


def median_ratio(a: list[float], b: list[float], scale: float = 1.0) -> float:
    """report.paired_ratio, rounded."""
    return round(paired_ratio(a, b, scale), 4)


def rounds(runs: dict[str, Run], most: int, least: int = 5, seconds: float = 30.0) -> dict[str, list[Any]]:
    """timing.rounds, after two rounds and most/40 seconds (half a second, of the usual 20) that warm the device up."""
    return timing.rounds(runs, most, least=min(least, most), seconds=seconds, warm=2, warm_s=most / 40)


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
    return [Sample(seed=1, index=i, start=plan.start, label=i % classes if classes else 0) for i in range(batch)]


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


def bare(stack: ExitStack, lanes: DeviceLanes, steps: int, in_graph: int) -> Run:
    """The engine's steps alone, milliseconds a step: no noise, no check, no rows to upload; the lanes keep their x.

    `in_graph` steps are one captured graph, which is replayed; an engine that captures by itself does so. Raises
    EngineError where the capture fails.
    """
    stream, runner, watch = lanes._stream, lanes._runner, Watch(stack, lanes)
    row = upload(stack, lanes, lanes._idle(1))

    def enqueue(count: int) -> None:
        for i in range(count):
            runner.enqueue(i % 2, row)

    if not runner.capturable:
        return lambda: watch.time(lambda: enqueue(steps)) / steps
    graph = stream.capture(lambda: enqueue(in_graph))
    stack.callback(graph.close)
    replays = steps // in_graph

    def replay() -> None:
        for _ in range(replays):
            stream.replay(graph)

    return lambda: watch.time(replay) / (replays * in_graph)


def bare_runs(stack: ExitStack, lanes: DeviceLanes, steps: int, sizes: set[int]) -> dict[str, Run]:
    """`bare` by the number of steps in a graph; one run, "alone", where nothing of ours is captured."""
    if not lanes._runner.capturable:
        return {"alone": bare(stack, lanes, steps, 1)}
    try:
        return {str(size): bare(stack, lanes, steps, size) for size in sorted(sizes)}
    except EngineError as error:
        print(f"the bare engine is not captured: {error}")
    watch, row = Watch(stack, lanes), upload(stack, lanes, lanes._idle(1))
    one_by_one = lambda: [lanes._runner.enqueue(i % 2, row) for i in range(steps)]  # noqa: E731
    return {"alone": lambda: watch.time(one_by_one) / steps}


def kernel(stack: ExitStack, lanes: DeviceLanes, name: str) -> Run:
    """One kernel of ours alone, as a step launches it where all lanes add noise: milliseconds a launch, in a graph."""
    columns, width = lanes._columns, lanes._width
    rows = lanes._idle(KERNEL_RUNS)
    cells = rows[:, : width * len(columns)].reshape(KERNEL_RUNS, width, len(columns))
    cells[:, :, columns.index("d")] = 1.0
    cells[:, :, columns.index("n")] = np.arange(KERNEL_RUNS)[:, None]
    at, stream, watch = upload(stack, lanes, rows), lanes._stream, Watch(stack, lanes)
    with only(lanes, name):
        graph = stream.capture(lambda: lanes._enqueue(at, KERNEL_RUNS, True))
    stack.callback(graph.close)
    return lambda: watch.time(lambda: stream.replay(graph)) / KERNEL_RUNS


def upload(stack: ExitStack, lanes: DeviceLanes, rows: NDArray[np.float32]) -> int:
    """The address of a copy of rows that lives as long as the stack."""
    table = cuda.Table(lanes._stream, "the benchmark")
    stack.callback(table.close)
    at = table.upload(rows)
    lanes._stream.synchronize()
    return at


@contextmanager
def only(lanes: DeviceLanes, kernel: str) -> Iterator[None]:
    """Within: a step of these lanes is the launch of one kernel, without the engine and the other kernels."""
    stream, runner = lanes._stream, lanes._runner

    class OneKernel:
        def launch(self, name: str, *arguments: Any) -> None:
            if name == kernel:
                stream.launch(name, *arguments)

        def copy(self, *arguments: Any) -> None:
            pass

    class NoEngine:
        def enqueue(self, now: int, rows: int) -> None:
            pass

    lanes._stream, lanes._runner = OneKernel(), NoEngine()  # type: ignore[assignment]
    try:
        yield
    finally:
        lanes._stream, lanes._runner = stream, runner
