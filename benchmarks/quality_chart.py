"""docs/quality.png: distance by steps, for both spacings, and the paper's curves beside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from quality_paper import CLIPPED, NAMES, SAMPLERS, STEPS, TABLE_1, Row, find

from epsrt_command.charts import new_figure, save

SPACINGS = {"trailing": "even (trailing) spacing", "quadratic": "quadratic spacing"}
FLOOR = "2000 drawn from the real digits with replacement"


def draw_chart(rows: Sequence[Row], path: Path) -> None:
    """Of what there is: points that are not measured yet are left out. 2,000 samples a point, so that all compare."""
    figure, first = new_figure("", "", "", width=12.5, height=4.4)
    first.remove()
    panels = figure.subplots(1, 3)
    for axes, (spacing, words) in zip(panels, SPACINGS.items(), strict=False):
        _dress(axes, f"Digits, {words}", "Fréchet distance of 2,000 samples")
        for i, sampler in enumerate(SAMPLERS):
            _curve(axes, rows, sampler, spacing, 1.025 ** (i - 2), color=f"C{i}")
        for i, sampler in enumerate(CLIPPED):
            _curve(axes, rows, sampler, spacing, 1.025 ** (3 + i), color=("0.2", "0.55")[i], linestyle=":")
        _floor(axes, rows)
    _dress(panels[2], "CIFAR-10, DDIM's table 1, quadratic spacing", "FID of 50,000 samples")
    for i, sampler in enumerate(SAMPLERS):
        panels[2].plot(STEPS, TABLE_1[sampler], f"C{i}o-", markersize=4, label=NAMES[sampler])
    ours = [axes.get_ylim() for axes in panels[:2]]
    for axes in panels[:2]:
        axes.set_ylim(min(low for low, _ in ours), max(high for _, high in ours))
    known = dict(zip(*reversed(panels[2].get_legend_handles_labels()), strict=True))
    found = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True)) | known
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=7, frameon=False, fontsize="small")
    save(figure, path)


def _curve(axes: Axes, rows: Sequence[Row], sampler: str, spacing: str, aside: float, **look: Any) -> None:
    """`aside` moves it by a factor in steps, so that intervals do not hide each other."""
    few = [find(rows, sampler, spacing, steps) for steps in STEPS[:-1]]
    full = find(rows, sampler, "all", 1000) if spacing == "trailing" or any(few) else None
    there = [row for row in (*few, full) if row is not None]
    if not there:
        return
    figures = [row["first"]["frechet"] for row in there]
    error = [[f["value"] - f["low"] for f in figures], [f["high"] - f["value"] for f in figures]]
    more: dict[str, Any] = {"marker": "o", "markersize": 4, "capsize": 2, "linewidth": 1.5, "elinewidth": 0.8}
    steps = [aside * row["steps"] for row in there]
    axes.errorbar(steps, [f["value"] for f in figures], error, label=NAMES[sampler], **{**more, **look})


def _floor(axes: Axes, rows: Sequence[Row]) -> None:
    row = next((row for row in rows if row["name"] == FLOOR), None)
    if row is None:
        return
    value = row["frechet"]["value"]
    axes.axhline(value, color="0.5", linestyle="--", linewidth=1)
    axes.annotate(
        "2,000 drawn from the real digits",
        (0.99, value),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize="x-small",
        color="0.35",
    )


def _dress(axes: Axes, title: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize="small")
    axes.set(xscale="log", yscale="log", xlim=(8, 1250))
    axes.set_xlabel("steps", fontsize="small")
    axes.set_ylabel(y, fontsize="small")
    axes.tick_params(labelsize="small")
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(FixedLocator(STEPS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda steps, _: f"{steps:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
