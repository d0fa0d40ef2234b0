"""What theory says is one trajectory: of every prediction of a network, and of methods that are another one's name."""

import numpy as np
import pytest
from toy import SIGMA_DATA, Toy, draw, largest, run_plan

from epsrt import Schedule, solvers
from epsrt.noise_levels import PREDICTIONS
from epsrt.solvers import METHODS, make
from epsrt.timesteps import spaced

SCHEDULES = {
    "vp": Schedule(), "cosine": Schedule("cosine", 400), "ve": Schedule("ve", sigma_min=0.02, sigma_max=40),
    "flow": Schedule("flow"),
}  # fmt: skip
STOCHASTIC = {
    "ddim": {"eta": 0.7},
    "euler-ancestral": {"eta": 0.7},
    "euler": {"s_churn": 5.0, "s_tmax": 5.0},
    "heun": {"s_churn": 5.0, "s_tmax": 5.0},
    "langevin": {"each": 4, "rate": 0.5},
}
CLIPS = [None, 0.7]


def grid(kind, steps=20):
    """Timesteps that avoid α = 0, where five of the predictions are refused."""
    return spaced(SCHEDULES[kind], steps, "leading" if kind == "flow" else "trailing")


def run(method, kind, ts, prediction="epsilon", **options):
    schedule = SCHEDULES[kind]
    plan = make(method, schedule, timesteps=ts, prediction=prediction, sigma_data=SIGMA_DATA, **options)
    x, z = draw(len(plan), images=16)
    return run_plan(plan, Toy(schedule, prediction), x, z)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("method", METHODS)
def test_every_prediction_is_the_same_trajectory(method, kind, clip, held):
    options = {"clip": clip, **STOCHASTIC.get(method, {})}
    ts = grid(kind)
    if method == "langevin" or (method, kind) == ("ddim-inversion", "ve"):
        ts = ts[10:]  # Langevin's few steps lose no large σ, and inversion's x would end as large
    epsilon = run(method, kind, ts, **options)
    for prediction in PREDICTIONS[1:]:
        held(method, f"ε and {prediction}", run(method, kind, ts, prediction, **options), epsilon, 1e-10)


@pytest.mark.parametrize("prediction", ["v", "velocity"])
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("euler", "heun", "langevin", "dpmpp-2s")])
def test_from_pure_noise_too(method, prediction, held):
    """At a flow's t = T and at zero terminal SNR α = 0."""
    for schedule in (Schedule("flow"), Schedule(T=200, zero_snr=True)):
        results = []
        for which in (prediction, "x0"):
            plan = make(method, schedule, steps=20, prediction=which, clip=None)
            x, z = draw(len(plan), images=16)
            results.append(run_plan(plan, Toy(schedule, which), x, z))
        held(method, f"x0 and {prediction} from α = 0", *results, 1e-10)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("other", ["euler", "flow-euler", "euler-ancestral"])
def test_euler_of_any_path_is_ddim(other, kind, clip, held):
    """The straight paths of σ/α, of s = σ/(α + σ), and DDIM's are one: ε is constant along a step."""
    options = {"eta": 0.0} if other == "euler-ancestral" else {}
    ddim = run("ddim", kind, grid(kind), rederive=True, clip=clip)
    held(other, "ddim, rederive", run(other, kind, grid(kind), clip=clip, **options), ddim, 1e-10)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("other", ["ddpm", "euler-ancestral"])
def test_ddim_of_eta_one_is_ddpm_and_euler_ancestral(other, kind, clip, held):
    """With ε from the clipped x0, for DDPM's mean knows only x and x0."""
    ddim = run("ddim", kind, grid(kind), eta=1.0, rederive=True, clip=clip)
    held(other, "ddim η = 1, rederive", run(other, kind, grid(kind), clip=clip), ddim, 1e-10)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_rederiving_changes_nothing_without_a_clip(eta, kind, held):
    results = [run("ddim", kind, grid(kind), eta=eta, rederive=which, clip=None) for which in (True, False)]
    held("ddim", "ddim, rederive", *results, 1e-10)
    results = [run("ddim", kind, grid(kind), eta=eta, rederive=which, clip=0.7) for which in (True, False)]
    assert largest(*results) > 1e-3


@pytest.mark.parametrize("kind", ["vp", "cosine"])
def test_inversion_undoes_ddim(kind):
    """Up to the step's size, halved where there are twice as many."""
    schedule, gaps = SCHEDULES[kind], []
    for steps in (50, 100):
        ts = spaced(schedule, steps, "leading")
        x, z = draw(steps, images=16)
        images = 0.4 + 0.6 * x
        noise = run_plan(solvers.ddim_inversion(schedule, ts), Toy(schedule), images, z)
        gaps.append(largest(run_plan(solvers.ddim(schedule, ts, clip=None), Toy(schedule), noise, z), images))
    assert gaps[1] < 0.65 * gaps[0] < 0.3


def test_heun_and_flow_heun_are_not_one():
    """Where the test could not tell methods apart it would say nothing: of second order the path matters."""
    ts = grid("vp")
    assert largest(run("heun", "vp", ts, clip=None), run("flow-heun", "vp", ts, clip=None)) > 1e-3
    assert largest(run("heun", "vp", ts, clip=None), run("euler", "vp", ts, clip=None)) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_rows_rounded_to_float32_cost_little_in_every_method(method):
    schedule = SCHEDULES["vp"]
    plan = make(method, schedule, steps=50)
    x, z = draw(len(plan), images=16)
    exact, rounded = (run_plan(plan, Toy(schedule), x, z, dtype) for dtype in (np.float64, np.float32))
    assert 0 < largest(exact, rounded) <= 2e-5
