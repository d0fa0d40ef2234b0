"""Cost is linear in steps and in batch, and memory is flat: python benchmarks/linear.py

digits on the engine that auto takes. Seconds of Sampler.sample, DDIM, over 10 … 1,000 steps of one image and over
1 … 64 images of 50 steps: the slope of a straight line through the logarithms and its R², and the line of time itself.
The memory is a process's resident set: within one trajectory of 10,000 steps (DDPM-1000's rows ten times over, each
with a noise index of its own), and over 200 calls of DDPM-50.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import bundle, write
from numpy.typing import ArrayLike

from epsrt import Bundle, Plan, Sampler, open_engine
from epsrt.bench import isolated
from epsrt.bench.others import BUSY, clocks, others_share
from epsrt.bench.timing import clocked, rounds
from epsrt.plan import COLUMNS

Row = dict[str, Any]
STEPS, AT_BATCH = (10, 20, 50, 100, 200, 500, 1000), 1
BATCHES, AT_STEPS = (1, 2, 4, 8, 16, 32, 64), 50
ROUNDS = 9
MEMORY_STEPS, EVERY = 10_000, 100
CALLS, CALL_STEPS = 200, 50
CHART = Path("docs/linear.png")


def times(runs: dict[int, Callable[[], object]], most: int) -> dict[int, float]:
    """Median seconds of each, in turn after a warm-up."""
    seconds = rounds({size: clocked(run) for size, run in runs.items()}, most, warm=1)
    return {size: statistics.median(values) for size, values in seconds.items()}


def line(x: ArrayLike, y: ArrayLike) -> tuple[float, float, float]:
    """Slope, intercept and R² of the least-squares line."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    slope, intercept = np.polyfit(x, y, 1)
    left = np.square(y - slope * x - intercept).sum() / np.square(y - y.mean()).sum()
    return float(slope), float(intercept), float(1 - left)


def fitted(what: str, seconds: dict[int, float]) -> Row:
    """A row: both lines. `each_ms` and `fixed_ms` are of time itself, fitted to relative errors."""
    x, y = np.array(list(seconds), np.float64), np.array(list(seconds.values()))
    slope, _, r2 = line(np.log(x), np.log(y))
    # least squares of relative errors, or the longest run alone would say what the fixed cost is
    (each, fixed), *_ = np.linalg.lstsq(np.stack([x / y, 1 / y], 1), np.ones_like(y), rcond=None)
    left = np.square(y - each * x - fixed).sum() / np.square(y - y.mean()).sum()
    return {
        "what": what,
        "seconds": {str(k): round(v, 6) for k, v in seconds.items()},
        "log_slope": round(slope, 4),
        "log_r2": round(r2, 6),
        "each_ms": round(1e3 * float(each), 4),
        "fixed_ms": round(1e3 * float(fixed), 4),
        "r2": round(1 - float(left), 6),
    }


def timed(opened: Bundle) -> list[Row]:
    labels = 0 if opened.labelled else None
    before = clocks()
    with open_engine(opened, "auto") as engine, Sampler(engine) as sampler:
        by_steps = times(
            {n: partial(sampler.sample, AT_BATCH, method="ddim", steps=n, labels=labels) for n in STEPS}, ROUNDS
        )
        by_batch = times(
            {n: partial(sampler.sample, n, method="ddim", steps=AT_STEPS, labels=labels) for n in BATCHES}, ROUNDS
        )
    about = {"engine": engine.name, "precision": engine.precision, "others_share": others_share(before, clocks())}
    return [
        {**fitted("steps", by_steps), "batch": AT_BATCH, **about},
        {**fitted("batch", by_batch), "steps": AT_STEPS, **about},
    ]


def repeated(plan: Plan, times: int) -> Plan:
    """A plan's rows several times over, n counting on."""
    table = np.tile(plan.table, (times, 1))
    table[:, COLUMNS.index("n")] = np.arange(len(table))
    return Plan(table, plan.start, f"{plan.name}, {times} times", plan.level)


