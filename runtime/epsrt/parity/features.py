"""The rungs of what a step graph may have beyond the plain step: guidance, a classifier, a mask."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsrt import noise
from epsrt.engine import Engine, Sample
from epsrt.parity.golden import Golden
from epsrt.parity.measure import BATCH, Found, by_timestep, one_step, relative_l2, rows_for, worst
from epsrt.parity.records import Classifier, Guidance
from epsrt.parity.rungs import given_of

WEIGHTS = (0.0, 1.0, 2.0, 4.0, 7.5)  # of guidance, in turn
RESCALES = (0.0, 0.7)
GRADIENT_LIMIT = 1e-4  # of a classifier's gradient, relative L2, in every precision: it is float32 in all
DOMINANT = 1e3  # how much larger than the network's output the gradient is made where it is measured
LEVEL = (0.8, 0.6)  # α and σ that known pixels are noised to, in every other state


def guidance(engine: Engine, golden: Golden, recorded: Guidance) -> Found:
    """u + w·(c − u) at the network's timesteps, rescaled in every other; w = 0 is u alone and w = 1 c alone.

    The figure is relative to what is combined, hypot(‖w·c‖, ‖(1 − w)·u‖): where c and u cancel, their errors do not.
    """
    states, m = golden.network, engine.bundle.manifest
    n, channels = states.x.shape[:2]
    c, u = states.out[:, :channels].astype(np.float64), recorded.null.astype(np.float64)
    one = (-1, *[1] * (c.ndim - 1))
    w, phi = (np.resize(np.array(values), n).reshape(one) for values in (WEIGHTS, RESCALES))
    mixed = u + w * (c - u)
    over = tuple(range(1, c.ndim))
    factor = 1 + phi * (c.std(over, keepdims=True) / mixed.std(over, keepdims=True) - 1)
    scale = factor * np.sqrt((w * c) ** 2 + ((1 - w) * u) ** 2)
    batch = min(engine.max_batch, BATCH)
    against = [golden.against(m, recorded, i) for i in range(n)]
    weights: dict[str, Any] = {"w": w.ravel(), "phi": phi.ravel()}
    given = given_of(engine, golden)
    found = one_step(engine, states.x, states.t, given, batch, against=against, h=1.0, **weights)
    errors = [_norm(a - b) / _norm(s) for a, b, s in zip(found, mixed * factor, scale, strict=True)]
    each = zip(w.ravel(), phi.ravel(), strict=True)
    return worst(errors, [f"w = {weight:g}, rescaled by {by:g}" for weight, by in each])


def classifier(engine: Engine, golden: Golden, recorded: Classifier) -> Found:
    """∇ log p(target | x) as the graph has it, weighed until it dwarfs the network's output."""
    states, given = golden.network, given_of(engine, golden)
    gradient = recorded.gradient.astype(np.float64)
    out = states.out[:, : states.x.shape[1]].astype(np.float64)
    weight = np.array([DOMINANT * _norm(o) / max(_norm(g), 1e-30) for o, g in zip(out, gradient, strict=True)])
    weight = weight.astype(np.float32)
    batch = min(engine.max_batch, BATCH)
    found = one_step(engine, states.x, states.t, given, batch, recorded.target, h=1.0, s=weight, j=1.0)
    added = weight.reshape(-1, *[1] * (gradient.ndim - 1)).astype(np.float64) * gradient
    return by_timestep(engine, found - out, added, states.t)


def mask(engine: Engine, golden: Golden) -> Found:
    """One DDPM step from PyTorch's states: a part of the image is known, a part half so, the rest as the step has it.

    Known pixels are noised to LEVEL in every other state. In the others they stay clean, and must come back exactly.
    """
    states, given = golden.step, given_of(engine, golden, golden.step)
    rows, truth, out = rows_for(engine, states.rows), states.x_next.astype(np.float64), np.empty_like(states.x)
    ka_kb, n = [engine.columns.index(name) for name in ("ka", "kb")], engine.columns.index("n")
    known = np.roll(states.x, 1, axis=0)
    part = np.resize(np.array([1.0, 0.0, 0.25, 0.0, 1.0, 0.0, 0.0], np.float32), states.x.shape[1:])
    with engine.lanes(1) as lanes:
        for i, x in enumerate(states.x):
            ka, kb = rows[i, ka_kb] = LEVEL if i % 2 else (1.0, 0.0)
            seed, index = int(states.seed[i]), int(states.index[i])
            lanes.write(0, Sample(seed, index, (1.0, 0.0), x, known=known[i], mask=part, conditions=given[i]))
            lanes.advance(rows[i][None, None])
            out[i] = lanes.read(0)
            if not kb and not np.array_equal(out[i][part == 1], known[i][part == 1]):
                return Found(None, f"known pixels of state {i} differ")
            z2 = noise.normals(seed, index, noise.KNOWN, int(rows[i, n]), x.size).reshape(x.shape)
            truth[i] = part * (ka * known[i] + kb * z2.astype(np.float64)) + (1 - part) * truth[i]
    errors = [relative_l2(a, b) for a, b in zip(out, truth, strict=True)]
    return worst(errors, [f"state {i}" for i in range(len(out))])


def _norm(x: NDArray[Any]) -> float:
    return float(np.linalg.norm(x))
