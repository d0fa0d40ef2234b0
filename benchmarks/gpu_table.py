"""What was measured on GPUs, from benchmarks/results/gpu-*.json: python benchmarks/gpu_table.py

It writes the tables of README.md and docs/benchmarks.md, between their markers, and draws docs/gpu.png. What no row has
is "not measured yet".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, align, matches

from epsrt.files import whole_file

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- made by benchmarks/gpu_table.py -->\n", "<!-- end -->\n"
NETWORK, PRECISION, BATCHES = "ddpm-cifar10", "fp16", (1, 64, 256)
OURS, RIVALS = "epsrt", ("torch.compile", "PyTorch channels-last", "PyTorch", "diffusers")
NOTHING = "not measured yet"
PACKAGES = ("onnxruntime-gpu", "onnxruntime", "tensorrt", "torch", "diffusers")  # whose versions are told


@dataclass(frozen=True)
class Target:
    """A figure beside what was asked of it; `value` None: not measured yet."""

    what: str
    value: float | None
    limit: float
    most: bool = False  # the limit is the most, not the least

    def __str__(self) -> str:
        limit = f"{'≤' if self.most else '≥'} {self.limit:g}"
        if self.value is None:
            return f"{NOTHING}: {self.what} {limit}"
        met = self.value <= self.limit if self.most else self.value >= self.limit
        return f"{'met' if met else 'missed'}: {self.what} {limit}: {self.value:.3g}"


class Figures:
    """The figures of a results file; of an empty one all are None."""

    def __init__(self, value: Row):
        self.machine: Row = value.get("machine", {})
        self.date: str = value.get("date", "")
        self.rows = [row for row in value.get("rows", ()) if "error" not in row]

    def all(self, what: str, **key: Any) -> list[Row]:
        return [row for row in self.rows if matches(row, {"what": what, **key})]

    def one(self, what: str, name: str, **key: Any) -> Any:
        """A value of the only row of a key."""
        return next((row[name] for row in self.all(what, **key) if name in row), None)

    def fastest(self, batch: int) -> Row | None:
        """The row of the bare engine at its fastest."""
        key = {"network": NETWORK, "precision": PRECISION, "batch": batch}
        rows = self.all("variant", **key) + self.all("step", **key)
        return min(rows, key=lambda row: row["bare_ms"]["p50"], default=None)

    def rate(self, batch: int) -> float | None:
        row = self.fastest(batch)
        return row and row["image_steps_per_s"]

    def share(self, batch: int) -> float | None:
        """Per cent of the rate of a large product that a bare step reaches."""
        gflop, peak = self.one("flops", "gflop", network=NETWORK), self.one("matmul", "tflops")
        rate = self.rate(batch)
        return gflop * rate / 10 / peak if gflop and peak and rate else None

    def loop(self, batch: int) -> float | None:
        """A trajectory over its bare steps, the worse of the two samplers."""
        rows = self.all("step", network=NETWORK, precision=PRECISION, batch=batch)
        ratios = [max(row[m]["ratio"] for m in ("ddim", "ddpm") if m in row) for row in rows]
        return min(ratios, default=None)

    def times(self, batch: int, rival: str) -> float | None:
        """How many times as long as ours a rival's call takes."""
        found = self.one("race", "times_ours", network=NETWORK, batch=batch, rival=rival)
        return found if found is None else float(found)

    def decibels(self) -> list[tuple[str, float, float]]:
        """The worst image of each trajectory to PyTorch's: its name, dB, and the least allowed."""
        return [
            (f"{row['network']} {row['precision'].upper()}, {rung['name']}", rung["figure"], rung["limit"])
            for row in self.all("verify")
            if row["variant"].startswith("cuda")
            for rung in row["rungs"]
            if rung["unit"] == "dB" and rung["figure"] is not None
        ]

    def targets(self) -> list[Target]:
        found = [Target(f"trajectory over bare engine, batch {b}", self.loop(b), 1.03, most=True) for b in BATCHES]
        for batch, least in ((1, 2.0), (64, 1.0), (256, 1.0)):
            found.append(Target(f"times as fast as torch.compile, batch {batch}", self.times(batch, RIVALS[0]), least))
        found.append(Target("times as fast as diffusers, batch 1", self.times(1, "diffusers"), 10.0))
        found.append(Target("% of the product's rate, batch 256", self.share(256), 40.0))
        return found

    def table(self) -> list[list[str]]:
        """Name, then a cell a batch."""
        lines: list[tuple[str, Callable[[int], float | None], str]] = [
            ("image steps/s of the bare engine", self.rate, "{:,.0f}"),
            ("share of an FP16 product's rate", self.share, "{:.0f} %"),
            ("a trajectory over the bare engine", self.loop, "{:.3f}"),
        ]
        for rival in RIVALS:
            lines.append((f"times as fast as {rival}", lambda b, rival=rival: self.times(b, rival), "{:.2f} ×"))
        cell = lambda value, form: NOTHING if value is None else form.format(value)  # noqa: E731
        return [[name, *(cell(of(batch), form) for batch in BATCHES)] for name, of, form in lines]

    def variants(self) -> list[list[str]]:
        """Name, then of each batch the bare step's milliseconds and DDIM's ratio to it."""
        key = {"network": NETWORK, "precision": PRECISION}
        names = dict.fromkeys(row["variant"] for row in self.all("variant", **key))
        cells = []
        for name in names:
            rows = [self.all("variant", **key, variant=name, batch=batch) for batch in BATCHES]
            found = [f"{r[0]['bare_ms']['p50']:.3g} ({r[0]['ddim']['ratio']:.3f})" if r else NOTHING for r in rows]
            cells.append([name, *found])
        return cells

    def yardsticks(self) -> str:
        """What the GPU itself does, in a sentence; "" where nothing of it was measured."""
        said = (
            ("an FP16 product of 8192 × 8192 runs at {} TFLOP/s", self.one("matmul", "tflops")),
            ("a copy at {} GB/s, read and written", self.one("copy", "gb_s")),
            ("the noise of 256 images takes {} µs", self.one("noise kernel", "us", lanes=256)),
            ("a launch takes the host {} µs", self.one("host time of a launch", "us")),
        )
        words = "; ".join(text.format(value) for text, value in said if value is not None)
        return words and f"{words[0].upper()}{words[1:]}."

    def title(self) -> str:
        if not self.machine:
            return f"**{NETWORK}, FP16, onnxruntime-cuda**: {NOTHING}."
        versions = self.machine.get("versions", {})
        told = ", ".join(f"{name} {versions[name]}" for name in PACKAGES if name in versions)
        gpu = self.machine["gpu"]
        about = f"driver {gpu['driver_version']}, " if "driver_version" in gpu else ""
        return f"**{NETWORK}, FP16, onnxruntime-cuda on {gpu['name']}** ({about}{told}; {self.date})."


