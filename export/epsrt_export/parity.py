"""The gate: rungs 1 and 2 of the ladder are measured here, 3 to 6 by the runtime on the finished graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from epsrt import solvers
from epsrt.errors import EpsrtError
from epsrt.manifest import Rung
from epsrt.plan import Plan
from epsrt.schedule import Schedule
from epsrt.timesteps import spaced
from epsrt_export.source import Source
from epsrt_trainer.diffusion import SIGMA_DATA
from epsrt_trainer.sample import ddim_loop, ddpm_loop


class ParityError(EpsrtError):
    """An export missed a rung; no bundle was written. `missed` is the rung, its figure and where, in words."""

    def __init__(self, missed: str, precision: str):
        way = ": export fp32 alone" if precision in ("fp16", "int8") else ""
        super().__init__(f"parity missed: {missed}; no bundle was written{way}")
        self.missed = missed


class LeftOutWarning(UserWarning):
    """A bundle was written without FP16, which was not asked for by name and misses a rung."""


def require(rungs: Sequence[Rung], why: Callable[[Rung], str] = lambda rung: "") -> None:
    """Raise ParityError naming the first rung that was missed, its figure and where, and `why` where it knows."""
    for r in rungs:
        if not r.passed:
            raise ParityError("; ".join(filter(None, (_missed(r), why(r)))), r.precision)


def _missed(r: Rung) -> str:
    rung = f"{r.name} of the {r.graph} graph" if r.graph else r.name
    rung += f" in {r.precision} on {r.engine}"
    if r.figure is None:
        return f"{rung} has no figure, for {r.where}"
    limit = f"at {'least' if r.at_least else 'most'} {r.limit:g}"
    return f"{rung} is {r.figure:.3g} {r.unit} ({limit} allowed) at {r.where}"


def numpy_rungs(source: Source) -> list[Rung]:
    """Rungs 1 and 2 for a source: all that can be measured before there is a graph."""
    plans = plan_rungs(source.schedule, source.prediction, source.bound, source.variance, source.sigma_data)
    return [schedule_rung(source.schedule), *plans]


def schedule_rung(schedule: Schedule) -> Rung:
    """Rung 1, in extended precision: ᾱ against the product of 1 − β; α and σ of ve and flow, their closed forms."""
    if not schedule.preserves_variance:
        return _levels_rung(schedule)
    beta = Schedule(schedule.kind, schedule.T, schedule.beta_start, schedule.beta_end, schedule.betas).beta
    root = np.sqrt(np.cumprod(1 - beta.astype(np.longdouble)))
    if schedule.zero_snr:  # arXiv 2305.08891, algorithm 1; one step alone is pure noise
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]) if schedule.T > 1 else 0)
    error = np.abs(schedule.alpha_bar - (root**2).astype(np.float64))
    return Rung("schedule", "numpy", "fp64", float(error.max()), 1e-12, "max |Δ|", f"t = {int(error.argmax())}")


def _levels_rung(schedule: Schedule) -> Rung:
    low, high = schedule.span
    t = np.arange(low, high + 1)
    part = t.astype(np.longdouble) / high
    if schedule.kind == "ve":  # σ_{t+1}/σ_t is the same for all t (arXiv 1907.05600, section 4)
        first, last = np.longdouble(schedule.sigma_min), np.longdouble(schedule.sigma_max)
        truth = np.ones_like(part), first * np.exp(part * np.log(last / first))
    else:
        truth = 1 - part, part
    alpha, sigma = schedule.at(t)
    error = np.maximum(np.abs(alpha - truth[0]), np.abs(sigma / truth[1] - 1)).astype(np.float64)
    where = f"t = {t[error.argmax()]}"
    return Rung("schedule", "numpy", "fp64", float(error.max()), 1e-12, "max |Δα|, |Δσ|/σ", where)


def plan_rungs(
    schedule: Schedule, prediction: str, clip: float | None, variance: str | None = None, sigma_data: float = SIGMA_DATA
) -> list[Rung]:
    """Rung 2: whole trajectories of the plans against the papers' plain loops, float64, on a toy network.

    `variance`: learned or learned_range, where DDPM's is the network's own.
    """
    kind: dict[str, Any] = {"prediction": prediction, "sigma_data": sigma_data, "clip": clip}
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=generator, dtype=torch.float64) / 8
    learned: dict[str, Any] = {} if variance is None else {"variance": variance}

    def toy(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        size = 1.0
        if prediction != "edm":  # whose x comes scaled
            alpha, sigma = map(float, schedule.at(float(t[0])))
            size = math.hypot(alpha, sigma)
        out = torch.tanh((x + x @ mix) / size + t[:, None].double() / schedule.T - 0.5)
        out = -out / sigma if prediction == "score" else out
        return torch.cat([out, out.flip(1)], 1) if learned else out

    rungs = []
    loops: tuple[tuple[str, Any, int, dict[str, Any]], ...] = (
        ("ddim", ddim_loop, 50, {}),
        ("ddpm", ddpm_loop, 1000, learned),
    )
    for method, loop, steps, more in loops:
        ts = spaced(schedule, min(steps, schedule.T), "trailing")
        plan = solvers.make(method, schedule, timesteps=ts, **kind, **more)
        x = plan.start[1] * torch.randn(4, 16, generator=generator, dtype=torch.float64)
        z = torch.randn(len(ts), 4, 16, generator=generator, dtype=torch.float64)
        truth = loop(toy, schedule, x, ts, lambda i, z=z: z[i], **kind, **more)
        mine = _run(plan, toy, x, z)
        error = float((mine - truth).abs().max())
        rungs.append(Rung(f"plan {method}-{len(ts)}", "numpy", "fp64", error, 1e-9, "max |Δ|", "a toy network"))
    return rungs


def _run(plan: Plan, network: Any, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    m = torch.zeros_like(x)
    for i in range(len(plan)):
        k = {name: float(plan[name][i]) for name in "pqabhcdefogr"}
        both = network(float(plan["in_scale"][i]) * x, torch.full((len(x),), float(plan["t"][i])))
        out, v = both[:, : x.shape[1]], both[:, x.shape[1] :]
        spread = torch.exp(k["r"] * v) if v.shape[1] else 1.0
        x0 = (k["p"] * x + k["q"] * out).clamp(-float(plan["clip"][i]), float(plan["clip"][i]))
        x, m = (
            k["a"] * x + k["b"] * x0 + k["h"] * out + k["c"] * m + k["d"] * spread * z[i],
            k["e"] * x + k["f"] * x0 + k["o"] * out + k["g"] * m,
        )
    return x
