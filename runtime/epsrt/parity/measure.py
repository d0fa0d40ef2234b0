"""What the rungs of the ladder have in common: figures, limits, one step of an engine, and how a rung is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsrt.engine import Engine, Sample
from epsrt.errors import NotFiniteError
from epsrt.manifest import Rung, step_columns
from epsrt.plan import DEFAULTS, idle_row
from epsrt.types import Arrays, Float32, Int64

# (largest relative L2 of a step, least PSNR of a trajectory in dB)
LIMITS = {
    ("cpu", "fp32"): (2e-6, 100.0), ("cpu", "fp16"): (1e-3, 55.0), ("cpu", "bf16"): (1e-2, 42.0),
    ("cpu", "int8"): (0.25, 25.0),
    ("cuda", "fp32"): (1e-5, 90.0), ("cuda", "fp16"): (3e-3, 45.0),
}  # fmt: skip
STEP_ROUNDING = 2e-7  # relative L2 of a step in float32 from one in float64
# dB that a trajectory's limit may fall by, where it magnifies roundings; below that it says nothing of an engine
ROOM = {"fp32": 30.0, "fp16": 10.0}
PSNR_CEILING = 300.0  # identical images; infinity has no JSON
BATCH = 8  # of states that are measured, where the engine allows it


@dataclass(frozen=True)
class Found:
    """What a measurement found: its figure (None: there is none), where that was the worst, and each timestep's."""

    figure: float | None
    where: str
    by_timestep: tuple[tuple[int, float | None], ...] = ()


@dataclass(frozen=True)
class Check:
    """A rung of the ladder before it is measured. `measure` may raise NotFiniteError; `limit` is as Rung has it."""

    name: str
    measure: Callable[[], Found]
    limit: float
    unit: str = "relative L2"
    at_least: bool = False
    precision: str = ""  # of what is measured, where that is not the engine's own

    def run(self, engine: Engine) -> Rung:
        """Measure it on an engine. A lane that is not finite is a miss, and its sentence says where."""
        try:
            found = self.measure()
        except NotFiniteError as error:
            found = Found(None, str(error))
        finite = found.figure is not None and np.isfinite(found.figure)
        if found.figure is not None and not finite:
            found = replace(found, where=f"{found.where} is not finite")
        return Rung(
            name=self.name,
            engine=engine.name,
            precision=self.precision or engine.precision,  # type: ignore[arg-type]
            figure=found.figure if finite else None,
            limit=self.limit,
            unit=self.unit,
            where=found.where,
            at_least=self.at_least,
            by_timestep=found.by_timestep,
            graph=engine.graph.stem,
        )


def relative_l2(value: NDArray[Any], truth: NDArray[Any]) -> float:
    """‖value − truth‖ / ‖truth‖ in float64."""
    v, t = np.asarray(value, np.float64), np.asarray(truth, np.float64)
    return float(np.linalg.norm(v - t)) / max(float(np.linalg.norm(t)), 1e-30)


def r_squared(value: NDArray[Any], truth: NDArray[Any]) -> float:
    """The share of the variance of [n, C, …] about each channel's mean that `value` accounts for; at most 1."""
    v, t = np.asarray(value, np.float64), np.asarray(truth, np.float64)
    mean = t.mean((0, *range(2, t.ndim)), keepdims=True)
    return 1 - float(np.square(v - t).sum()) / max(float(np.square(t - mean).sum()), 1e-30)


def worst_psnr(images: Float32, truth: Float32, value_range: tuple[float, float]) -> float:
    """PSNR in dB of the worst of [n, C, …], peak = the width of the value range; at most PSNR_CEILING."""
    error = np.square(images.astype(np.float64) - truth).reshape(len(images), -1).mean(axis=1).max()
    return psnr(float(error), value_range)


def psnr(error: float, value_range: tuple[float, float]) -> float:
    """PSNR in dB of a mean square error, peak = the width of the value range; at most PSNR_CEILING."""
    peak = value_range[1] - value_range[0]
    return float(min(20 * np.log10(peak) - 10 * np.log10(max(error, 1e-300)), PSNR_CEILING))


def network_outputs(engine: Engine, x: Float32, t: Float32, given: Sequence[Arrays], batch: int) -> Float32:
    """The network's prediction for states x [n, C, …] at t [n], through the step graph: h = 1 gives x' = out."""
    return one_step(engine, x, t, given, batch, h=1.0)


def one_step(
    engine: Engine,
    x: Float32,
    t: Float32,
    given: Sequence[Arrays],
    batch: int,
    target: Int64 | None = None,
    against: Sequence[Arrays] | None = None,
    **columns: np.float32 | float | NDArray[Any],
) -> Float32:
    """x' of states x [n, C, …] at t [n], by rows of these columns, each a number or [n], and zeros.

    z is the same in all; `given` are each state's conditions by name, `against` what guided ones are guided against,
    and `target` [n] the classifier's classes.
    """
    out = np.empty_like(x)
    at = {name: i for i, name in enumerate(engine.columns)}
    rows = np.tile(idle_row(engine.columns), (len(x), 1))
    for name, value in {"a": 0.0, **columns, "t": t}.items():
        rows[:, at[name]] = value
    with engine.lanes(batch, x.shape[2:]) as lanes:
        for first in range(0, len(x), batch):
            part = range(first, min(first + batch, len(x)))
            table = np.tile(idle_row(engine.columns), (1, batch, 1))
            for lane, i in enumerate(part):
                chosen = 0 if target is None else int(target[i])
                null = {} if against is None else against[i]
                sample = Sample(start=(1.0, 0.0), init=x[i], target=chosen, conditions=given[i], null_conditions=null)
                lanes.write(lane, sample)
                table[0, lane] = rows[i]
            lanes.advance(table)
            for lane, i in enumerate(part):
                out[i] = lanes.read(lane)
    return out


def limits(engine: Engine) -> tuple[float, float]:
    """(largest relative L2 of a step, least PSNR of a trajectory in dB)."""
    return LIMITS[engine.device, engine.precision]


def worst(errors: Sequence[float], places: Sequence[str]) -> Found:
    """The largest of some errors, and its place. A NaN counts as the largest."""
    i = int(np.argmax(errors))
    return Found(errors[i], places[i])


def by_timestep(engine: Engine, out: NDArray[Any], truth: NDArray[Any], t: Float32) -> Found:
    """Relative L2 of each state; the figure is the worst."""
    errors = [relative_l2(a, b) for a, b in zip(out, truth, strict=True)]
    ts = np.round(engine.bundle.manifest.timesteps(t))  # the schedule's own, and whole
    found = worst(errors, [f"t = {t:g}" for t in ts])
    return replace(found, by_timestep=tuple((int(t), e) for t, e in zip(ts, errors, strict=True)))


def rows_for(engine: Engine, kept: Float32) -> Float32:
    """Recorded rows [steps, step_columns] in the engine's columns; those that it has beyond hold their defaults."""
    columns = step_columns(engine.bundle.manifest.variance)
    rows = np.tile(np.array([DEFAULTS[c] for c in engine.columns], np.float32), (len(kept), 1))
    rows[:, [engine.columns.index(c) for c in columns]] = kept
    return rows


def told(rung: Rung) -> str:
    """A rung's name and figure, and what was allowed."""
    figure = "is not finite" if rung.figure is None else f"is {rung.figure:.3g} {rung.unit}"
    return f"{rung.name}, which {figure} ({'at least' if rung.at_least else 'at most'} {rung.limit:g} allowed)"
