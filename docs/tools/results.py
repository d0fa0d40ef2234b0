"""The table of docs/evidence/results.md, from the files beside it: python docs/tools/results.py"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from epsrt.bench.report import Case, Figures, Report, Row, read

FOLDER = Path(__file__).parents[1] / "evidence" / "results"
HEAD = (
    "machine", "network, sampler", "engine", "batch", "steps/s", "images/s", "ms p50", "ms p95", "GFLOP/s", "of peak",
    "of bandwidth", "W", "file",
)  # fmt: skip
WORDS = 3  # the first columns are words


def table(folder: Path = FOLDER) -> str:
    """A row a case of each *.json that `epsrt bench --share` wrote, by network, then file, in Markdown."""
    found = sorted(
        ((path, read(path)) for path in folder.glob("*.json")), key=lambda pair: (_network(pair[1]), pair[0])
    )
    rows = [cells for path, report in found for cells in _rows(path, report)]
    marks = ["---" if i < WORDS or name == "file" else "--:" for i, name in enumerate(HEAD)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (HEAD, marks, *rows))


def _rows(path: Path, report: Report) -> Iterator[list[str]]:
    for row in report.rows:
        if row.case is not None and row.figures is not None:
            yield [*_words(report, row.case, row.figures), *_numbers(report, row, row.figures), _link(path, report)]


def _words(report: Report, case: Case, figures: Figures) -> list[str]:
    m = report.machine
    cores = report.request.threads or m["cores"]
    on_gpu = report.device == "cuda" if case.engine in report.rivals else figures.device is not None
    where = m["gpu"]["name"] if on_gpu else f"{cores} core{'s' if cores > 1 else ''} of {m['processor']}"
    sampler = f"{report.request.method}, {report.request.steps} steps"
    return [where, f"{_network(report)}; {sampler}", f"{case.engine} {case.precision}"]


def _numbers(report: Report, row: Row, f: Figures) -> list[str]:
    of_peak, of_bandwidth = ("" if share is None else f"{share:.1%}" for share in report.shares(row))
    achieved = "" if f.achieved is None else rate(f.achieved[0] / 1e9)
    clock = f if f.device is None else f.device
    watts = "" if f.device is None or f.device.power_w is None else f"{f.device.power_w:.0f}"
    rates = rate(f.steps_per_s), rate(f.images_per_s), f"{clock.step_ms_p50:.3g}", f"{clock.step_ms_p95:.3g}"
    return [str(row.batch), *rates, achieved, of_peak, of_bandwidth, watts]


def rate(value: float) -> str:
    """Four digits, or all before the point."""
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"


def _network(report: Report) -> str:
    of = report.bundle
    return f"{of.name}, {of.parameters / 1e6:.3g} M parameters"


def _link(path: Path, report: Report) -> str:
    return f"[{report.date}](results/{path.name})"


if __name__ == "__main__":
    print(table())
