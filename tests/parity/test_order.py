"""The order of convergence of every method, measured on Gaussian data, where the network and the solution are known.

For x0 ~ N(μ, s²) the optimal network is affine in x, so a plan carries a Gaussian to a Gaussian: mean and covariance of
(x, m) are propagated exactly, no samples drawn. x begins off the marginal, so that more than the marginal is tested.
The solution between the levels (α, σ) and (α', σ') with marginal variances v = α²s² + σ² and v':

    probability-flow ODE   x' − α'μ = √(v'/v)·(x − αμ)
    reverse SDE            x' | x ~ N(α'μ + (α/α')(v'/v)(x − αμ), v' − (α/α')²v'²/v)   (the forward process, reversed)
"""

import numpy as np
import pytest

from epsrt import Plan, Schedule
from epsrt.solvers import METHODS, make

MU, S, DATA = 0.4, 0.6, 0.5  # DATA is edm's σ_data: deliberately not s
STEPS = (40, 80, 160, 320)
PUBLISHED = {
    "ddpm": 1, "ddim": 1, "ddim-inversion": 1, "euler": 1, "heun": 2, "euler-ancestral": 1, "euler-maruyama": 1,
    "dpmpp-2s": 2, "dpmpp-2m": 2, "dpmpp-2m-sde": 2, "langevin": 1, "flow-euler": 1, "flow-heun": 2,
}  # fmt: skip
SDE = ("ddpm", "euler-ancestral", "euler-maruyama", "dpmpp-2m-sde")
SCHEDULES = {"vp": Schedule(), "ve": Schedule("ve", sigma_min=0.01, sigma_max=50), "flow": Schedule("flow")}
RANGE = {"lambda_min": -2.5, "lambda_max": 3.0}


def network(schedule, prediction, told):
    """(u, w): the optimal network's output is u·(its input) + w."""
    if prediction == "edm":
        sigma = np.exp(4 * told)
        k, c_in = S**2 / (S**2 + sigma**2), (sigma**2 + DATA**2) ** -0.5
        skip, out = DATA**2 * c_in**2, sigma * DATA * c_in
        return (k - skip) / out / c_in, MU * (1 - k) / out
    alpha, sigma = (float(v) for v in schedule.at(told))
    k = alpha * S**2 / (alpha**2 * S**2 + sigma**2)  # x0 = μ + k·(x − αμ)
    x0 = np.array([k, MU * (1 - k * alpha)])
    eps = (np.array([1.0, 0.0]) - alpha * x0) / sigma
    return {"x0": x0, "epsilon": eps, "v": alpha * eps - sigma * x0, "score": -eps / sigma, "velocity": eps - x0}[
        prediction
    ]


def carry(plan, schedule, prediction, mean, variance):
    """Mean and variance of x after all rows."""
    state, covariance = np.array([mean, 0.0]), np.diag([variance, 0.0])
    for i in range(len(plan)):
        k = {name: float(plan[name][i]) for name in ("t", "in_scale", *"pqabhcdefog")}
        u, w = network(schedule, prediction, k["t"])
        u = u * k["in_scale"]
        slope, shift = k["p"] + k["q"] * u, k["q"] * w
        step = np.array(
            [[k["a"] + k["b"] * slope + k["h"] * u, k["c"]], [k["e"] + k["f"] * slope + k["o"] * u, k["g"]]]
        )
        state = step @ state + [k["b"] * shift + k["h"] * w, k["f"] * shift + k["o"] * w]
        covariance = step @ covariance @ step.T + np.diag([k["d"] ** 2, 0.0])
    return state[0], covariance[0, 0]


def units(method, alpha, sigma):
    """What x is multiplied with in the method's own units."""
    if method in ("euler", "heun", "langevin"):
        return 1 / alpha
    return 1 / (alpha + sigma) if method.startswith("flow") else 1.0


def error(method, schedule, prediction, steps, **options):
    """Errors of mean and deviation, in units of the latter, at the last level but the clean one.

    (The step into the clean one does not shrink with the rest.)
    """
    options = {"prediction": prediction, "sigma_data": DATA, "clip": None, **options}
    plan = make(method, schedule, steps=steps, spacing="lambda", **RANGE, **options)
    ends = [schedule.at(schedule.t_at(RANGE[name])) for name in ("lambda_min", "lambda_max")]
    if method == "ddim-inversion":
        plan, ends = plan.cut(1), ends[::-1]
    else:
        plan = plan.cut(0, len(plan) - 1)
    alpha, alpha2 = (a for a, _ in ends)
    v, v2 = (a**2 * S**2 + s**2 for a, s in ends)
    shift, share = 0.7 * np.sqrt(v), 0.5  # off the marginal
    if options.get("s_churn"):
        shift, share = 0.0, 1.0
    scale, scale2 = (units(method, *end) for end in ends)
    mean, variance = carry(plan, schedule, prediction, scale * (alpha * MU + shift), scale**2 * share * v)
    slope = alpha / alpha2 * v2 / v if method in SDE else np.sqrt(v2 / v)
    left = v2 - slope**2 * v if method in SDE else 0.0
    return np.array(
        [
            abs(mean / scale2 - (alpha2 * MU + slope * shift)),
            abs(np.sqrt(variance) / scale2 - np.sqrt(slope**2 * share * v + left)),
        ]
    ) / np.sqrt(v2)


