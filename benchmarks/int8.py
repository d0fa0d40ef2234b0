"""What int8 convolutions would gain and cost: python benchmarks/int8.py

The step graph's convolutions are quantised (`quantise`), calibrated on states of real trajectories, and the graph runs
on onnxruntime and OpenVINO in the place of the FP32 one. Speed: short DDIM trajectories of ddpm-cifar10 (redrawn
weights), batch 8, in turn; `ratio` is the median over the rounds of OpenVINO's bf16 time over a variant's, so more is
faster. Fidelity: DDIM-50 against FP32 from the same noise (`ddim_50_db` of the worst, the tenth percentile and the
median image; peak = the value range), and epsrt.verify's rungs from PyTorch's golden file. Use: the trained digits,
500 samples by DDIM-50, as the demo's judge reads them. Redrawn weights are the harder case: nothing taught them to be
robust, and their trajectories magnify every error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from common import RESULTS, bundle, write
from numpy.typing import NDArray

from epsrt import Bundle, Sampler, open_engine
from epsrt.bench.report import paired_ratio
from epsrt.bench.timing import clocked, rounds
from epsrt.condition import LABEL
from epsrt.engines import Engine
from epsrt.manifest import GOLDEN, Rung
from epsrt.parity.measure import relative_l2, worst_psnr
from epsrt.verify import verify
from epsrt_export.int8 import quantise, states_of

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

# name, of quantise
VARIANTS: dict[str, dict[str, bool]] = {
    "int8": {}, "int8, first and last too": {"ends": True}, "int8, outputs in FP32": {"outputs": False},
}  # fmt: skip
# engine, precision of what is not int8
RUNS = {
    "int8": (("openvino", "bf16"), ("openvino", "fp32"), ("onnxruntime", "fp32")),
    "int8, first and last too": (("openvino", "bf16"), ("onnxruntime", "fp32")),
    "int8, outputs in FP32": (("openvino", "bf16"), ("openvino", "fp32"), ("onnxruntime", "fp32")),
    "none": (("openvino", "bf16"), ("openvino", "fp32"), ("onnxruntime", "fp32")),
}
RIVAL, TRUTH = "none on openvino bf16", "none on onnxruntime fp32"
PROVEN = ("int8 on openvino fp32", "int8 on onnxruntime fp32", RIVAL)  # by epsrt.verify
STATES = 20  # rows of DDIM
SAMPLES = {"digits": 20, "ddpm-cifar10": 4}  # trajectories to calibrate on
COMPARED = {"digits": 100, "ddpm-cifar10": 4}  # images of DDIM-50
JUDGED = 500


def in_place(source: Bundle, model: onnx.ModelProto, folder: Path) -> Bundle:
    """The bundle with a model in the place of its FP32 graph, in a folder of its own; not to be kept."""
    graph = msgspec.structs.replace(source.graph("fp32"), file="step-int8.onnx")
    data = model.SerializeToString(deterministic=True)
    (folder / graph.file).write_bytes(data)
    (folder / graph.weights).write_bytes(b"\0")  # they are in the model
    shutil.copy(source.path / GOLDEN, folder)
    digest = hashlib.sha256(data).hexdigest()  # by which OpenVINO's compiled models are kept
    return Bundle(folder, msgspec.structs.replace(source.manifest, graphs=(graph,), digest=digest, files={}))


def psnrs(images: NDArray[np.float32], truth: NDArray[np.float32], value_range: tuple[float, float]) -> list[float]:
    """dB of each of [n, C, H, W]."""
    return [worst_psnr(images[i : i + 1], truth[i : i + 1], value_range) for i in range(len(images))]


def speed(samplers: dict[str, Sampler], batch: int = 8, steps: int = 2, most: int = 5) -> list[dict[str, Any]]:
    """Milliseconds a step of short trajectories, in turn, and the ratio of the rival's time to each."""
    runs = {n: clocked(partial(s.sample, batch, method="ddim", steps=steps)) for n, s in samplers.items()}
    seconds = rounds(runs, most, warm=1)
    return [
        {
            "run": name,
            "batch": batch,
            "ms_per_step": round(1e3 * statistics.median(values) / steps, 2),
            "ratio": round(paired_ratio(seconds[RIVAL], values), 3),
        }
        for name, values in seconds.items()
    ]


