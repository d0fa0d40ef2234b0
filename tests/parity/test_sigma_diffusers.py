"""Whole trajectories against diffusers' schedulers in σ and λ: Euler, Heun, DPM-Solver++, flow matching.

x of Euler and Heun is in units of α on both sides; for Euler ancestral diffusers' is. Their state is float32 too.
"""

import numpy as np
import pytest
import torch
from theirs import (
    TIGHT,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    ready,
    trajectory,
)
from toy import Toy, begin, draw, run_plan

from epsrt import Schedule, solvers
from epsrt.timesteps import spaced

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs
SCHEDULE, FLOW = Schedule(), Schedule("flow")
BETAS = {"beta_start": 1e-4, "beta_end": 0.02}  # Heun has defaults of its own
OURS = {EulerDiscreteScheduler: solvers.euler, HeunDiscreteScheduler: solvers.heun}
CLIP = {None: {}, 1.0: {"thresholding": True, "sample_max_value": 1.0}}  # its quantile has no say then


def at_most(diffusers, figure):
    return figure if diffusers == "float32" else TIGHT


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("kind", OURS)
def test_euler_and_heun(kind, spacing, prediction, monkeypatch, diffusers, held):
    for steps in (10, 50):
        x, z = draw(2 * steps)
        made = ready(kind, steps, prediction, timestep_spacing=spacing, **BETAS)
        plan = OURS[kind](SCHEDULE, spaced(1000, steps, spacing), prediction=prediction, clip=None)
        if spacing == "leading":
            assert plan.start[1] == pytest.approx(float(made.init_noise_sigma), rel=1e-5)
        network = Toy(SCHEDULE, prediction)
        theirs = trajectory(made, network, begin(plan, x), z, monkeypatch)
        held(plan.name, diffusers, run_plan(plan, network, x, z), theirs, at_most(diffusers, 1e-5))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_heun_clipped(prediction, monkeypatch, diffusers, held):
    x, z = draw(40)
    made = ready(HeunDiscreteScheduler, 20, prediction, timestep_spacing="leading", clip_sample=True, **BETAS)
    plan = solvers.heun(SCHEDULE, spaced(1000, 20, "leading"), prediction=prediction, clip=1.0)
    theirs = trajectory(made, Toy(SCHEDULE, prediction), begin(plan, x), z, monkeypatch)
    held("heun, clip 1", diffusers, run_plan(plan, Toy(SCHEDULE, prediction), x, z), theirs, at_most(diffusers, 1e-5))


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("named", ["karras", "exponential"])
@pytest.mark.parametrize("kind", OURS)
def test_karras_and_exponential_spacing(kind, named, spacing, monkeypatch, diffusers, held):
    """Their σ range is that of the timesteps which the other spacing would have chosen."""
    x, z = draw(40)
    made = ready(kind, 20, timestep_spacing=spacing, **{f"use_{named}_sigmas": True}, **BETAS)
    alpha, sigma = SCHEDULE.at([spaced(1000, 20, spacing)[i] for i in (-1, 0)])
    low, high = sigma / alpha
    ts = spaced(SCHEDULE, 20, named, sigma_min=low, sigma_max=high)
    plan = OURS[kind](SCHEDULE, ts, clip=None)
    np.testing.assert_allclose(plan["t"], made.timesteps.numpy(), rtol=0, atol=0.02 if diffusers == "float32" else 1e-7)
    theirs = trajectory(made, Toy(SCHEDULE), begin(plan, x), z, monkeypatch)
    held(f"{plan.name} on {named}", diffusers, run_plan(plan, Toy(SCHEDULE), x, z), theirs, at_most(diffusers, 1e-5))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_euler_ancestral(spacing, prediction, monkeypatch, diffusers, held):
    for steps in (10, 50):
        x, z = draw(steps)
        ts = spaced(1000, steps, spacing)
        made = ready(EulerAncestralDiscreteScheduler, steps, prediction, timestep_spacing=spacing)
        network = Toy(SCHEDULE, prediction)
        theirs = trajectory(made, network, x / float(SCHEDULE.at(ts[0])[0]), z, monkeypatch)
        ours = run_plan(solvers.euler_ancestral(SCHEDULE, ts, prediction=prediction, clip=None), network, x, z)
        held("euler-ancestral", diffusers, ours, theirs, at_most(diffusers, 1e-5))


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("spacing", ["trailing", "quadratic", "linspace"])
@pytest.mark.parametrize("clip", CLIP)
@pytest.mark.parametrize(
    ("solver", "algorithm", "figure"),
    [(solvers.dpmpp_2m, "dpmsolver++", 7e-5), (solvers.dpmpp_2m_sde, "sde-dpmsolver++", 2e-5)],
)
def test_dpmpp_2m(solver, algorithm, figure, clip, spacing, prediction, monkeypatch, diffusers, held):
    for steps in (5, 14, 40):
        x, z = draw(steps)
        ts = spaced(1000, steps, spacing)
        made = ready(DPMSolverMultistepScheduler, ts, prediction, algorithm_type=algorithm, **CLIP[clip])
        network = Toy(SCHEDULE, prediction)
        theirs = trajectory(made, network, x, z, monkeypatch)
        plan = solver(SCHEDULE, ts, prediction=prediction, clip=clip)
        allowed = at_most(diffusers, 5e-5 if spacing == "linspace" else figure)  # its last rows are close in λ
        held(f"{plan.name}, clip {clip}", diffusers, run_plan(plan, network, x, z), theirs, allowed)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpmpp_2m_of_a_flow(algorithm, shift, monkeypatch, diffusers, held):
    """Theirs rounds the network's t down to integers; it is told ours."""
    x, z = draw(20)
    options = {"use_flow_sigmas": True, "flow_shift": shift, "algorithm_type": algorithm}
    made = ready(DPMSolverMultistepScheduler, 20, "velocity", **options)
    made.set_begin_index(0)
    ts = (made.sigmas[:-1].double() * 1000).tolist()
    plan = {"dpmsolver++": solvers.dpmpp_2m, "sde-dpmsolver++": solvers.dpmpp_2m_sde}[algorithm](
        FLOW, ts, prediction="velocity", clip=None
    )
    network = Toy(FLOW, "velocity")
    theirs = trajectory(made, network, begin(plan, x), z, monkeypatch, told=ts)
    held(f"{plan.name} of a flow", diffusers, run_plan(plan, network, x, z), theirs, at_most(diffusers, 2e-6))


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("clip", CLIP)
def test_dpmpp_2s(clip, prediction, monkeypatch, diffusers, held):
    """Their grid contains the middles, at whole timesteps: it is given ours, and so is the network."""
    for steps in (5, 20):
        x, z = draw(2 * steps)
        plan = solvers.dpmpp_2s(SCHEDULE, spaced(1000, steps), prediction=prediction, clip=clip)
        made = ready(DPMSolverSinglestepScheduler, len(plan), prediction, lower_order_final=True, **CLIP[clip])
        assert made.order_list == [1, 2] * (steps - 1) + [1]
        alpha, sigma = SCHEDULE.at(plan["t"])
        made.sigmas = torch.from_numpy(np.append(sigma / alpha, 0.0)).to(made.sigmas.dtype)
        made.set_begin_index(0)
        network = Toy(SCHEDULE, prediction)
        theirs = trajectory(made, network, x, z, monkeypatch, told=plan["t"])
        held(f"dpmpp-2s, clip {clip}", diffusers, run_plan(plan, network, x, z), theirs, at_most(diffusers, 2e-6))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 30])
