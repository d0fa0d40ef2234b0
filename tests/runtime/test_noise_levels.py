"""epsrt.noise_levels: what predictions say of x0 and ε in whatever units a method keeps x; a classifier's part."""

import numpy as np
import pytest

from epsrt import EpsrtError, Schedule
from epsrt.noise_levels import PREDICTIONS, visit
from epsrt.plan import CLIP_OFF
from epsrt.solvers import METHODS, make

SCHEDULES = [Schedule(T=100, beta_start=1e-3, beta_end=0.2), Schedule("ve", T=100), Schedule("flow", T=100)]
SIGMA_DATA = 0.4
WEIGHT = 3.0  # of the classifier
VISITED = {"linear": [90, 40, 3], "ve": [90, 40, 3], "flow": [90, 40.5, 3]}


def said(prediction, x, eps, alpha, sigma):
    """What a network of a prediction returns, of x = α·x0 + σ·ε: the definitions of the papers."""
    x0 = (x - sigma * eps) / alpha
    match prediction:
        case "epsilon":
            return eps
        case "x0":
            return x0
        case "v":
            return alpha * eps - sigma * x0
        case "score":
            return -eps / sigma
        case "velocity":
            return eps - x0
    s = sigma / alpha
    skip, out = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2), s * SIGMA_DATA / np.sqrt(s**2 + SIGMA_DATA**2)
    return (x0 - skip * x / alpha) / out


def network_units(prediction, alpha, sigma):
    """How many times x the network is given."""
    return 1 / np.sqrt((sigma / alpha) ** 2 + SIGMA_DATA**2) / alpha if prediction == "edm" else 1.0


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "ddim-inversion"])
def test_a_classifier_moves_x0_alike_in_every_method(schedule, prediction, method):
    """ε̂ = ε − s·σ·∇ log p(y | x) (arXiv 2105.05233, algorithm 2), of an x that each method keeps in units of its own.

    The gradient that a graph has is of what the network is given, in_scale·x.
    """
    plan = make(method, schedule, timesteps=VISITED[schedule.kind], prediction=prediction, sigma_data=SIGMA_DATA)
    told = -4 * plan["t"] if prediction == "edm" else None
    t = plan["t"] if told is None else schedule.t_at(told)
    alphas, sigmas = schedule.at(t)
    x, eps, gradient = 0.7, -1.3, 0.9  # as the schedule has them; the gradient is of x
    for row in range(len(plan)):
        alpha, sigma = alphas[row], sigmas[row]
        units = plan.levels[row][1] / sigma  # how many times x the method's own is
        mine, given = units * x, network_units(prediction, alpha, sigma) * x
        assert plan["in_scale"][row] * mine == pytest.approx(given, rel=1e-9)
        out = said(prediction, x, eps, alpha, sigma)
        out += WEIGHT * plan["j"][row] * gradient * x / given
        guided = (x - sigma * (eps - WEIGHT * sigma * gradient)) / alpha
        assert plan["p"][row] * mine + plan["q"][row] * out == pytest.approx(guided, rel=1e-7), row


@pytest.mark.parametrize("method", ["euler", "flow-euler", "euler-ancestral"])
def test_a_guided_run_in_other_units_is_ddims(method):
    """All of these are DDIM with ε from x0; in float64, with a classifier."""
    schedule, rows = SCHEDULES[0], {}
    for name, options in (("ddim", {"rederive": True}), (method, {"eta": 0.0} if method == "euler-ancestral" else {})):
        plan = make(name, schedule, steps=12, clip=None, **options)
        x = plan.start[1] * np.array([0.8, -1.1, 0.2])
        for i in range(len(plan)):
            given = plan["in_scale"][i] * x
            out = np.tanh(given + plan["t"][i] / 100) + WEIGHT * plan["j"][i] * np.cos(given)
            x0 = plan["p"][i] * x + plan["q"][i] * out
            x = plan["a"][i] * x + plan["b"][i] * x0 + plan["h"][i] * out
        rows[name] = x
    np.testing.assert_allclose(rows[method], rows["ddim"], rtol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_and_epsilon_are_read_back(schedule, prediction):
    at = visit(schedule, VISITED[schedule.kind], prediction=prediction, sigma_data=SIGMA_DATA)
    x0, eps = 0.3, -1.2
    x = at.alpha * x0 + at.sigma * eps
    out = said(prediction, x, eps, at.alpha, at.sigma)
    np.testing.assert_allclose(at.x0.p * x + at.x0.q * out, x0, rtol=1e-7)
    np.testing.assert_allclose(at.epsilon.p * x + at.epsilon.q * out, eps, rtol=1e-7)


def test_levels_are_the_schedules_and_end_clean():
    schedule = SCHEDULES[0]
    at = visit(schedule, [90, 40, 3])
    alpha, sigma = schedule.at(np.array([90, 40, 3]))
    np.testing.assert_array_equal((at.alpha, at.sigma), (alpha, sigma))
    np.testing.assert_array_equal((at.alpha_next, at.sigma_next), ([*alpha[1:], 1], [*sigma[1:], 0]))
    np.testing.assert_allclose(at.ratio[:2], (alpha * at.sigma_next / (at.alpha_next * sigma))[:2], rtol=1e-12)
    assert at.ratio[2] == 0
    assert at.clip == 1.0
    part = at.take(slice(1, None))
    np.testing.assert_array_equal(part.sigma_next, at.sigma_next[1:])
    np.testing.assert_array_equal(part.t, [40, 3])


def test_at_pure_noise_a_classifier_says_nothing():
    """There x says nothing of the class: j is 0, and finite elsewhere."""
    at = visit(Schedule(T=100, zero_snr=True), [99, 50], prediction="v")
    j = at.columns()["j"]
    assert j[0] == 0
    assert j[1] != 0
    assert np.isfinite(j).all()


@pytest.mark.parametrize(("value", "fits"), [(1e-6, True), (0.9e-6, False), (1e6, True), (1.1e6, False)])
def test_the_range_of_sigma_data(value, fits):
    if fits:
        assert visit(SCHEDULES[0], [50], sigma_data=value).sigma_data == value
    else:
        with pytest.raises(EpsrtError, match="sigma_data = .* is outside 1e-6 … 1e6: EDM's is 0.5"):
            visit(SCHEDULES[0], [50], sigma_data=value)


def test_the_bounds_of_clip():
    for clip in (1.5 / CLIP_OFF, 0.9 * CLIP_OFF):
        assert visit(SCHEDULES[0], [50], clip=clip).clip == clip
    for clip in (1 / CLIP_OFF, CLIP_OFF):  # the one that means none, and its inverse
        with pytest.raises(EpsrtError, match="is not a positive bound: give one, or None for no clipping"):
            visit(SCHEDULES[0], [50], clip=clip)
    assert visit(SCHEDULES[0], [50], clip=None).clip == CLIP_OFF
