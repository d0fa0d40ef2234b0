"""The GPU's own driver code alone, without onnxruntime and torch: our kernels against NumPy, and what they cost."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsrt import noise
from epsrt.engines import nvidia
from epsrt.engines.gpu import cuda
from epsrt.engines.gpu.table import Table
from epsrt.types import Float32

Tell = Callable[..., None]  # tell(key, **figures)

SIZES = (3072, 1, 147, 64, 196608, 1_000_003)  # of a lane, elements
IMAGE = 3072  # the size that is timed as well
LANES, MOST = 256, 1 << 24  # of a launch: lanes, and elements in all
COLUMNS, D, N = 7, 2, 5  # of the rows, and where d and n stand
LAUNCHES = 50  # launches that are timed as one
LIMIT = 4e-6  # between two float32 Box-Mullers


class Bench:
    """A stream and what lies on the device; all of it is closed with the stack."""

    def __init__(self, stack: ExitStack):
        self.device = cuda.device()
        self.stream = stack.enter_context(closing(cuda.Stream(self.device)))
        self._stack = stack

    def memory(self, size: int) -> cuda.Memory:
        return self._stack.enter_context(closing(cuda.Memory(size, "the benchmark")))

    def up(self, array: NDArray[Any]) -> int:
        table = self._stack.enter_context(closing(Table(self.stream, "the benchmark")))
        return table.upload(np.ascontiguousarray(array))

    def down(self, at: int, shape: tuple[int, ...]) -> Float32:
        with closing(cuda.Pinned(4 * int(np.prod(shape)))) as host:
            self.stream.download(host.array, at)
            self.stream.synchronize()
            return host.array.view(np.float32).reshape(shape).copy()

    def launch(self, kernel: str, lanes: int, size: int, addresses: list[int], *numbers: int) -> None:
        values = (*map(ctypes.c_void_p, addresses), *map(ctypes.c_int32, numbers))
        self.stream.launch(kernel, lanes, size, *values)

    def ms(self, work: Callable[[], object]) -> float:
        """Milliseconds that the device spends on what `work` gives to the stream."""
        with closing(cuda.Event(True)) as first, closing(cuda.Event(True)) as last:
            first.record(self.stream)
            work()
            last.record(self.stream)
            last.synchronize()
            return last.since(first)


def check_all(tell: Tell, most: int = MOST, copied: int = 2 << 30) -> None:
    """All of it. `most` elements a launch, `copied` bytes a copy."""
    begin = time.perf_counter()
    gpu = cuda.device().gpu
    seconds, free = round(time.perf_counter() - begin, 3), cuda.device().memory()[0] >> 20
    tell({"what": "device"}, gpu=gpu.name, arch=gpu.arch, driver=nvidia.driver().version, open_s=seconds, free_mib=free)
    for size in SIZES:
        if size * 2 <= most:
            with ExitStack() as stack:
                check_noise(tell, Bench(stack), size, min(LANES, max(2, most // size)))
    with ExitStack() as stack:
        check_check(tell, Bench(stack))
    with ExitStack() as stack:
        tell({"what": "copy"}, gb_s=round(copy_rate(Bench(stack), copied), 1))


def check_noise(tell: Tell, bench: Bench, size: int, lanes: int) -> None:
    """The kernel's normals against NumPy's; a lane whose d is 0 keeps what it has."""
    rows = np.zeros((lanes, COLUMNS), np.float32)
    rows[:, D], rows[:, N] = 1, np.arange(lanes) % 1000
    rows[1, D] = 0
    seeds = np.random.default_rng(0).integers(0, 1 << 64, lanes, np.uint64)
    indices = np.arange(lanes, dtype=np.uint32)
    z = bench.memory(4 * lanes * size)
    addresses = [z.pointer, bench.up(rows), bench.up(seeds), bench.up(indices)]

    def launch() -> None:
        bench.launch("noise", lanes, size, addresses, size, COLUMNS, D, N, noise.STEP)

    bench.stream.zero(z.pointer, z.size)
    launch()
    got = bench.down(z.pointer, (lanes, size))
    want = noise.normals(seeds, indices, noise.STEP, rows[:, N].astype(int), size)
    error = np.abs(got.astype(np.float64) - want)[np.arange(lanes) != 1]
    untouched, worst = not got[1].any(), float(error.max())
    row = {"lanes": lanes, "worst": worst, "equal": float((error == 0).mean()), "untouched": untouched}
    tell({"what": "noise", "size": size}, **row, passed=untouched and worst <= LIMIT)
    if size == IMAGE:
        time_launch(tell, bench, launch, z, got)


def time_launch(tell: Tell, bench: Bench, launch: Callable[[], None], z: cuda.Memory, plain: Float32) -> None:
    """A graph of launches gives what one gives; what a launch costs on the device in it, and on the host outside."""

    def work() -> None:
        for _ in range(LAUNCHES):
            launch()

    with closing(bench.stream.capture(work)) as graph:
        bench.stream.zero(z.pointer, z.size)
        times = [bench.ms(lambda: bench.stream.replay(graph)) / LAUNCHES for _ in range(12)]
        same = bool((bench.down(z.pointer, plain.shape) == plain).all())
    us = round(1e3 * statistics.median(times), 3)
    tell({"what": "noise kernel", "lanes": len(plain), "size": IMAGE}, us=us, passed=same)
    begin = time.perf_counter()
    for _ in range(20):
        work()
    seconds = time.perf_counter() - begin
    bench.stream.synchronize()
    tell({"what": "host time of a launch"}, us=round(1e6 * seconds / (20 * LAUNCHES), 2))


def check_check(tell: Tell, bench: Bench) -> None:
    """The kernel that looks for NaN notes the step and the timestep of the first in each lane, and no later one."""
    x = np.random.default_rng(1).standard_normal((4, 3000)).astype(np.float32)
    x[1, 2999], x[2, 0], x[3, 1500] = np.nan, np.inf, -np.inf
    rows = np.zeros((4, 3), np.float32)
    rows[:, 1] = [10, 20, 30, 40]
    numbers = bench.up(np.array([5, 6, 7, 8], np.int32))
    broken, t = bench.up(np.array([0, 0, 0, 4], np.int32)), bench.up(np.array([0, 0, 0, 77], np.float32))
    bench.launch("check", 4, 3000, [bench.up(x), bench.up(rows), numbers, broken, t], 3000, 3, 1)
    steps, times = bench.down(broken, (4,)).view(np.int32).tolist(), bench.down(t, (4,)).tolist()
    tell({"what": "check kernel"}, passed=steps == [0, 6, 7, 4] and times == [0, 20, 30, 77], steps=steps)


def copy_rate(bench: Bench, size: int) -> float:
    """GB/s of a copy on the device, reads and writes together."""
    a, b = bench.memory(size), bench.memory(size)
    bench.stream.copy(b.pointer, a.pointer, size)

    def copies() -> None:
        for _ in range(5):
            bench.stream.copy(b.pointer, a.pointer, size)

    return 2 * 5 * size / bench.ms(copies) / 1e6
