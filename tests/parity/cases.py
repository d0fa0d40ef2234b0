"""One comparison a method: its plan and the loop of its paper, on the same network and noise.

CASES[name](clip) -> Case. `truth` is the loop's last x; x and z are what run_plan takes.
"""

from typing import Any, NamedTuple

import loops
import numpy as np
import pytest
import torch
from toy import SIGMA_DATA, Toy, draw

from epsrt import Plan, Schedule, solvers
from epsrt.timesteps import spaced

VP, VE, FLOW = Schedule(), Schedule("ve", sigma_min=0.02, sigma_max=40), Schedule("flow")
CHURN = {"s_churn": 8.0, "s_tmin": 0.05, "s_tmax": 20.0, "s_noise": 1.007}
PAPERS = {"S_churn": 8.0, "S_tmin": 0.05, "S_tmax": 20.0, "S_noise": 1.007}


class Case(NamedTuple):
    plan: Plan
    network: Toy
    x: torch.Tensor
    z: Any
    truth: torch.Tensor


def bounded(clip):
    return (lambda x0: x0) if clip is None else (lambda x0: x0.clamp(-clip, clip))


def levels_of(schedule, ts):
    alpha, sigma = schedule.at(ts)
    return [(float(a), float(s)) for a, s in zip(alpha, sigma, strict=True)]


def denoiser(schedule, clip):
    """x0(x, α, σ)."""
    network, bound = Toy(schedule), bounded(clip)
    return lambda x, alpha, sigma: bound(network.x0(x, alpha, sigma))


def in_sigma(schedule, clip):
    """D(x; σ) for x in units of α."""
    network, bound = Toy(schedule), bounded(clip)
    return lambda x, sigma: bound(network.x0(x, 1.0, sigma))


def of_edm(clip, churned, second_order):
    """EDM on karras spacing of a VE schedule; the first step's churn is in the plan's start."""
    ts = spaced(VE, 18, "karras")
    sigmas = [float(s) for s in VE.at(ts)[1]]
    network = Toy(VE, "edm")
    D = loops.edm_denoiser(network, SIGMA_DATA, clip)
    u, z = draw(len(ts))
    options = PAPERS if churned else {}
    truth = loops.edm(D, sigmas, sigmas[0] * u, z, second_order=second_order, **options)
    solver = solvers.heun if second_order else solvers.euler
    given = {"prediction": "edm", "sigma_data": SIGMA_DATA, "clip": clip}
    plan = solver(VE, ts, **given, **(CHURN if churned else {}))
    return Case(plan, network, u, row_noise(z, len(plan), 1 + second_order), truth)


def first_churned(clip, second_order):
    """As above with S_tmax = ∞: the first step is churned too, so x begins with its noise."""
    ts = spaced(VE, 18, "karras")
    sigmas = [float(s) for s in VE.at(ts)[1]]
    network = Toy(VE, "edm")
    D = loops.edm_denoiser(network, SIGMA_DATA, clip)
    u, z = draw(len(ts))
    truth = loops.edm(D, sigmas, sigmas[0] * u, z, S_churn=5.0, second_order=second_order)
    solver = solvers.heun if second_order else solvers.euler
    plan = solver(VE, ts, prediction="edm", sigma_data=SIGMA_DATA, clip=clip, s_churn=5.0)
    raised = sigmas[0] * (1 + 5.0 / len(ts))
    x = (sigmas[0] * u + np.sqrt(raised**2 - sigmas[0] ** 2) * z[0]) / raised  # of variance 1, as the plan's start is
    return Case(plan, network, x, row_noise(z, len(plan), 1 + second_order), truth)


def row_noise(z, rows, each):
    """Step i's churn is added by the last row of step i − 1."""
    spread = torch.zeros(rows, *z.shape[1:], dtype=z.dtype)
    last = each - 1
    for step in range(1, len(z)):
        spread[each * (step - 1) + last] = z[step]
    return spread


def churned_vp(clip):
    """Churn between a VP schedule's own levels, of an ε network. The loop begins with the plan's x."""
    ts = spaced(1000, 18)
    sigmas = [s / a for a, s in levels_of(VP, ts)]
    u, z = draw(len(ts))
    plan = solvers.heun(VP, ts, clip=clip, **CHURN)
    assert plan.start[1] == pytest.approx(np.hypot(1, sigmas[0]))
    truth = loops.edm(in_sigma(VP, clip), sigmas, plan.start[1] * u, z, **PAPERS)
    return Case(plan, Toy(VP), u, row_noise(z, len(plan), 2), truth)


def ancestral(clip, eta=0.8):
    ts = spaced(1000, 25)
    levels = levels_of(VP, ts)
    x, z = draw(len(ts))
    truth = loops.euler_ancestral(in_sigma(VP, clip), [s / a for a, s in levels], x / levels[0][0], z, eta)
    return Case(solvers.euler_ancestral(VP, ts, eta=eta, clip=clip), Toy(VP), x, z, truth)


def maruyama_vp(clip):
    schedule = Schedule(T=200, beta_start=1e-3, beta_end=0.08)
    network, bound = Toy(schedule), bounded(clip)

    def score(x, t):
        alpha, sigma = (float(v) for v in schedule.at(t))
        return (alpha * bound(network.x0(x, alpha, sigma)) - x) / sigma**2

    x, z = draw(200)
    truth = loops.euler_maruyama_vp(score, schedule.beta, x, z)
    return Case(solvers.euler_maruyama(schedule, range(199, -1, -1), clip=clip), network, x, z, truth)