def read(folder: Path) -> list[Figures]:
    """Of each GPU; of none in particular where there is no file."""
    paths = sorted(p for p in folder.glob("gpu-*.json") if not p.stem.endswith("-before"))
    return [Figures(json.loads(path.read_text())) for path in paths] or [Figures({})]


HEAD = ["", *(f"batch {batch}" for batch in BATCHES)]


def text(path: Path) -> str:
    """All of a file, for a terminal."""
    f = Figures(json.loads(path.read_text()))
    lines = [f.title(), *align("|".join(HEAD), f.table(), 1)]
    lines += align("|".join(["bare ms (trajectory over it)", *HEAD[1:]]), f.variants(), 1)
    lines += [f"{name}: {db:.1f} dB (≥ {least:g})" for name, db, least in f.decibels()]
    return "\n".join([*lines, f.yardsticks(), *map(str, f.targets())])


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---", *(len(head) - 1) * ["--:"]], *rows)]


def block(figures: list[Figures], whole: bool) -> str:
    """What stands between the markers: tables, and of a `whole` one the variants, decibels and targets too."""
    lines = []
    for f in figures:
        lines += ["", f.title(), "", *markdown(HEAD, f.table())]
        if not whole:
            continue
        if f.variants():
            lines += ["", "Milliseconds of a bare step by dialect and option, and a DDIM trajectory over it:", ""]
            lines += markdown(HEAD, f.variants())
        if f.decibels():
            lines += ["", "| worst image to PyTorch's | dB | least allowed |", "|---|--:|--:|"]
            lines += [f"| {name} | {db:.1f} | {least:g} |" for name, db, least in f.decibels()]
        lines += ["", *([f.yardsticks(), ""] if f.yardsticks() else []), "The targets:", ""]
        lines += [f"- {target}" for target in f.targets()]
    if whole and figures[0].machine:
        lines += ["", "![Steps, share of the product's rate, rivals and decibels on a GPU](gpu.png)"]
    return "\n".join([*lines, "", ""])