def fidelity(sampler: Sampler, n: int, truth: NDArray[np.float32]) -> dict[str, Any]:
    """Of DDIM-50 against FP32's."""
    m = sampler.bundle.manifest
    images = sampler.sample(n, method="ddim", steps=50, seed=7, labels=classes(sampler.bundle, n))
    found = psnrs(images, truth, m.value_range)
    low, tenth, middle = (round(float(v), 1) for v in np.quantile(found, (0, 0.1, 0.5)))
    return {"ddim_50_db": [low, tenth, middle], "ddim_50_l2": round(relative_l2(images, truth), 4)}


def classes(of: Bundle, n: int) -> list[int] | None:
    return [i % of.manifest.classes for i in range(n)] if of.labelled else None


def rungs(engine: Engine) -> dict[str, Any]:
    """epsrt.verify's figures."""

    def figure(rung: Rung) -> Any:
        if rung.by_timestep:
            errors = [e for _, e in rung.by_timestep if e is not None]
            return {"worst": rung.figure, "where": rung.where, "median": round(statistics.median(errors), 5)}
        return rung.figure

    return {rung.name: figure(rung) for rung in verify(engine)}


def quantised(source: Bundle, name: str, samples: int, folder: Path) -> dict[str, Bundle]:
    """The bundle in each variant, and as it is: "none"."""
    with open_engine(source, "onnxruntime", precision="fp32") as engine:
        labels = classes(source, samples)
        given = [{LABEL: np.asarray(label)} for label in labels] if labels else [{}] * samples
        states = states_of(engine, source.plan("ddim", STATES), given, seed=1000)
    graph, made = source.path / engine.graph.file, {"none": source}
    for variant, more in VARIANTS.items():
        if more.get("ends") and name != "digits":
            continue  # neither faster nor nearer
        place = folder / f"{name}-{variant}"
        place.mkdir()
        made[variant] = in_place(source, quantise(graph, states, **more), place)
        sizes = [(place / "step-int8.onnx").stat().st_size, (source.path / engine.graph.weights).stat().st_size]
        print(f"{name}: {variant}, {sizes[0] / 1e6:.1f} MB for {sizes[1] / 1e6:.1f}", flush=True)
    return made


def measure(name: str, source: Bundle, folder: Path) -> Iterator[dict[str, Any]]:
    """A network's rows, as they come."""
    made = quantised(source, name, SAMPLES[name], folder)
    timed = name == "ddpm-cifar10"
    with ExitStack() as stack:
        samplers = {
            f"{variant} on {engine} {precision}": stack.enter_context(
                Sampler(stack.enter_context(open_engine(made[variant], engine, precision=precision)))
            )
            for variant in made
            for engine, precision in RUNS[variant]
        }
        for row in speed(samplers) if timed else []:
            yield {"network": name, **row}
        n = COMPARED[name]
        truth = samplers[TRUTH].sample(n, method="ddim", steps=50, seed=7, labels=classes(source, n))
        for run, sampler in samplers.items():
            if run.startswith("none") and run != RIVAL:
                continue
            row = {"network": name, "run": run, **fidelity(sampler, n, truth)}
            if run in PROVEN:
                row["rungs"] = rungs(sampler.engine)
            if not timed:
                row["read_as_asked"] = judged(sampler)
            yield row


def judged(sampler: Sampler) -> float:
    from digits import accuracy, judge

    samples = sampler.sample(JUDGED, method="ddim", steps=50, seed=1, labels=classes(sampler.bundle, JUDGED))
    return round(float(accuracy(judge()[0], sampler.to_images(samples))), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SAMPLES), help="one network; the other's rows are kept")
    only = parser.parse_args().only
    file, rows = RESULTS / "int8.json", list[dict[str, Any]]()
    if only and file.exists():
        rows = [row for row in json.loads(file.read_bytes())["rows"] if row["network"] != only]
    with tempfile.TemporaryDirectory() as folder:
        for name in SAMPLES:
            if only in (None, name):
                source = Bundle.open("out/digits.epsrt") if name == "digits" else bundle(name)
                for row in measure(name, source, Path(folder)):
                    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                    rows.append(row)
    print(write("int8", rows))


if __name__ == "__main__":
    main()
