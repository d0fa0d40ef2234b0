"""Rungs of the ladder for what a step graph may have beyond the plain step: guidance, a classifier, a mask."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsrt import noise
from epsrt.engine import Engine, Sample
from epsrt.errors import NotFiniteError
from epsrt.manifest import Rung
from epsrt.parity import measure
from epsrt.types import Arrays

# what each needs of the golden file
NEEDS = {"guidance": ("guidance.null",), "classifier": ("classifier.target", "classifier.gradient")}
WEIGHTS = (0.0, 1.0, 2.0, 4.0, 7.5)  # of guidance, in turn
RESCALES = (0.0, 0.7)
GRADIENT_LIMIT = 1e-4  # of a classifier's gradient, relative L2, in every precision: it is float32 in all
DOMINANT = 1e3  # how much larger than the network's output the gradient is made where it is measured
LEVEL = (0.8, 0.6)  # α and σ that known pixels are noised to, in every other state


def guidance(engine: Engine, golden: Arrays) -> Rung:
    """u + w·(c − u) at the network's timesteps, rescaled in every other; w = 0 is u alone and w = 1 c alone.

    The figure is relative to what is combined, hypot(‖w·c‖, ‖(1 − w)·u‖): where c and u cancel, so do not their errors.
    """
    x, t, label, out = (golden[f"network.{key}"] for key in ("x", "t", "label", "out"))
    c, u = out[:, : x.shape[1]].astype(np.float64), golden["guidance.null"].astype(np.float64)
    w = np.resize(np.array(WEIGHTS), len(x))[:, None, None, None]
    phi = np.resize(np.array(RESCALES), len(x))[:, None, None, None]
    mixed = u + w * (c - u)
    over = (1, 2, 3)
    factor = 1 + phi * (c.std(over, keepdims=True) / mixed.std(over, keepdims=True) - 1)
    scale = factor * np.sqrt((w * c) ** 2 + ((1 - w) * u) ** 2)
    limit = measure.limits(engine)[0]
    try:
        found = measure.one_step(engine, x, t, label, min(engine.max_batch, 8), h=1.0, w=w.ravel(), phi=phi.ravel())
    except NotFiniteError as error:
        return measure.rung(engine, "guidance", None, "relative L2", limit, where=str(error))
    errors = [_norm(a - b) / _norm(s) for a, b, s in zip(found, mixed * factor, scale, strict=True)]
    worst = int(np.argmax(errors))
    where = f"w = {w.ravel()[worst]:g}, rescaled by {phi.ravel()[worst]:g}"
    return measure.rung(engine, "guidance", errors[worst], "relative L2", limit, where=where)


def classifier(engine: Engine, golden: Arrays) -> Rung:
    """∇ log p(target | x) as the graph has it, weighed until it dwarfs the network's output."""
    x, t, label, out = (golden[f"network.{key}"] for key in ("x", "t", "label", "out"))
    target, gradient = golden["classifier.target"], golden["classifier.gradient"].astype(np.float64)
    out = out[:, : x.shape[1]].astype(np.float64)
    weight = np.array([DOMINANT * _norm(o) / max(_norm(g), 1e-30) for o, g in zip(out, gradient, strict=True)])
    weight = weight.astype(np.float32)
    try:
        found = measure.one_step(engine, x, t, label, min(engine.max_batch, 8), target, h=1.0, s=weight, j=1.0)
    except NotFiniteError as error:
        return measure.rung(engine, "classifier", None, "relative L2", GRADIENT_LIMIT, where=str(error))
    added = weight[:, None, None, None].astype(np.float64) * gradient
    return measure.by_timestep(engine, "classifier", found - out, added, t, GRADIENT_LIMIT)


def mask(engine: Engine, golden: Arrays) -> Rung:
    """One DDPM step from PyTorch's states, of which a part is known, a part half so, and the rest as the step has it.

    In every other state known pixels are noised to LEVEL, in the others left clean: there they must come back exactly.
    """
    states, truth, kept = golden["step.x"], golden["step.x_next"].astype(np.float64), golden["step.rows"]
    rows, out = measure.rows_for(engine, kept), np.empty_like(states)
    columns = [engine.columns.index(name) for name in ("ka", "kb", "n")]
    known = np.roll(states, 1, axis=0)
    part = np.resize(np.array([1.0, 0.0, 0.25, 0.0, 1.0, 0.0, 0.0], np.float32), states.shape[1:])
    limit = measure.limits(engine)[0]
    with engine.lanes(1) as lanes:
        for i, x in enumerate(states):
            ka, kb = rows[i, columns[:2]] = LEVEL if i % 2 else (1.0, 0.0)
            seed, index, label = (int(golden[f"step.{key}"][i]) for key in ("seed", "index", "label"))
            lanes.write(0, Sample(seed, index, (1.0, 0.0), x, label, known=known[i], mask=part))
            lanes.advance(rows[i][None, None])
            try:
                out[i] = lanes.read(0)
            except NotFiniteError as error:
                return measure.rung(engine, "mask", None, "relative L2", limit, where=str(error))
            if not kb and not np.array_equal(out[i][part == 1], known[i][part == 1]):
                return measure.rung(
                    engine, "mask", None, "relative L2", limit, where=f"known pixels of state {i} differ"
                )
            z2 = noise.normals(seed, index, noise.KNOWN, int(rows[i, columns[2]]), x.size).reshape(x.shape)
            truth[i] = part * (ka * known[i] + kb * z2.astype(np.float64)) + (1 - part) * truth[i]
    errors = [measure.relative_l2(a, b) for a, b in zip(out, truth, strict=True)]
    worst = int(np.argmax(errors))
    return measure.rung(engine, "mask", errors[worst], "relative L2", limit, where=f"state {worst}")


def _norm(x: NDArray[Any]) -> float:
    return float(np.linalg.norm(x))
