"""An engine in NumPy, of a bundle that is no directory: the step of epsrt.plan's table on a small smooth network.

It needs no library and no file, and counts what is opened and closed; its lanes are those of every CPU engine.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from epsrt import Bundle, Schedule
from epsrt.engine import Closing, check_batch
from epsrt.engines.cpu.lanes import HostLanes
from epsrt.errors import OutOfMemoryError
from epsrt.manifest import FORMAT, Classifier, Manifest, Provenance, StepGraph, step_columns

SCHEDULE = Schedule(T=100, beta_start=1e-3, beta_end=0.2)
NULL = 4


def network(x, t, label):
    """ε of x [B, C, H, W] at t [B] for labels [B]; smooth, of order 1, and another for each label."""
    t, label = (np.asarray(v, np.float64).reshape(-1, *[1] * (x.ndim - 1)) for v in (t, label))
    return 0.7 * x + 0.3 * np.tanh(np.roll(x, 1, -1) + t / 50 + label - 2) + 0.05 * label


def gradient(x, t, target):
    """∇ log p(target | x), of the same shapes."""
    t, target = (np.asarray(v, np.float64).reshape(-1, 1, 1, 1) for v in (t, target))
    return np.cos(x * (1 + target) + t / 100)


def manifest(features=("guidance", "classifier", "mask"), **changes: Any) -> Manifest:
    """Four classes and a null label; a graph for every combination of the features."""
    several = [chosen for k in range(len(features) + 1) for chosen in combinations(features, k)]
    variance = changes.get("variance")
    graphs = tuple(
        StepGraph(f"step-fp32{''.join(f'-{f}' for f in c)}.onnx", "w", "fp32", step_columns(variance, c), c)
        for c in several
    )
    fields = {
        "format": FORMAT,
        "shape": (1, 2, 4),
        "max_batch": 4,
        "schedule": SCHEDULE,
        "prediction": "epsilon",
        "value_range": (-1.0, 1.0),
        "clip": 1.0,
        "classes": 4,
        "class_names": (),
        "null_label": NULL,
        "variance": None,
        "thresholding": None,
        "graphs": graphs,
        "provenance": Provenance("Toy", 0, "module", "module", "", "", {}, {}, {}),
        "files": {},
        "classifier": Classifier(3, (), "Toy", 0, "module", ""),
    }
    return Manifest(**{**fields, **changes})


def bundle(**changes: Any) -> Bundle:
    return Bundle(Path("toy.epsrt"), manifest(**changes))


class NumpyLanes(HostLanes):
    def __init__(self, engine, batch, image):
        self.engine, self.heard, self.closed = engine, [], 0
        super().__init__(engine, batch, image, lambda given, made: lambda: engine.step(given, made))

    def write(self, index, sample, state=None):
        self.heard.append("write")
        super().write(index, sample, state)

    def advance(self, rows):
        self.heard.append("advance")
        super().advance(rows)

    def wait(self, ahead=0):
        self.heard.append("wait ahead" if ahead else "wait")
        super().wait(ahead)

    def read(self, index, what="x"):
        self.heard.append("read")
        return super().read(index, what)

    def close(self):
        self.closed += 1
        super().close()


class NumpyEngine(Closing):
    """See epsrt.engine.Engine. `made` has every lanes object, `opened` every engine that `on` made."""

    name, device, precision, batch_limit = "numpy", "cpu", "fp32", "the bundle's largest"

    def __init__(self, bundle: Bundle, graph: StepGraph | None = None, most_lanes: int | None = None):
        self.bundle, self.graph = bundle, graph or bundle.graph("fp32")
        self.columns, self.max_batch, self.most_lanes = self.graph.columns, bundle.manifest.max_batch, most_lanes
        self.made: list[NumpyLanes] = []
        self.opened: list[NumpyEngine] = []
        self.fails_at: float | None = None  # a step at this t raises
        self.closed = 0

    def lanes(self, batch, size=None):
        check_batch(batch, self)
        if self.most_lanes is not None and sum(not lanes.closed for lanes in self.made) >= self.most_lanes:
            raise OutOfMemoryError("no room for more lanes")
        lanes = NumpyLanes(self, batch, self.bundle.image_shape(size))
        self.made.append(lanes)
        return lanes

    def on(self, graph):
        self.opened.append(NumpyEngine(self.bundle, graph))
        return self.opened[-1]

    def close(self):
        self.closed += 1

    def predicted(self, x, t, given):
        """`network` of the label, and a tenth of the mean of every other condition."""
        out = network(x, t, given.get("label", np.zeros(len(x))))
        for c in self.bundle.manifest.conditions or ():
            out = out + 0.1 * given[c.name].reshape(len(x), -1).mean(1).reshape(-1, *[1] * (x.ndim - 1))
        return out

    def step(self, given, made):
        """epsrt.plan's formulas, in float64."""
        one = (-1, *[1] * (given["x"].ndim - 1))
        k = {name: given["rows"][:, i].reshape(one).astype(np.float64) for i, name in enumerate(self.columns)}
        if self.fails_at is not None and np.any(k["t"] == self.fails_at):
            raise RuntimeError("the step failed")
        x, m = given["x"].astype(np.float64), given["m"].astype(np.float64)
        scaled, t = k["in_scale"] * x, given["rows"][:, self.columns.index("t")]
        out = self.predicted(scaled, t, given)
        if "w" in k:
            nulls = {name.removesuffix("_null"): a for name, a in given.items() if name.endswith("_null")}
            c, u = out, self.predicted(scaled, t, {**given, **nulls})
            out = u + k["w"] * (c - u)
            over = tuple(range(1, c.ndim))
            ratio = c.std(over, keepdims=True) / np.maximum(out.std(over, keepdims=True), 1e-12)
            out = out * (1 + k["phi"] * (ratio - 1))
        if "s" in k:
            out = out + k["s"] * k["j"] * gradient(scaled, t, given["target"])
        x0 = np.clip(k["p"] * x + k["q"] * out, -k["clip"], k["clip"])
        after = k["a"] * x + k["b"] * x0 + k["h"] * out + k["c"] * m + k["d"] * given["z"]
        if "ka" in k:
            mask = given["mask"]
            after = mask * (k["ka"] * given["known"] + k["kb"] * given["z2"]) + (1 - mask) * after
        made["x_next"][:], made["x0"][:] = after, x0
        made["m_next"][:] = k["e"] * x + k["f"] * x0 + k["o"] * out + k["g"] * m
