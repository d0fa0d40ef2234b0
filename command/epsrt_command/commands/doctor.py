"""epsrt doctor: what this machine has, which engines run on it, and what the others lack."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from epsrt import machine
from epsrt_command import show

if TYPE_CHECKING:
    from epsrt.bundle import Bundle
    from epsrt.engines.probe import EngineInfo

EXAMPLES = """\
epsrt doctor
epsrt doctor out/digits.epsrt
epsrt doctor --json | jq -r .auto
"""

PACKAGES = (*machine.PACKAGES, "nvidia-cuda-nvrtc", "filelock", "torch")


def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="A bundle: show also what each engine would take of it.")
    ] = None,
    as_json: show.JsonOption = False,
) -> None:
    """Show this machine, which engines run on it, what the others lack and how to get it. Loads no engine."""
    from epsrt.bundle import Bundle

    report = examine(None if bundle is None else Bundle.open(bundle))
    if as_json:
        show.print_json(report)
        return
    console = show.out()
    for table in (_machine(report), _engines(report), _packages(report), _bundle(report)):
        if table is not None:
            console.print(table, "")
    for line in (*_advice(report), _verdict(report)):
        console.print(line, soft_wrap=True)  # a command is copied whole


def examine(bundle: Bundle | None = None) -> dict[str, Any]:
    """All that doctor says; what it prints with --json."""
    from epsrt.engines import graph_precision_of, probe

    driver, engines, here = probe.driver(), [], machine.describe(("epsrt", *PACKAGES), with_gpu=False)
    graphs = {g.precision: bundle.graph(g.precision).file for g in bundle.manifest.graphs} if bundle else {}
    for info in probe.ENGINES:
        state = probe.state(info.name)
        engines.append(
            {
                "engine": info.name,
                "device": info.device,
                "available": state.available,
                "library": state.library,
                "reason": state.reason,
                "command": state.command,
                "builds": state.builds,
                "precision": next((p for p in _defaults(info) if graph_precision_of(p) in graphs), None),
            }
        )
    takes = {e["engine"]: bundle is None or e["precision"] for e in engines}
    runnable = [name for name in probe.available() if takes[name]]
    return {
        "machine": {
            "processor": here["processor"],
            "cores": here["cores"],
            "instructions": [name for name in machine.INSTRUCTIONS if here[name]],
            "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "cuda": ".".join(map(str, driver.version)) if driver.version else None,
            "problem": driver.problem,
            "fault": driver.fault,
            "command": driver.command,
            "gpus": [{"index": g.index, "name": g.name, "arch": g.arch, "memory": g.memory} for g in driver.gpus],
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES"),
        },
        "engines": engines,
        "packages": {name: here["versions"].get(name) for name in ("epsrt", *PACKAGES)},
        "bundle": bundle and {"path": str(bundle.path), "digest": bundle.manifest.digest, "graphs": graphs},
        "auto": runnable[0] if runnable else None,
    }


def _defaults(info: EngineInfo) -> tuple[str, ...]:
    """In which precisions an engine runs unasked, the first that it can."""
    if info.device == "cuda":
        return info.precisions
    return tuple(p for p in info.precisions if p in ("fp32", "fp16") or (p == "bf16" and machine.has_bf16()))


def _machine(report: dict[str, Any]) -> Table:
    m, table = report["machine"], _table("Machine", "", "")
    table.add_row("processor", ", ".join([m["processor"], f"{m['cores']} cores", *m["instructions"]]))
    table.add_row("system", m["system"])
    table.add_row("driver", m["problem"] or f"supports CUDA {m['cuda']}")
    for gpu in m["gpus"]:
        table.add_row(f"GPU {gpu['index']}", f"{gpu['name']}, {gpu['arch']}, {show.size(gpu['memory'])}")
    if m["CUDA_VISIBLE_DEVICES"] is not None:
        table.add_row("CUDA_VISIBLE_DEVICES", f'"{m["CUDA_VISIBLE_DEVICES"]}"')
    return table


def _engines(report: dict[str, Any]) -> Table:
    table, fault = _table("Engines", "engine", "state", ""), report["machine"]["fault"]
    for e in report["engines"]:
        reason = e["reason"]
        if fault and reason.startswith(fault):  # the driver's row has it in full
            reason = "no GPU to use (see driver)" + reason.removeprefix(fault)
        state = Text("ready", "green") if e["available"] else Text("unavailable", "yellow")
        table.add_row(e["engine"], state, "\n".join(filter(None, (e["library"], reason))))
    return table


def _advice(report: dict[str, Any]) -> list[str]:
    """A line for each engine that can be had here, the driver's part once."""
    lines, driver = [], report["machine"]["command"]
    if driver:
        lines.append(f"for the GPU engines: {driver}")
    for e in report["engines"]:
        command = e["command"].removeprefix(driver).removeprefix(", then ")
        if command:
            lines.append(f"for {e['engine']}: {command}")
        if e["builds"]:
            path = report["bundle"]["path"] if report["bundle"] else "BUNDLE"
            lines.append(
                f"{e['engine']} builds ahead of time here: epsrt build {path} --engine {e['engine']} --target sm89"
            )
    return [*lines, ""] if lines else []


def _packages(report: dict[str, Any]) -> Table:
    table = _table("Packages", "package", "version")
    for name, version in report["packages"].items():
        if version:
            table.add_row(name, version)
    return table


def _bundle(report: dict[str, Any]) -> Table | None:
    if report["bundle"] is None:
        return None
    graphs, table = report["bundle"]["graphs"], _table(report["bundle"]["path"], "engine", "takes", "graph")
    for e in report["engines"]:
        precision = e["precision"]
        if precision is None:
            graph = "none: the bundle has no fp32 graph"
        elif precision == (slower := "fp32" if e["device"] == "cuda" else "fp16"):
            other = "fp16" if slower == "fp32" else "fp32"
            graph = f"{graphs[precision]}: the bundle has no {other} graph, which would be faster"
        elif precision == "bf16":
            graph = f"{graphs['fp32']}: in bf16 where its golden file proves it, else in fp32"
        else:
            graph = graphs[precision]
        table.add_row(e["engine"], precision or "nothing", graph)
    return table


def _verdict(report: dict[str, Any]) -> str:
    name = report["auto"]
    if name is None:
        return "auto finds no engine that runs here"
    if report["bundle"] is None:
        return f"auto takes {name}"
    precision = next(e["precision"] for e in report["engines"] if e["engine"] == name)
    return f"auto takes {name} and {precision} for {report['bundle']['path']}"


def _table(title: str, *columns: str) -> Table:
    table = show.table(title, *columns)
    for column in table.columns[:-1]:
        column.no_wrap = True
    return table
