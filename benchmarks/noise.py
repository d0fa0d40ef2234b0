"""How many normals a second on one core: `python benchmarks/noise.py` (taskset -c 1 keeps it on one).

The rival is NumPy's own Generator(Philox), which fills one long array and knows nothing of samples.
"""

import platform
import statistics
import time
from collections.abc import Callable

import numpy as np

from epsrt.noise import STEP, normals

SHAPES = [(8, 3072), (1, 24_576), (1000, 64), (64, 12_288), (1, 1_000_000), (1, 3072), (1, 64)]


def seconds(draw: Callable[[], object], total: int, runs: int = 31) -> float:
    """Median seconds of a call, over runs of about a millisecond or more, after a warm-up."""
    calls = max(1, 100_000 // total)
    draw()
    timed = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(calls):
            draw()
        timed.append((time.perf_counter() - start) / calls)
    return statistics.median(timed)


def main() -> None:
    rival = np.random.Generator(np.random.Philox(0))
    print(f"M normals/s, one thread, NumPy {np.__version__}, {platform.processor() or platform.machine()}")
    print(f"{'rows x size':>14} {'one seed':>10} {'seed a row':>11} {'numpy':>8} {'us a call':>10}")
    for rows, size in SHAPES:
        out = np.empty((rows, size), np.float32)
        index, seeds = np.arange(rows), np.arange(rows) * 977
        one = seconds(lambda: normals(5, index, STEP, 3, size, out), out.size)  # noqa: B023
        many = seconds(lambda: normals(seeds, 0, STEP, 3, size, out), out.size)  # noqa: B023
        other = seconds(lambda: rival.standard_normal(dtype=np.float32, out=out), out.size)  # noqa: B023
        rates = [out.size / t / 1e6 for t in (one, many, other)]
        print(f"{f'{rows} x {size}':>14} {rates[0]:10.1f} {rates[1]:11.1f} {rates[2]:8.1f} {one * 1e6:10.1f}")


if __name__ == "__main__":
    main()
