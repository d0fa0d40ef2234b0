"""epsrt.solvers: coefficients that the papers state, and what is refused. Trajectories: tests/parity."""

import numpy as np
import pytest

from epsrt import EpsrtError, Plan, Schedule, solvers
from epsrt.plan import CLIP_OFF
from epsrt.solvers import METHODS, ddim, ddpm, make
from epsrt.spacing import timesteps

SCHEDULE = Schedule(T=100, beta_start=1e-3, beta_end=0.2)
ALL = range(99, -1, -1)


def test_ddpm_over_all_steps_has_the_schedules_own_betas():
    """DDPM, equations 6 and 7: the posterior's mean and variance."""
    plan, A, beta = ddpm(SCHEDULE, ALL), SCHEDULE.alpha_bar[::-1], SCHEDULE.beta[::-1]
    previous = np.append(A[1:], 1.0)
    np.testing.assert_allclose(plan["b"], np.sqrt(previous) * beta / (1 - A), rtol=1e-9)
    np.testing.assert_allclose(plan["a"], np.sqrt(1 - beta) * (1 - previous) / (1 - A), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(plan["d"][:-1] ** 2, (beta * (1 - previous) / (1 - A))[:-1], rtol=1e-9)
    large = ddpm(SCHEDULE, ALL, variance="fixed_large")
    np.testing.assert_allclose(large["d"][:-1] ** 2, beta[:-1], rtol=1e-9)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_last_ddpm_step_adds_no_noise(variance):
    for ts in (ALL, [50], [99, 3]):
        assert ddpm(SCHEDULE, ts, variance=variance)["d"][-1] == 0


def test_deterministic_ddim_adds_no_noise_and_eta_one_adds_ddpms():
    ts = timesteps(100, 20)
    assert not ddim(SCHEDULE, ts).stochastic
    np.testing.assert_allclose(ddim(SCHEDULE, ts, eta=1.0)["d"], ddpm(SCHEDULE, ts)["d"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ddim(SCHEDULE, ts, eta=0.5)["d"], ddpm(SCHEDULE, ts)["d"] / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make_plan", [ddpm, ddim, lambda *a, **k: ddim(*a, **k, rederive=True, eta=0.3)])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_a_perfect_network_is_led_to_its_image(make_plan, prediction):
    """With the true ε of x = √A x0 + √(1−A) ε, x0 is exact in each row, and so is the last x."""
    plan = make_plan(SCHEDULE, timesteps(100, 7), prediction=prediction, clip=None)
    x0, generator = 0.3, np.random.default_rng(0)
    x = generator.standard_normal()
    for i in range(len(plan)):
        k = {name: plan[name][i] for name in "pqabhd"}
        A = SCHEDULE.alpha_bar[int(plan["t"][i])]
        eps = (x - np.sqrt(A) * x0) / np.sqrt(1 - A)
        out = {"epsilon": eps, "x0": x0, "v": np.sqrt(A) * eps - np.sqrt(1 - A) * x0}[prediction]
        assert k["p"] * x + k["q"] * out == pytest.approx(x0, abs=1e-12)
        x = k["a"] * x + k["b"] * x0 + k["h"] * out + k["d"] * generator.standard_normal()
    assert x == pytest.approx(x0, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_zero_snr_is_sampled_with_x0_and_v(method, prediction):
    zero = Schedule(T=100, zero_snr=True)
    plan = make(method, zero, steps=10, prediction=prediction)
    assert plan["t"][0] == 99
    assert np.isfinite(plan.table).all()


@pytest.mark.parametrize("method", METHODS)
def test_epsilon_at_zero_snr_is_refused(method):
    zero = Schedule(T=100, zero_snr=True)
    with pytest.raises(EpsrtError, match="ε-prediction says nothing of x0 at t = 99, where ᾱ = 0: use a v or x0"):
        make(method, zero, steps=10)
    assert make(method, zero, steps=10, spacing="leading")["t"][0] == 90  # never visits it


def test_clip_is_a_bound_or_off():
    assert (ddpm(SCHEDULE, [9, 0], clip=2.5)["clip"] == 2.5).all()
    assert (ddim(SCHEDULE, [9, 0], clip=None)["clip"] == CLIP_OFF).all()
    assert (ddim(SCHEDULE, [9, 0])["clip"] == 1).all()


def test_make_passes_on_steps_spacing_and_options():
    plan = make("ddim", SCHEDULE, steps=5, spacing="linspace", eta=0.5, prediction="v", clip=3.0)
    same = ddim(SCHEDULE, timesteps(100, 5, "linspace"), eta=0.5, prediction="v", clip=3.0)
    np.testing.assert_array_equal(plan.table, same.table)
    assert plan.name == "ddim"
    assert isinstance(plan, Plan)


def test_timesteps_override_steps_and_spacing():
    plan = make("ddpm", SCHEDULE, steps=50, spacing="leading", timesteps=[70, 30, 0])
    assert plan["t"].tolist() == [70, 30, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "euler"}, "method 'euler' is unknown: use one of ddpm, ddim"),
        ({"eta": -0.1}, r"eta = -0.1 is outside \[0, 1\]"),
        ({"eta": 1.0001}, r"eta = 1.0001 is outside \[0, 1\]"),
        ({"eta": float("nan")}, "eta = nan is outside"),
        ({"prediction": "noise"}, "prediction 'noise' is unknown: use one of epsilon, x0, v"),
        ({"method": "ddpm", "prediction": "eps"}, "prediction 'eps' is unknown"),
        ({"method": "ddpm", "variance": "learned"}, "variance 'learned' is unknown: use fixed_small or fixed_large"),
        ({"method": "ddpm", "eta": 0.5}, "ddpm takes no option 'eta'; it takes prediction, clip, variance"),
        ({"variance": "fixed_small"}, "ddim takes no option 'variance'; it takes prediction, clip, eta, rederive"),
        ({"clip": 0.0}, "clip = 0.0 is not a positive bound"),
        ({"clip": -1.0}, "clip = -1.0 is not a positive bound"),
        ({"clip": float("nan")}, "clip = nan is not a positive bound"),
        ({"clip": float("inf")}, "clip = inf is not a positive bound"),
        ({"steps": 0}, "steps = 0 is outside 1 … 100"),
        ({"steps": 101}, "steps = 101 is outside 1 … 100"),
        ({"spacing": "karras"}, "spacing 'karras' is unknown"),
        ({"timesteps": [3, 3]}, "timestep 3 appears twice"),
        ({"timesteps": [3, 5]}, "timestep 5 comes after 3"),
        ({"timesteps": [100]}, "timestep 100 is not an integer in 0 … 99"),
        ({"timesteps": []}, "the list of timesteps is empty"),
    ],
)
def test_refusals_name_the_value(arguments, message):
    with pytest.raises(EpsrtError, match=message):
        make(**{"method": "ddim", "schedule": SCHEDULE, "steps": 10} | arguments)


@pytest.mark.parametrize("ts", [[5, 5], [5, 6], [100, 0], []])
@pytest.mark.parametrize("solver", [solvers.ddpm, solvers.ddim])
def test_solvers_check_their_timesteps_themselves(solver, ts):
    with pytest.raises(EpsrtError, match="timestep"):
        solver(SCHEDULE, ts)
