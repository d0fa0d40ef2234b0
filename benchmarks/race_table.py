"""What the race's rows say: a table, the targets with pass or miss, the chart."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import align
from race_rivals import AUTO, BY_NAME, CONTESTANTS

from epsrt.bench.others import BUSY
from epsrt_command.charts import save

Row = dict[str, Any]
PYTORCH = ("torch", "inductor")
FASTER_THAN_PYTORCH = {1: 2.5, 8: 1.4, 32: 1.4}  # of ddpm-cifar10, by batch
FASTER_THAN_DIFFUSERS = {"ddpm-cifar10": {1: 5.0, 8: 5.0, 32: 5.0}, "digits": {1: 4.0}}
NOT_SLOWER = 0.98  # than the plain loop over the same library in the same precision
LOOPS_SHARE = 0.10
MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Verdict:
    """A figure beside its target, in words; `value` None: not measured."""

    what: str
    value: float | None
    target: float
    most: bool = False  # the target is the most, not the least

    @property
    def passed(self) -> bool:
        return self.value is not None and (self.value <= self.target if self.most else self.value >= self.target)

    def __str__(self) -> str:
        said = "not measured" if self.value is None else f"{self.value:.3g}"
        target = f"{'≤' if self.most else '≥'} {self.target:g}"
        return f"{'pass' if self.passed else 'MISS'}  {self.what}: {said} (target {target})"


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """Of all rows, those of a case that failed too."""
    found: list[Verdict] = []
    rows = list(rows)
    for row in rows:
        if row["what"] == "race":
            found += _of_race(row)
        elif row["what"] == "share":
            for method, one in row.get("methods", {"ddim": {}, "ddpm": {}}).items():
                what = f"{row['network']}, batch {row['batch']}: the loop's own share of a step, {method}"
                found.append(Verdict(what, one.get("share"), LOOPS_SHARE, most=True))
    found += _of_memory([row for row in rows if row["what"] == "process"])
    return found


def _of_race(row: Row) -> list[Verdict]:
    network, batch, all_of = row["network"], row["batch"], row.get("contestants", {})
    about, found = f"{network}, batch {batch}: {row.get('best', AUTO)} times as fast as", []
    if network == "ddpm-cifar10" and batch in FASTER_THAN_PYTORCH:
        torch = [(one["ms"], name) for name, one in all_of.items() if one["library"] in PYTORCH]
        name = min(torch)[1] if torch else None
        what = f"{about} the fastest PyTorch" + (f", {name}" if name else "")
        found.append(Verdict(what, all_of[name]["times"] if name else None, FASTER_THAN_PYTORCH[batch]))
    target = FASTER_THAN_DIFFUSERS.get(network, {}).get(batch)
    if target is not None:
        found.append(Verdict(f"{about} diffusers", all_of.get("diffusers", {}).get("times"), target))
    if network == "ddpm-cifar10":
        for name, contestant in BY_NAME.items():
            if name.endswith(("loop", "loop fp32")) and not contestant.ours:
                one = all_of.get(name, {})
                what = f"{network}, batch {batch}: {one.get('like', 'ours')} times as fast as {name}"
                found.append(Verdict(what, one.get("times_like"), NOT_SLOWER))
    return found


def _of_memory(rows: list[Row]) -> list[Verdict]:
    found = []
    peaks = {(r["network"], r["contestant"]): r.get("peak_mib") for r in rows}
    for (network, name), peak in peaks.items():
        rival = peaks.get((network, "diffusers"))
        if BY_NAME[name].ours:
            value = peak / rival if peak and rival else None
            found.append(Verdict(f"{network}: peak memory of {name} over diffusers'", value, MEMORY_SHARE, most=True))
    return found


def table(rows: list[Row]) -> str:
    """Races, then processes, then verdicts."""
    lines: list[str] = []
    for row in rows:
        if row["what"] != "race":
            continue
        title = f"{row['network']}, batch {row['batch']}"
        if "error" in row:
            lines += ["", f"{title}: {row['error']}"]
            continue
        about = (
            f"{row['rounds']} rounds of {row['steps']} steps; ours at best is {row['best']}; PSNR to {row['reference']}"
        )
        lines += ["", f"{title}: {about}"]
        if (row.get("others_share") or 0) > BUSY:
            lines.append(f"INVALID: other processes took {100 * row['others_share']:.0f} % of the cores: race again")
        cells = [
            [
                name,
                f"{one['library']} {one['precision']}",
                f"{one['ms']:.2f}",
                f"{one['alone_ms']:.2f}",
                f"{1e3 * row['batch'] / one['ms']:.1f}",
                f"{one['times']:.2f}",
                f"{one['times_like']:.3f}" if "times_like" in one else "",
                f"{one.get('psnr', '')}",
                f"{one['first_s']:.1f} s",
            ]
            for name, one in row["contestants"].items()
        ]
        head = "contestant|runs|ms a step|alone|image steps/s|times the best of ours|times its like|dB|its first call"
        lines += align(head, cells, 2) + [f"{name}: {why}" for name, why in row["refused"].items()]
    lines += _processes([row for row in rows if row["what"] == "process"])
    for row in rows:
        if row["what"] == "share":
            lines += ["", f"{row['network']}, batch {row['batch']}: {row.get('error', '')}".rstrip(": ")]
            lines[-1] += f", {row.get('engine', '')} {row.get('precision', '')}"
            for method, one in row.get("methods", {}).items():
                lines.append(
                    f"{method}: {1e3 * one['bare_ms']:.0f} µs the engine, {1e3 * one['sampler_ms']:.0f} µs a step of "
                    f"Sampler: {100 * one['share']:.1f} % its own"
                )
    return "\n".join([*lines, "", *map(str, verdicts(rows))]).strip()


def _processes(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    cells = [
        [
            r["network"],
            r["contestant"],
            f"{r['batch']} × {r['steps']}",
            f"{r['start_s']:.2f} s" if "start_s" in r else "",
            f"{r['peak_mib']:.0f}" if "peak_mib" in r else "",
            r.get("error", ""),
        ]
        for r in rows
    ]
    return ["", *align("a process of its own|contestant|images × steps|start to images|peak MiB|", cells, 2)]


def chart(rows: list[Row], path: Path) -> None:
    """How many times as long as ours each rival takes: bars, a row of panels a network, a panel a batch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    races = [row for row in rows if row["what"] == "race" and row.get("contestants")]
    networks = list(dict.fromkeys(row["network"] for row in races))
    batches = sorted({row["batch"] for row in races})
    figure = Figure(figsize=(3.4 * len(batches) + 1.4, 2.9 * len(networks) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    title = "How many times as long as ours a step takes on a CPU: shorter bars are faster"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    panels = figure.subplots(len(networks), len(batches), squeeze=False, sharex="row", sharey="row")
    for line, network in zip(panels, networks, strict=True):
        of_network = {row["batch"]: row for row in races if row["network"] == network}
        all_of = [row["contestants"] for row in of_network.values()]
        times = {name: [of[name]["times"] for of in all_of if name in of] for name in RIVALS}
        slowest = sorted((-statistics.mean(found), name) for name, found in times.items() if found)
        names = [name for _, name in slowest]
        for axes, batch in zip(line, batches, strict=True):
            _bars(axes, of_network.get(batch), names)
            axes.set_title(f"{network}, batch {batch}", loc="left", fontsize="medium")
    save(figure, path)


RIVALS = tuple(c.name for c in CONTESTANTS if not c.ours)
OURS, BF16, FP32 = "#c8442c", "#5b7a9d", "#b4c3d4"  # a bar of ours; of a rival by its precision


def _bars(axes: Any, row: Row | None, rivals: list[str]) -> None:
    """From the top: ours at its best, then the rivals."""
    of = row["contestants"] if row else {}
    bars = [(_label(name, of.get(name)), of[name]["times"] if name in of else 0.0) for name in rivals]
    colours = [BF16 if of.get(name, {}).get("precision") == "bf16" else FP32 for name in rivals]
    if row:
        bars.append((_label(AUTO, of[row["best"]]), 1.0))
        colours.append(OURS)
    widths = [times for _, times in bars]
    axes.barh(range(len(bars)), widths, color=colours, height=0.72)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize="small")
    for place, times in enumerate(widths):
        if times:
            weight = "bold" if place == len(rivals) else "normal"
            axes.text(times, place, f" {times:.2f}", va="center", fontsize="small", fontweight=weight)
    if row:
        axes.axvline(1, color=OURS, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
        for label in axes.get_yticklabels()[-1:]:  # of the first panel; the others share them
            label.set_fontweight("bold")
        axes.set_xlabel(f"epsrt: {of[row['best']]['ms']:.3g} ms a step\n", fontsize="small", loc="left")
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _label(name: str, one: Row | None) -> str:
    """A rival with its precision."""
    return name if one is None or name.endswith(one["precision"]) else f"{name} {one['precision']}"
