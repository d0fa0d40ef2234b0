"""What epsrt bench prints of a report."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from rich.text import Text

from epsrt.bench.others import BUSY
from epsrt.bench.report import Figures, Report, Row, startup
from epsrt_command import show

NOTHING = "–"
WORDS = ("engine", "precision")  # columns of words; all others are of numbers
EVERY = ("engine", "batch", "steps/s", "±", "images/s", "ms p50", "p95", "memory", "start-up", "× fastest")


def print_report(report: Report) -> None:
    """The table, and below it what it does not say. Columns that hold nothing are left out, but for the usual ones."""
    measured = [(row, row.figures) for row in report.rows if row.figures]
    unit = 1e12 if any(f.achieved and f.achieved[0] >= 1e12 for _, f in measured) else 1e9
    rows = [dict(_cells(row, figures, report, unit)) for row, figures in measured]
    precisions = {row.precision for row, _ in measured} or {e.precision for e in report.engines}
    columns = [
        name for name in (rows or [{}])[0] if name in EVERY or any(row[name] != NOTHING for row in rows)
    ] or EVERY
    columns = [name for name in columns if name != "precision" or len(precisions) > 1]
    title = f"{report.bundle.name}: {report.request.method} in {report.request.steps} steps"
    title += "" if len(precisions) > 1 else f", {next(iter(precisions))}"
    table = show.table(f"{title}, on {_where(report)}", *columns, right=[name for name in columns if name not in WORDS])
    for cells in rows:
        fastest = "green" if cells["× fastest"] == "1.00" else ""
        table.add_row(*(Text(cells[name], fastest if name == "× fastest" else "") for name in columns))
    console = show.out()
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=1000)).maximum)
    console.print(table, "")
    for line in _remarks(report):
        console.print(line, soft_wrap=True)


def _where(report: Report) -> str:
    m = report.machine
    cores = report.request.threads or m["cores"]
    cpu = f"{cores} core{'s' if cores > 1 else ''} of {m['processor']}"
    return f"{m['gpu']['name']}, {cpu}" if "gpu" in m and report.device == "cuda" else cpu


def _cells(row: Row, f: Figures, report: Report, unit: float) -> Iterator[tuple[str, str]]:
    precision, device, achieved = row.precision or "", f.device, f.achieved
    starts, of_peak, of_bandwidth = startup(report, row.engine, precision), *report.shares(row)
    yield "engine", row.engine
    yield "precision", precision
    yield "batch", str(row.batch)
    yield "steps/s", show.rate(f.steps_per_s)
    yield "±", f"{f.spread:.1%}" if len(f.rounds_ms) > 1 else NOTHING
    yield "images/s", show.rate(f.images_per_s)
    yield "ms p50", _ms(f.step_ms_p50)
    yield "p95", _ms(f.step_ms_p95)
    yield "GPU ms p50", NOTHING if device is None else _ms(device.step_ms_p50)
    yield "GPU p95", NOTHING if device is None else _ms(device.step_ms_p95)
    yield "TFLOP/s" if unit == 1e12 else "GFLOP/s", NOTHING if achieved is None else show.rate(achieved[0] / unit)
    yield "of peak", NOTHING if of_peak is None else f"{of_peak:.1%}"
    yield "of bandwidth", NOTHING if of_bandwidth is None else f"{of_bandwidth:.1%}"
    yield "W", NOTHING if device is None or device.power_w is None else f"{device.power_w:.0f}"
    yield "memory", NOTHING if f.memory is None else show.size(f.memory)
    yield "start-up", f"{median(starts):.2f} s" if starts else NOTHING
    yield "× fastest", f"{row.ratio:.2f}"


def _remarks(report: Report) -> Iterator[str]:
    """What the table does not say: what was left out, and why; what its columns are."""
    absent: dict[str, list[str]] = {}
    unpowered: dict[str, list[str]] = {}
    for row in report.rows:
        name = str(row.case or " ".join(filter(None, (row.engine, row.precision))))
        if row.reason:
            absent.setdefault(row.reason, []).append(name)
        elif row.figures and row.figures.device and row.figures.device.power_unknown:
            unpowered.setdefault(row.figures.device.power_unknown, []).append(name)
    for reason, names in absent.items():
        yield f"not measured: {', '.join(names)}: {reason}"
    if report.missing:
        yield f"missing: {', '.join(map(str, report.missing))}"
    for e in report.engines:
        if e.built:
            name, seconds = f"{e.engine} {e.precision}", f"{e.seconds:.1f} s"
            yield f"{name} was built or proven first, which took {seconds}; start-up is without"
    if (report.others_share or 0) > BUSY:
        yield f"other processes took {report.others_share:.0%} of the cores meanwhile: measure again without them"
    for reason, names in unpowered.items():
        yield f"power is not known: {', '.join(names)}: {reason}"
    if report.uncounted:
        yield f"FLOPs are not counted: {report.uncounted}"
    elif any(f.cost for f in report.measured.values()):
        yield "FLOP/s: of convolutions and matrix products, counted from the step graph, two a multiply-add"
    if report.peak is not None:
        yield f"peak: {_peak(report)}"
    if report.rivals:
        yield f"{', '.join(report.rivals)}: each in a process of its own, whose start-up and memory are not measured"
    yield f"memory: {report.memory_of}; start-up: of a process to its first image, nothing left to build"


def _peak(report: Report) -> str:
    peak = report.peak
    assert peak is not None
    by_value: dict[float, list[str]] = {}
    for precision, tflops in peak.tflops.items():
        by_value.setdefault(tflops, []).append(precision)
    words = [f"{tflops:g} TFLOP/s in {' and '.join(names)}" for tflops, names in by_value.items()]
    words += [] if peak.gbs is None else [f"{peak.gbs:g} GB/s"]
    return f"{', '.join(words)} ({peak.source})"


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
