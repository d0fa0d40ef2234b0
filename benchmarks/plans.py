"""How long a plan of 1,000 timesteps takes, its schedule computed anew: `python benchmarks/plans.py`."""

import statistics
import time
from collections.abc import Callable

from common import write

from epsrt import Schedule
from epsrt.solvers import METHODS, make

STEPS, RUNS = 1000, 51


def milliseconds(call: Callable[[], object]) -> float:
    """Median over RUNS calls, after one."""
    call()
    timed = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        call()
        timed.append(time.perf_counter() - begin)
    return statistics.median(timed) * 1e3


def main() -> None:
    rows: list[dict[str, object]] = []
    print(f"{'method':>16} {'rows':>6} {'ms':>7}")
    for method in METHODS:
        options = {"each": 1, "denoise": False} if method == "langevin" else {}
        plan = make(method, Schedule(), steps=STEPS, **options)
        ours = milliseconds(lambda: make(method, Schedule(), steps=STEPS, **options))  # noqa: B023
        rows.append({"method": method, "rows": len(plan), "ms": round(ours, 3)})
        print(f"{method:>16} {len(plan):6} {ours:7.2f}")
    print(write("plans", rows))


if __name__ == "__main__":
    main()
