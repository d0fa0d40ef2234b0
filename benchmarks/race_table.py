"""What the race's rows say: a table, the targets with pass or miss, the chart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_cases import align
from race_rivals import AUTO, BY_NAME

from epsrt_command.charts import save

Row = dict[str, Any]
PYTORCH = ("torch", "inductor")
FASTER_THAN_PYTORCH = {1: 2.5, 8: 1.4, 32: 1.4}  # of ddpm-cifar10, by batch
FASTER_THAN_DIFFUSERS = {"ddpm-cifar10": {1: 5.0, 8: 5.0, 32: 5.0}, "digits": {1: 4.0}}
NOT_SLOWER = 0.98  # than the plain loop over the same library in the same precision
LOOPS_SHARE = 0.10
MEMORY_SHARE = 0.5
BUSY = 0.05  # of the cores, for other processes: above it the rows are not to be trusted


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
        if row.get("others_share", 0) > BUSY:
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
    """Image steps a second by batch, one line a contestant, one panel a network. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    races = [row for row in rows if row["what"] == "race" and "contestants" in row]
    networks = list(dict.fromkeys(row["network"] for row in races))
    figure = Figure(figsize=(5.5 * max(len(networks), 1), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, network in zip(figure.subplots(1, max(len(networks), 1), squeeze=False)[0], networks, strict=False):
        of_network = sorted((r for r in races if r["network"] == network), key=lambda r: r["batch"])
        batches = [r["batch"] for r in of_network]
        for name in BY_NAME:
            points = [(r["batch"], r["contestants"][name]) for r in of_network if name in r["contestants"]]
            if points:
                speeds = [1e3 * batch / one["ms"] for batch, one in points]
                axes.plot([batch for batch, _ in points], speeds, label=_label(name, points), **STYLES[name])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_xticks(batches, [str(b) for b in batches])
        axes.set_title(network, loc="left", fontsize="medium")
        axes.set_xlabel("batch")
        axes.set_ylabel("image steps a second")
        axes.grid(True, which="both", color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    named: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        figure.legend(
            named.values(), named.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize="small"
        )
    save(figure, path)


def _label(name: str, points: list[tuple[int, Row]]) -> str:
    """With what a contestant chose itself."""
    if name not in (AUTO, "OpenVINO loop"):
        return name
    one = points[0][1]
    return f"{name} ({one['library']} {one['precision']})" if name == AUTO else f"{name} {one['precision']}"


# ours are solid, and those over the same library share a colour; dashes are FP32 of what has bf16 too
STYLES: dict[str, Row] = {
    AUTO: {"color": "C3", "marker": "o", "linewidth": 2.5},
    "epsrt openvino bf16": {"color": "C3", "marker": "o"},
    "epsrt openvino fp32": {"color": "C1", "marker": "o"},
    "epsrt onnxruntime fp32": {"color": "C0", "marker": "o"},
    "OpenVINO loop": {"color": "C3", "marker": "x", "linestyle": ":"},
    "OpenVINO loop fp32": {"color": "C1", "marker": "x", "linestyle": ":"},
    "onnxruntime loop": {"color": "C0", "marker": "x", "linestyle": ":"},
    "PyTorch fp32": {"color": "C2", "marker": "s", "linestyle": "--"},
    "PyTorch bf16": {"color": "C2", "marker": "s"},
    "torch.compile fp32": {"color": "C4", "marker": "^", "linestyle": "--"},
    "torch.compile bf16": {"color": "C4", "marker": "^"},
    "diffusers": {"color": "0.3", "marker": "D"},
}
