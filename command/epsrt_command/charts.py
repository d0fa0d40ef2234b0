"""Figures as files, .png or .svg. The one module that imports matplotlib, without pyplot and its global state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from epsrt.errors import InputError
from epsrt.files import whole_file
from epsrt.schedule import Schedule
from epsrt_command.foreign import needs
from epsrt_command.pictures import check_writable

with needs("a chart", "charts"):
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")


def check_target(path: Path) -> None:
    """Refuse, before any work is done, what could not be written after it."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"--out {path}: the suffix of a chart must be {' or '.join(SUFFIXES)}")
    check_writable(path)


def new_figure(title: str, x: str, y: str, width: float = 8.0, height: float = 4.5) -> tuple[Figure, Axes]:
    """A figure of width × height inches with one pair of axes, labelled, gridded."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write by suffix, whole or not at all; the same figure gives the same bytes."""
    check_target(path)
    kind = path.suffix.lower()[1:]
    with whole_file(path) as beside, rc_context({"svg.hashsalt": "epsrt"}):
        figure.savefig(beside, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)


def bound(t: ArrayLike, mean: ArrayLike, error: ArrayLike, prior: float, title: str) -> Figure:
    """The bound's terms over t, both axes logarithmic; t, mean and error [K] as Bound has them, bits/dim."""
    t, mean, error = (np.asarray(a, np.float64) for a in (t, mean, error))
    figure, axes = new_figure(title, "t", "bits/dim")
    axes.plot(t[1:], mean[1:], color="C0", marker="." if len(t) <= 100 else None, label="L$_{t−1}$, t ≥ 1")
    axes.fill_between(t[1:], mean[1:] - error[1:], mean[1:] + error[1:], color="C0", alpha=0.25, linewidth=0)
    axes.plot(t[:1], mean[:1], "o", color="C1", label=f"L$_0$ = {mean[0]:.2g}, t = 0")
    axes.plot(t[-1:], [prior], "s", color="C2", label=f"L$_T$ = {prior:.2g}")
    axes.set_xscale("symlog", linthresh=1)  # 0 has its place left of 1
    axes.set_xlim(-0.2, t[-1] * 1.2 + 0.2)
    axes.set_yscale("log", nonpositive="mask")
    top = max(float(mean.max()), prior)
    axes.set_ylim(bottom=max(axes.get_ylim()[0], top * 1e-9))  # an L_0 of 1e-80 is not worth eighty decades
    axes.legend(frameon=False)
    return figure


def plan(schedule: Schedule, t: ArrayLike, title: str) -> Figure:
    """A schedule and the timesteps [S] of it that a plan visits: ᾱ (else α and σ) and λ = ln(α/σ) over t."""
    t = np.asarray(t, np.float64)
    every = np.linspace(*schedule.span, min(schedule.T, 2000)).round()
    figure, axes = new_figure(title, "t", "ᾱ" if schedule.preserves_variance else "α, σ")
    below = axes.twinx()
    for at, style, label in ((every, "-", True), (t, ".", False)):
        alpha, sigma = schedule.at(at)
        if schedule.preserves_variance:
            axes.plot(at, alpha**2, f"C0{style}", label="ᾱ" if label else None)
        else:
            axes.plot(at, alpha, f"C0{style}", label="α" if label else None)
            axes.plot(at, sigma, f"C2{style}", label="σ" if label else None)
        with np.errstate(divide="ignore"):
            below.plot(at, np.log(alpha / sigma), f"C1{style}", label="λ (right)" if label else None)
    if schedule.kind == "ve":
        axes.set_yscale("log")
    chosen = np.unique(t.round(6))  # some rows share one
    axes.vlines(
        chosen, 0, 0.03, transform=axes.get_xaxis_transform(), color="0.3", linewidth=0.8, label=f"{len(chosen)} chosen"
    )
    below.set_ylabel("λ")
    below.spines[["top", "left"]].set_visible(False)
    both = zip(axes.get_legend_handles_labels(), below.get_legend_handles_labels(), strict=True)
    figure.legend(*(left + right for left, right in both), loc="outside lower center", ncols=4, frameon=False)
    return figure