def test_flow_euler(steps, shift, monkeypatch, diffusers, held):
    """They shift sigma_min twice unless the σ are given: so given."""
    x, z = draw(steps)
    made = FlowMatchEulerDiscreteScheduler(shift=shift)
    made.set_timesteps(sigmas=np.linspace(1, 1 / 1000, steps))
    ts = spaced(FLOW, steps, "linspace", shift=shift)
    np.testing.assert_allclose(ts, made.timesteps.numpy(), rtol=1e-6)
    plan = solvers.flow_euler(FLOW, ts, prediction="velocity", clip=None)
    network = Toy(FLOW, "velocity")
    theirs = trajectory(made, network, x, z, monkeypatch)
    held("flow-euler", diffusers, run_plan(plan, network, x, z), theirs, at_most(diffusers, 1e-5))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 30])
def test_flow_heun(steps, shift, monkeypatch, diffusers, held):
    x, z = draw(2 * steps)
    made = FlowMatchHeunDiscreteScheduler(shift=shift)
    made.set_timesteps(steps)
    ts = made.sigmas.unique().flip(0)[:-1].double() * 1000  # theirs ends at a sigma_min that is shifted twice
    if shift == 1:
        np.testing.assert_allclose(spaced(FLOW, steps, "linspace"), ts, rtol=1e-6)
    plan = solvers.flow_heun(FLOW, ts.tolist(), prediction="velocity", clip=None)
    network = Toy(FLOW, "velocity")
    theirs = trajectory(made, network, x, z, monkeypatch)
    held("flow-heun", diffusers, run_plan(plan, network, x, z), theirs, at_most(diffusers, 1e-5))