def maruyama_ve(clip):
    ts = spaced(VE, 60, "exponential")
    sigmas = [float(s) for s in VE.at(ts)[1]]
    D = in_sigma(VE, clip)
    x, z = draw(len(ts))
    truth = loops.euler_maruyama_ve(lambda x, sigma: (D(x, sigma) - x) / sigma**2, sigmas, sigmas[0] * x, z)
    plan = solvers.euler_maruyama(VE, ts, prediction="score", clip=clip)
    return Case(plan, Toy(VE, "score"), x, z, truth)


def langevin(clip, denoise=True):
    ts = spaced(VE, 15, "exponential", sigma_max=10.0)
    sigmas = [float(s) for s in VE.at(ts)[1]]
    D = in_sigma(VE, clip)
    x, z = draw(15 * 6 + 1)
    truth = loops.annealed_langevin(
        lambda x, sigma: (D(x, sigma) - x) / sigma**2, sigmas, sigmas[0] * x, z, 6, 0.4 * sigmas[-1] ** 2, denoise
    )
    plan = solvers.langevin(VE, ts, each=6, rate=0.4, denoise=denoise, prediction="score", clip=clip)
    return Case(plan, Toy(VE, "score"), x, z, truth)


def dpmpp(name, schedule, clip):
    ts = spaced(schedule, 20, "leading")
    levels, x0 = levels_of(schedule, ts), denoiser(schedule, clip)
    x, z = draw(2 * len(ts))
    plan = solvers.make(name, schedule, timesteps=ts, clip=clip)
    begins = (1.0 if schedule.preserves_variance else levels[0][1]) * x
    match name:
        case "dpmpp-2s":
            at = _flow_level if schedule.kind == "flow" else _vp_level
            truth = loops.dpm_solver_pp_2s(x0, levels, at, begins)
        case "dpmpp-2m":
            truth = loops.dpm_solver_pp_2m(x0, levels, begins)
        case _:
            truth = loops.sde_dpm_solver_pp_2m(x0, levels, begins, z)
    return Case(plan, Toy(schedule), x, z, truth)


def _vp_level(lam):
    return float((1 + np.exp(-2 * lam)) ** -0.5), float((1 + np.exp(2 * lam)) ** -0.5)


def _flow_level(lam):
    return float(1 / (1 + np.exp(-lam))), float(1 / (1 + np.exp(lam)))


def flow(name, clip):
    ts = spaced(FLOW, 25, "leading" if clip else "trailing", shift=2.0)
    network, bound = Toy(FLOW, "velocity"), bounded(clip)

    def velocity(x, s):  # (x − x0)/s
        return network.said(x, 1 - s, s) if clip is None else (x - bound(network.x0(x, 1 - s, s))) / s

    x, z = draw(2 * len(ts))
    loop = {"flow-euler": loops.flow_euler, "flow-heun": loops.flow_heun}[name]
    truth = loop(velocity, [t / 1000 for t in ts], ts[0] / 1000 * x)
    return Case(solvers.make(name, FLOW, timesteps=ts, prediction="velocity", clip=clip), network, x, z, truth)


def inversion(clip, prediction="epsilon"):
    ts = spaced(1000, 25)
    network = Toy(VP, prediction)
    images, z = draw(len(ts))
    images = 0.4 + 0.6 * images
    truth = loops.ddim_inversion(network.epsilon, levels_of(VP, ts[::-1]), images, clip)
    return Case(solvers.ddim_inversion(VP, ts, prediction=prediction, clip=clip), network, images, z, truth)


CASES = {
    "euler": lambda clip: of_edm(clip, False, False),
    "euler with churn": lambda clip: of_edm(clip, True, False),
    "euler churned from the first": lambda clip: first_churned(clip, False),
    "heun": lambda clip: of_edm(clip, False, True),
    "heun with churn": lambda clip: of_edm(clip, True, True),
    "heun churned from the first": lambda clip: first_churned(clip, True),
    "heun with churn, VP": churned_vp,
    "euler-ancestral": ancestral,
    "euler-maruyama, VP": maruyama_vp,
    "euler-maruyama, VE": maruyama_ve,
    "langevin": langevin,
    "langevin, not denoised": lambda clip: langevin(clip, False),
    "dpmpp-2s": lambda clip: dpmpp("dpmpp-2s", VP, clip),
    "dpmpp-2m": lambda clip: dpmpp("dpmpp-2m", VP, clip),
    "dpmpp-2m-sde": lambda clip: dpmpp("dpmpp-2m-sde", VP, clip),
    "dpmpp-2s, flow": lambda clip: dpmpp("dpmpp-2s", FLOW, clip),
    "dpmpp-2m, flow": lambda clip: dpmpp("dpmpp-2m", FLOW, clip),
    "dpmpp-2m-sde, flow": lambda clip: dpmpp("dpmpp-2m-sde", FLOW, clip),
    "flow-euler": lambda clip: flow("flow-euler", clip),
    "flow-heun": lambda clip: flow("flow-heun", clip),
    "ddim-inversion": inversion,
    "ddim-inversion of v": lambda clip: inversion(clip, "v"),
}