def orders(method, schedule, prediction="epsilon", **options):
    """The orders measured between the finest two, of the mean and of the deviation, but for one that is exact.

    (The mean of the ancestral methods is: x0's expectation given x is what the network says, whatever the step.)
    """
    errors = np.array([error(method, schedule, prediction, steps, **options) for steps in STEPS])
    assert errors[-1].max() < 0.05
    errors = errors[:, errors.max(0) > 1e-12]
    assert errors.size
    return np.log2(errors[-2] / errors[-1])


def test_every_method_is_measured_and_has_the_published_order():
    assert {name: m.order for name, m in METHODS.items()} == PUBLISHED


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "langevin"])
def test_the_order_is_the_published_one(method, kind, record_property):
    measured = orders(method, SCHEDULES[kind])
    record_property("order", measured.tolist())
    assert np.abs(measured - PUBLISHED[method]).max() < 0.15


@pytest.mark.parametrize("prediction", ["x0", "v", "score", "edm", "velocity"])
@pytest.mark.parametrize("method", ["ddim", "heun", "dpmpp-2m", "dpmpp-2s", "flow-heun"])
def test_the_order_is_the_same_for_every_prediction(method, prediction):
    assert np.abs(orders(method, SCHEDULES["vp"], prediction) - PUBLISHED[method]).max() < 0.15


@pytest.mark.parametrize(("method", "order"), [("heun", 2), ("euler", 1)])
def test_churn_keeps_the_order(method, order):
    """Both halves of a churned step keep the marginal: the noise exactly, the ODE's step to its order."""
    inside = {"s_churn": 10.0, "s_tmin": 0.1, "s_tmax": 5.0}  # not at the ends, where it would change the level
    errors = [error(method, SCHEDULES["ve"], "edm", steps, **inside)[1] for steps in (640, 1280)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small_log"])
def test_ddpms_other_variances_converge_too(variance):
    assert np.abs(orders("ddpm", SCHEDULES["vp"], variance=variance) - 1).max() < 0.15


@pytest.mark.parametrize("kind", SCHEDULES)
def test_langevins_bias_is_of_first_order_in_its_rate(kind):
    """At one level its stationary law has the right mean and a variance that is wrong by O(rate)."""
    schedule, biases = SCHEDULES[kind], []
    t = float(schedule.t_at(0.3))
    alpha, sigma = schedule.at(t)
    v = (alpha**2 * S**2 + sigma**2) / alpha**2  # x is in units of α
    for rate in (0.2, 0.1, 0.05):
        plan = make("langevin", schedule, timesteps=[t], each=1000, rate=rate, denoise=False)
        mean, variance = carry(plan, schedule, "epsilon", 3.0, 9.0)
        assert mean == pytest.approx(MU, abs=1e-4)
        biases.append(abs(np.sqrt(variance) - np.sqrt(v)))
    assert np.log2(biases[-2] / biases[-1]) == pytest.approx(1, abs=0.15)


def test_the_last_row_of_langevin_takes_the_estimate():
    plan = make("langevin", SCHEDULES["ve"], steps=5, each=3)
    assert len(plan) == 16
    assert plan["a"][-1] == plan["d"][-1] == 0
    assert plan["b"][-1] == 1


def test_the_measurement_sees_a_missing_memory():
    """2M whose gain is all on the present x0 is of order 1."""
    schedule, errors = SCHEDULES["vp"], []
    (alpha, sigma), (alpha2, sigma2) = (
        schedule.at(schedule.t_at(RANGE[name])) for name in ("lambda_min", "lambda_max")
    )
    v, v2 = alpha**2 * S**2 + sigma**2, alpha2**2 * S**2 + sigma2**2
    for steps in (160, 320):
        plan = make("dpmpp-2m", schedule, steps=steps, spacing="lambda", **RANGE, clip=None).cut(0, steps - 1)
        columns = {name: plan[name] for name in ("t", "p", "q", "a", "f")}
        broken = Plan.of("broken", **columns, b=plan["b"] + plan["c"])
        mean, _ = carry(broken, schedule, "epsilon", alpha * MU + np.sqrt(v), v)
        errors.append(abs(mean - alpha2 * MU - np.sqrt(v2)))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.15)