def put(page: Path, made: str) -> None:
    """Write what stands between a page's markers."""
    before, after = page.read_text().split(BEGIN)
    with whole_file(page) as beside:
        beside.write_text(f"{before}{BEGIN}{made}{END}{after.split(END, 1)[1]}")


def chart(f: Figures, path: Path) -> None:
    """Steps by batch, share of a product's rate, times as fast as each rival, decibels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from epsrt_command.charts import save

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{NETWORK} in FP16 on {f.machine['gpu']['name']}", x=0.01, ha="left", fontweight="bold")
    (by_batch, shares), (ratios, decibels) = figure.subplots(2, 2)
    _by_batch(by_batch, f)
    shown = {batch: f.share(batch) for batch in BATCHES}
    bars = {f"batch {b}": (s, f"{s:.0f} %") for b, s in shown.items() if s is not None}
    _bars(shares, bars, OUR_COLOUR, mark=40.0)
    shares.set_title("share of an FP16 product's rate, bare step", loc="left", fontsize="medium")
    found = {(r, b): f.times(b, r) for r in RIVALS for b in BATCHES}
    bars = {f"{r}, {b}": (t, f"{t:.2f} ×") for (r, b), t in found.items() if t is not None}
    _bars(ratios, bars, RIVAL_COLOUR, mark=1.0)
    ratios.set_title("times as fast as each rival, by batch: a whole call", loc="left", fontsize="medium")
    _bars(decibels, {name: (db, f"{db:.1f} (≥ {least:g})") for name, db, least in f.decibels()}, OUR_COLOUR)
    decibels.set_title("dB to PyTorch, worst image", loc="left", fontsize="medium")
    save(figure, path)


OUR_COLOUR, RIVAL_COLOUR = "#c8442c", "#5b7a9d"
STYLES = dict(zip((OURS, *RIVALS), ("o-", "s-", "^--", "v:", "D-."), strict=True))


def _by_batch(axes: Any, f: Figures) -> None:
    """A line a contestant, both axes logarithmic."""
    for name, style in STYLES.items():
        rates = {b: f.one("race", "image_steps_per_s", network=NETWORK, batch=b, rival=name) for b in BATCHES}
        points = [(b, rate) for b, rate in rates.items() if rate]
        if points:
            colour = OUR_COLOUR if name == OURS else None
            axes.plot(*zip(*points, strict=True), style, label=name, color=colour, linewidth=2 if colour else 1.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(BATCHES, map(str, BATCHES))
    axes.set_xlabel("batch")
    axes.set_title("image steps/s, a whole call of DDIM-50", loc="left", fontsize="medium")
    axes.grid(True, which="both", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _bars(axes: Any, values: dict[str, tuple[float, str]], colour: str, mark: float | None = None) -> None:
    """Bars with a label each, from the top; a dotted line at the mark."""
    places = range(len(values))
    axes.barh(places, [value for value, _ in values.values()], color=colour, height=0.7)
    for place, (value, label) in zip(places, values.values(), strict=True):
        axes.text(value, place, f" {label}", va="center", fontsize="small")
    axes.set_yticks(places, list(values), fontsize="small")
    axes.invert_yaxis()
    if mark is not None:
        axes.axvline(mark, color="0.3", linewidth=0.9, linestyle=(0, (2, 2)))
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def main() -> int:
    figures = read(RESULTS)
    put(ROOT / "README.md", block(figures, whole=False))
    put(ROOT / "docs/benchmarks.md", block(figures, whole=True))
    if figures[0].machine:
        chart(figures[0], ROOT / "docs/gpu.png")
    print(block(figures, whole=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
