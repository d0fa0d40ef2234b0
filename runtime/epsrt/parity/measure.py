"""How an engine is measured against what PyTorch recorded: what the rungs of epsrt.verify have in common."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsrt.engine import Engine, Sample
from epsrt.errors import BundleError
from epsrt.manifest import Rung, step_columns
from epsrt.plan import DEFAULTS, idle_row
from epsrt.types import Float32, Float64, Int64

# (largest relative L2 of a step, least PSNR of a trajectory in dB)
LIMITS = {
    ("cpu", "fp32"): (2e-6, 100.0), ("cpu", "fp16"): (1e-3, 55.0), ("cpu", "bf16"): (1e-2, 42.0),
    ("cpu", "int8"): (0.25, 25.0),
    ("cuda", "fp32"): (1e-5, 90.0), ("cuda", "fp16"): (3e-3, 45.0),
}  # fmt: skip
PSNR_CEILING = 300.0  # identical images; infinity has no JSON


def relative_l2(value: NDArray[Any], truth: NDArray[Any]) -> float:
    """‖value − truth‖ / ‖truth‖ in float64."""
    v, t = np.asarray(value, np.float64), np.asarray(truth, np.float64)
    return float(np.linalg.norm(v - t)) / max(float(np.linalg.norm(t)), 1e-30)


def worst_psnr(images: Float32, truth: Float32, value_range: tuple[float, float]) -> float:
    """PSNR in dB of the worst of [n, C, H, W], peak = the width of the value range; at most PSNR_CEILING."""
    error = np.square(images.astype(np.float64) - truth).reshape(len(images), -1).mean(axis=1).max()
    peak = value_range[1] - value_range[0]
    return float(min(20 * np.log10(peak) - 10 * np.log10(max(error, 1e-300)), PSNR_CEILING))


def network_outputs(engine: Engine, x: Float32, t: Float32, label: Int64, batch: int) -> Float32:
    """The network's prediction for states x [n, C, H, W] at t [n], through the step graph: h = 1 gives x' = out."""
    return one_step(engine, x, t, label, batch, h=1.0)


def one_step(
    engine: Engine,
    x: Float32,
    t: Float32,
    label: Int64,
    batch: int,
    target: Int64 | None = None,
    **columns: np.float32 | float | NDArray[Any],
) -> Float32:
    """x' of states x [n, C, H, W] at t [n], by rows of these columns, each a number or [n], and zeros.

    z is the same in all; `target` [n] are the classifier's classes.
    """
    out = np.empty_like(x)
    at = {name: i for i, name in enumerate(engine.columns)}
    rows = np.tile(idle_row(engine.columns), (len(x), 1))
    for name, value in {"a": 0.0, **columns, "t": t}.items():
        rows[:, at[name]] = value
    with engine.lanes(batch, x.shape[2:]) as lanes:
        for first in range(0, len(x), batch):
            part = range(first, min(first + batch, len(x)))
            given = np.tile(idle_row(engine.columns), (1, batch, 1))
            for lane, i in enumerate(part):
                chosen = 0 if target is None else int(target[i])
                lanes.write(lane, Sample(start=(1.0, 0.0), init=x[i], label=int(label[i]), target=chosen))
                given[0, lane] = rows[i]
            lanes.advance(given)
            for lane, i in enumerate(part):
                out[i] = lanes.read(lane)
    return out


def rung(engine: Engine, name: str, figure: float | None, unit: str, limit: float, **more: Any) -> Rung:
    """A measurement of an engine's step graph."""
    finite = figure is not None and np.isfinite(figure)
    return Rung(
        name,
        engine.name,
        engine.precision,  # type: ignore[arg-type]
        figure if finite else None,
        limit,
        unit,
        graph=engine.graph.stem,
        **more,
    )


def limits(engine: Engine) -> tuple[float, float]:
    """(largest relative L2 of a step, least PSNR of a trajectory in dB)."""
    return LIMITS[engine.device, engine.precision]


def by_timestep(
    engine: Engine, name: str, out: NDArray[Any], truth: NDArray[Any], t: Float32, limit: float | None = None
) -> Rung:
    """Relative L2 of each state; the figure is the worst, the limit that of a step where none is given."""
    errors = [relative_l2(a, b) for a, b in zip(out, truth, strict=True)]
    worst = int(np.argmax(errors))
    ts = timesteps(engine, t)
    each = tuple((int(s), e) for s, e in zip(ts, errors, strict=True))
    limit = limits(engine)[0] if limit is None else limit
    return rung(engine, name, errors[worst], "relative L2", limit, where=f"t = {ts[worst]:g}", by_timestep=each)


def timesteps(engine: Engine, told: Float32) -> Float64:
    """The schedule's whole timesteps, of t as the network is told it."""
    return np.round(engine.bundle.manifest.timesteps(told))


def rows_for(engine: Engine, kept: Float32) -> Float32:
    """Recorded rows [steps, step_columns] in the engine's columns; those that it has beyond hold their defaults."""
    columns = step_columns(engine.bundle.manifest.variance)
    if kept.shape[1] != len(columns):
        raise BundleError(f"{engine.bundle.path}: the golden file's rows have other columns: export again")
    rows = np.tile(np.array([DEFAULTS[c] for c in engine.columns], np.float32), (len(kept), 1))
    rows[:, [engine.columns.index(c) for c in columns]] = kept
    return rows
