"""What guidance and masks cost a step: python benchmarks/guided.py

ddpm-cifar10 by class with a null label, FP32 on onnxruntime. A guided step runs the network on twice the rows, so it
is held against a plain step at twice the batch (limit 1.05); a masked step against a plain one (limit 1.03). Rivals in
turn. The weights are random and no gate is run: the time of a step does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from common import ungated, write

from epsrt import Lanes, Plan, Sample, open_engine
from epsrt.bench.report import paired_ratio
from epsrt.bench.timing import clocked, rounds

if TYPE_CHECKING:
    from epsrt_export.source import Source

PRESET, BATCH, STEPS = "ddpm-cifar10", 8, 4
# name, features, batch, method, weight of guidance
RUNS = (
    ("plain", (), BATCH, "ddim"), ("plain, twice the batch", (), 2 * BATCH, "ddim"),
    ("guided", ("guidance",), BATCH, "ddim"), ("masked", ("mask",), BATCH, "ddim"),
    ("plain, ddpm", (), BATCH, "ddpm"), ("masked, ddpm", ("mask",), BATCH, "ddpm"),
)  # fmt: skip
PAIRS = (
    ("guided", "plain, twice the batch", 1.05), ("masked", "plain", 1.03), ("masked, ddpm", "plain, ddpm", 1.03),
)  # fmt: skip


def source() -> Source:
    """The network by class, with what starts at zero drawn."""
    from epsrt_export.source import Source
    from epsrt_trainer.networks import build
    from epsrt_trainer.presets import PRESETS

    config = replace(PRESETS[PRESET].network, classes=10, null_label=True)
    shape = (config.image_channels, config.image_size, config.image_size)
    network = build(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return Source(network, PRESETS[PRESET].schedule, shape, classes=10, null_label=10)


def begin(lanes: Lanes, masked: bool, shape: tuple[int, ...]) -> None:
    known = np.zeros(shape, np.float32)
    half = np.zeros(shape, np.float32)
    half[:, : shape[1] // 2] = 1
    for i in range(lanes.batch):
        more = {"known": known, "mask": half} if masked else {}
        lanes.write(i, Sample(seed=0, index=i, conditions={"label": i % 10}, **more))


def rows_of(plan: Plan, columns: tuple[str, ...], batch: int) -> np.ndarray:
    rows = np.repeat(plan.rows(columns)[:, None], batch, 1)
    if "w" in columns:
        rows[:, :, columns.index("w")] = 2.0
    return rows


def run(lanes: Lanes, rows: np.ndarray) -> None:
    lanes.advance(rows)
    lanes.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    most = parser.parse_args().rounds
    bundle, runs = ungated("guided", source, ((), ("guidance",), ("mask",))), {}
    with ExitStack() as stack:
        plain = stack.enter_context(open_engine(bundle, "onnxruntime"))
        engines = {
            features: stack.enter_context(plain.on(bundle.graph("fp32", features)))
            for features in dict.fromkeys(features for _, features, *_ in RUNS)
        }
        for name, features, batch, method in RUNS:
            engine = engines[features]
            lanes = stack.enter_context(engine.lanes(batch))
            begin(lanes, "mask" in features, bundle.manifest.shape)
            runs[name] = clocked(partial(run, lanes, rows_of(bundle.plan(method, STEPS), engine.columns, batch)))
        seconds = rounds(runs, most, warm=1)
    results = [
        {"run": name, "batch": batch, "ms_per_step": round(1e3 * statistics.median(seconds[name]) / STEPS, 2)}
        for name, _, batch, _ in RUNS
    ]
    for name, rival, limit in PAIRS:
        ratio = paired_ratio(seconds[name], seconds[rival])
        results.append({"ratio": f"{name} / {rival}", "median": round(ratio, 4), "limit": limit})
    for row in results:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    print(write("guided", results))


if __name__ == "__main__":
    main()
