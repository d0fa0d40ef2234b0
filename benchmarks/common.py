"""What every benchmark shares: the machine in words, medians, networks to run, results as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from epsrt import Bundle
from epsrt.errors import BundleError
from epsrt.files import whole_file

RESULTS = Path(__file__).parent / "results"
CACHE = Path("out/bench")
PACKAGES = ("epsrt", "numpy", "onnxruntime", "torch", "diffusers")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and versions: what a reader needs to place a number."""
    cpu, flags = platform.processor(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        cpu, flags = fields.get("model name", cpu), fields.get("flags", "")
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "amx": "amx_tile" in flags, "avx512_bf16": "avx512_bf16" in flags,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(), "versions": versions,
    }  # fmt: skip


def alternate(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, `rounds` times in turn after one warm-up each: what drifts, drifts for all."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def median_ratio(a: list[float], b: list[float]) -> float:
    """Median over the rounds of a/b: neighbours in time share the machine's mood."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """benchmarks/results/NAME.json, with the machine and the day."""
    path = RESULTS / f"{name}.json"
    with whole_file(path) as beside:
        value = {"benchmark": name, "date": time.strftime("%Y-%m-%d"), "machine": machine(), "rows": rows}
        beside.write_text(json.dumps(value, indent=1) + "\n")
    return path


def bundle(preset: str) -> Bundle:
    """The preset's network with redrawn weights as a bundle, exported once and kept in out/bench/."""
    path = CACHE / f"{preset}.epsrt"
    try:
        return Bundle.open(path)
    except BundleError:
        pass
    from epsrt_export import export_network
    from epsrt_export.redraw import redraw
    from epsrt_trainer.networks import build
    from epsrt_trainer.presets import PRESETS

    p = PRESETS[preset]
    shape = (p.network.image_channels, p.network.image_size, p.network.image_size)
    print(f"exporting {preset} to {path} (once)", flush=True)
    return export_network(
        redraw(build(p.network), p.schedule, shape, p.network.classes), p.schedule, path, shape=shape,
        classes=p.network.classes, null_label=p.network.classes if p.network.null_label else None, precisions=("fp32",),
    )  # fmt: skip
