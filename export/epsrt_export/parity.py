"""The gate: rungs 1 and 2 of the ladder are measured here, 3 to 6 by the runtime on the finished graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from epsrt import solvers
from epsrt.bundle import Rung
from epsrt.errors import EpsrtError
from epsrt.plan import Plan
from epsrt.schedule import Schedule
from epsrt.spacing import timesteps
from epsrt_trainer.sample import ddim_loop, ddpm_loop


class ParityError(EpsrtError):
    """An export missed a rung; no bundle was written."""


def require(rungs: Sequence[Rung]) -> None:
    """Raise ParityError naming the first rung that was missed, its figure and where."""
    for r in rungs:
        if not r.passed:
            figure = "not finite" if r.figure is None else f"{r.figure:.3g} {r.unit}"
            limit = f"at {'least' if r.at_least else 'most'} {r.limit:g}"
            raise ParityError(
                f"parity missed: {r.name} in {r.precision} on {r.engine} is {figure} ({limit} allowed) at {r.where}; "
                "no bundle was written"
            )


def schedule_rung(schedule: Schedule) -> Rung:
    """Rung 1: ᾱ against the product of 1 − β in extended precision."""
    beta = Schedule(schedule.kind, schedule.T, schedule.beta_start, schedule.beta_end, schedule.betas).beta
    root = np.sqrt(np.cumprod(1 - beta.astype(np.longdouble)))
    if schedule.zero_snr and schedule.T > 1:  # arXiv 2305.08891, algorithm 1
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    error = np.abs(schedule.alpha_bar - (root**2).astype(np.float64))
    return Rung("schedule", "numpy", "fp64", float(error.max()), 1e-12, "max |Δ|", f"t = {int(error.argmax())}")


def plan_rungs(schedule: Schedule, prediction: str, clip: float, variance: str | None = None) -> list[Rung]:
    """Rung 2: whole trajectories of the plans against the papers' plain loops, float64, on a toy network.

    `variance`: learned or learned_range, where DDPM's is the network's own.
    """
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=generator, dtype=torch.float64) / 8
    learned: dict[str, Any] = {} if variance is None else {"variance": variance}

    def toy(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.tanh(x + x @ mix + t[:, None].double() / schedule.T - 0.5)
        return torch.cat([out, out.flip(1)], 1) if learned else out

    rungs = []
    loops: tuple[tuple[str, Any, int, dict[str, Any]], ...] = (
        ("ddim", ddim_loop, 50, {}), ("ddpm", ddpm_loop, 1000, learned),
    )  # fmt: skip
    for method, loop, steps, more in loops:
        ts = timesteps(schedule.T, min(steps, schedule.T), "trailing")
        x = torch.randn(4, 16, generator=generator, dtype=torch.float64)
        z = torch.randn(len(ts), 4, 16, generator=generator, dtype=torch.float64)
        truth = loop(toy, schedule, x, ts, lambda i, z=z: z[i], prediction=prediction, clip=clip, **more)
        mine = _run(solvers.make(method, schedule, timesteps=ts, prediction=prediction, clip=clip, **more), toy, x, z)
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
