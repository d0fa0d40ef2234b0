"""What the runtime's own arithmetic costs, without an engine: python benchmarks/micro.py [noise|plans]

noise   normals a second on one core (taskset -c 1 keeps it on one), beside NumPy's own Generator(Philox), which fills
        one long array and knows nothing of samples
plans   a plan of 1,000 timesteps, its schedule computed anew
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from common import write

from epsrt import Schedule
from epsrt.bench.timing import clocked, rounds
from epsrt.noise import STEP, normals
from epsrt.solvers import METHODS, make

SHAPES = ((8, 3072), (1, 24_576), (1000, 64), (64, 12_288), (1, 1_000_000), (1, 3072), (1, 64))  # rows × size
STEPS = 1000
ROUNDS = 31

Row = dict[str, Any]


def seconds(call: Callable[[], object], most: int, calls: int = 1) -> float:
    """Median of a call, over rounds of several, after a warm-up."""

    def several() -> None:
        for _ in range(calls):
            call()

    return statistics.median(rounds({"": clocked(several)}, most, warm=1)[""]) / calls


def noise(most: int) -> list[Row]:
    rival, rows = np.random.Generator(np.random.Philox(0)), []
    print(f"{'M normals/s':>14} {'one seed':>10} {'seed a row':>11} {'numpy':>8} {'us a call':>10}")
    for count, size in SHAPES:
        out = np.empty((count, size), np.float32)
        index, seeds = np.arange(count), np.arange(count) * 977
        calls = max(1, 100_000 // out.size)  # a round of a millisecond or more
        one = seconds(partial(normals, 5, index, STEP, 3, size, out), most, calls)
        many = seconds(partial(normals, seeds, 0, STEP, 3, size, out), most, calls)
        other = seconds(partial(rival.standard_normal, dtype=np.float32, out=out), most, calls)
        rates = [round(out.size / t / 1e6, 1) for t in (one, many, other)]
        print(f"{f'{count} x {size}':>14} {rates[0]:10.1f} {rates[1]:11.1f} {rates[2]:8.1f} {one * 1e6:10.1f}")
        names = ("one_seed", "seed_a_row", "numpy")
        rows.append({"what": "noise", "rows": count, "size": size, **dict(zip(names, rates, strict=True))})
    return rows


def plans(most: int) -> list[Row]:
    rows = []
    print(f"{'method':>16} {'rows':>6} {'ms':>7}")
    for method in METHODS:
        options: dict[str, Any] = {"each": 1, "denoise": False} if method == "langevin" else {}
        made = lambda method=method, options=options: make(method, Schedule(), steps=STEPS, **options)  # noqa: E731
        ms = 1e3 * seconds(made, most)
        rows.append({"what": "plan", "method": method, "rows": len(made()), "ms": round(ms, 3)})
        print(f"{method:>16} {len(made()):6} {ms:7.2f}")
    return rows


PARTS = {"noise": noise, "plans": plans}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS, help="without: all")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="fewer are not written to results/")
    options = parser.parse_args()
    chosen = [options.part] if options.part else list(PARTS)
    rows = [row for part in chosen for row in PARTS[part](options.rounds)]
    if options.part is None and options.rounds >= ROUNDS:
        print(write("micro", rows))


if __name__ == "__main__":
    main()