def memory(key: Row) -> Row:
    """KiB of this process after every EVERY steps of one trajectory, and then after every tenth call.

    key: bundle, steps, calls
    """
    steps, calls = key["steps"], key["calls"]
    within: dict[int, int] = {}
    over: dict[int, int] = {}
    with Sampler.open(key["bundle"]) as sampler:
        labels = 0 if sampler.bundle.labelled else None
        once = sampler.plan("ddpm", min(steps, 1000))
        plan = repeated(once, steps // len(once))

        def on_step(done: int, total: int) -> None:
            within[done] = rss_kib()

        sampler.sample(AT_BATCH, plan=plan, labels=labels, on_step=on_step, every=EVERY)
        for call in range(1, calls + 1):
            sampler.sample(AT_BATCH, method="ddpm", steps=CALL_STEPS, labels=labels, seed=call)
            if call % 10 == 0:
                over[call] = rss_kib()
        about = {"engine": sampler.engine.name, "precision": sampler.engine.precision}
    return {
        "what": "memory",
        "batch": AT_BATCH,
        **about,
        "kib_after_steps": within,
        "kib_after_calls": over,
        "growth_kib": within[max(within)] - within[min(within)],
        "growth_kib_calls": over[max(over)] - over[min(over)],
    }


def rss_kib() -> int:
    """This process's resident set."""
    found = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmRSS:"))
    return int(found.split()[1])


def told(row: Row) -> str:
    if row["what"] == "memory":
        kib = {int(k): v for k, v in row["kib_after_steps"].items()}
        return (
            f"memory: {kib[min(kib)]:,} KiB after {min(kib):,} steps, {row['growth_kib']:+,} KiB by {max(kib):,}; "
            f"{row['growth_kib_calls']:+,} KiB over {CALLS} calls of {CALL_STEPS} steps"
        )
    busy = f"; INVALID: other processes took {100 * row['others_share']:.0f} % of the cores"
    return (
        f"{row['what']:6} slope {row['log_slope']:.3f} of the logarithms, R² {row['log_r2']:.5f}; "
        f"{row['each_ms']:.4f} ms each and {row['fixed_ms']:.3f} ms fixed, R² {row['r2']:.5f}"
        f"{busy if (row['others_share'] or 0) > BUSY else ''}"
    )


def chart(rows: list[Row], path: Path) -> None:
    """Seconds by steps, seconds by batch, memory by steps. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    from epsrt_command.charts import save

    by = {row["what"]: row for row in rows}
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, 3)
    for axes, what in zip(all_axes, ("steps", "batch"), strict=False):
        row = by[what]
        x, y = np.array([int(k) for k in row["seconds"]]), np.array(list(row["seconds"].values()))
        axes.loglog(x, y, "o", color="C0", label="measured")
        fit = (row["fixed_ms"] + row["each_ms"] * x) / 1e3
        label = f"{row['fixed_ms']:.2g} ms + {row['each_ms']:.3g} ms × {what}"
        axes.loglog(x, fit, color="C1", label=label)
        other = f"batch {row['batch']}" if what == "steps" else f"{row['steps']} steps"
        axes.set_title(
            f"{other}: log–log slope {row['log_slope']:.3f}, R² {row['log_r2']:.4f}", loc="left", fontsize=10
        )
        axes.set_xticks(x, [f"{size:,}" for size in x])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(what)
        axes.set_ylabel("seconds")
        axes.legend(frameon=False)
    kib = {int(k): v for k, v in by["memory"]["kib_after_steps"].items()}
    all_axes[2].plot(list(kib), [v / 1024 for v in kib.values()], color="C0")
    all_axes[2].set_ylim(0, 1.25 * max(kib.values()) / 1024)
    all_axes[2].set_title(f"memory: {by['memory']['growth_kib']:+,} KiB over the run", loc="left", fontsize=10)
    all_axes[2].set_xlabel("steps taken")
    all_axes[2].set_ylabel("resident MiB")
    for axes in all_axes:
        axes.grid(True, color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    opened = bundle("digits")
    rows = timed(opened)
    rows.append(isolated.call(memory, {"bundle": str(opened.path), "steps": MEMORY_STEPS, "calls": CALLS}).value)
    for row in rows:
        print(told(row))
    chart(rows, CHART)
    print(f"{write('linear', rows)}, {CHART}")


if __name__ == "__main__":
    main()
