"""What a step of Sampler costs over a bare session.run of the same graph: python benchmarks/overhead.py

The bare run gets the same inputs each time and throws its outputs away; the sampler's share is its plan, its noise, its
NaN check and its lanes. Both on the same onnxruntime session, in turn.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import numpy as np
from common import bundle, write

from epsrt import Sampler, open_engine
from epsrt.bench.report import paired_ratio
from epsrt.bench.timing import clocked, rounds
from epsrt.engines.cpu.onnxruntime import OnnxRuntimeCpu

# preset, batch, steps a run, rounds
CASES = (("digits", 1, 250, 15), ("digits", 64, 50, 15), ("ddpm-cifar10", 8, 5, 9))


def measure(preset: str, batch: int, steps: int, most: int) -> list[dict[str, object]]:
    opened = bundle(preset)
    shape = (batch, *opened.manifest.shape)
    image = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    rows = []
    with open_engine(opened, "onnxruntime") as engine, Sampler(engine) as sampler:
        assert isinstance(engine, OnnxRuntimeCpu)
        for method in ("ddim", "ddpm"):
            plan = sampler.plan(method, steps)
            feeds = {
                "x": image,
                "m": image,
                "z": image,
                "rows": np.repeat(plan.rows(engine.columns)[:1], batch, axis=0),
            }
            if opened.labelled:
                feeds["label"] = np.zeros(batch, np.int64)

            def bare(feeds: dict[str, np.ndarray] = feeds) -> None:
                for _ in range(steps):
                    engine.session.run(None, feeds)

            labels = 0 if opened.labelled else None
            whole = partial(sampler.sample, batch, plan=plan, labels=labels)
            seconds = rounds({"bare": clocked(bare), "sampler": clocked(whole)}, most, warm=1)
            ms = {name: 1e3 * statistics.median(values) / steps for name, values in seconds.items()}
            more = (
                1e6 * statistics.median(s - b for s, b in zip(seconds["sampler"], seconds["bare"], strict=True)) / steps
            )
            ratio = paired_ratio(seconds["sampler"], seconds["bare"])
            rows.append(
                {
                    "network": preset,
                    "batch": batch,
                    "method": method,
                    "bare_ms": round(ms["bare"], 4),
                    "sampler_ms": round(ms["sampler"], 4),
                    "ratio": round(ratio, 4),
                    "extra_us": round(more, 1),
                }
            )
            print(
                f"{preset:13} batch {batch:2} {method}: bare {ms['bare']:8.3f} ms/step, "
                f"sampler {ms['sampler']:8.3f}, ratio {ratio:.3f}, {more:+.0f} µs"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one network")
    only = parser.parse_args().only
    rows = [row for case in CASES if only in (None, case[0]) for row in measure(*case)]
    if only is None:
        print(write("overhead", rows))


if __name__ == "__main__":
    main()
