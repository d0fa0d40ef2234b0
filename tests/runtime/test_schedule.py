"""epsrt.schedule: ᾱ against closed forms, and what it refuses."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from epsrt import EpsrtError, Schedule

RANGE = (1e-4, 0.02)
KINDS = ("linear", "scaled-linear", "cosine", "sigmoid")


def product(betas):
    """∏ (1 − β), by an exactly rounded sum of logarithms."""
    logs = [math.log1p(-b) for b in betas]
    return np.array([math.exp(math.fsum(logs[: t + 1])) for t in range(len(logs))])


def betas_of(kind, T):
    start, end = RANGE
    share = [t / (T - 1) for t in range(T)]
    match kind:
        case "linear":
            return [start + (end - start) * s for s in share]
        case "scaled-linear":
            return [(math.sqrt(start) + (math.sqrt(end) - math.sqrt(start)) * s) ** 2 for s in share]
        case "sigmoid":
            return [start + (end - start) / (1 + math.exp(6 - 12 * s)) for s in share]


@pytest.mark.parametrize("T", [2, 37, 1000])
@pytest.mark.parametrize("kind", ["linear", "scaled-linear", "sigmoid"])
def test_alpha_bar_is_the_product_of_the_betas_closed_form(kind, T):
    schedule = Schedule(kind, T, *RANGE)
    np.testing.assert_allclose(schedule.beta, betas_of(kind, T), rtol=0, atol=1e-15)
    np.testing.assert_allclose(schedule.alpha_bar, product(betas_of(kind, T)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("T", [4, 50, 1000])
def test_cosine_alpha_bar_has_its_own_closed_form(T):
    def f(t):
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    bar = np.array([f(t + 1) / f(0) for t in range(T)])
    schedule = Schedule("cosine", T)
    np.testing.assert_allclose(schedule.alpha_bar[:-1], bar[:-1], rtol=0, atol=1e-12)
    assert schedule.beta[-1] == 0.999  # the last would be 1
    assert schedule.alpha_bar[-1] == pytest.approx(bar[-2] * 1e-3, rel=1e-9)


def test_given_betas_are_used_as_they_are():
    betas = [0.1, 0.5, 0.25]
    schedule = Schedule.given(betas)
    assert (schedule.T, schedule.betas) == (3, tuple(betas))
    np.testing.assert_allclose(schedule.alpha_bar, [0.9, 0.45, 0.3375], rtol=0, atol=1e-15)
    np.testing.assert_array_equal(schedule.beta, betas)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_snr_keeps_the_first_step_and_moves_the_last_to_zero(kind):
    plain, zero = Schedule(kind, 200), Schedule(kind, 200, zero_snr=True)
    root, last = np.sqrt(plain.alpha_bar), np.sqrt(plain.alpha_bar[-1])
    closed = ((root - last) * root[0] / (root[0] - last)) ** 2  # arXiv 2305.08891, algorithm 1
    np.testing.assert_allclose(zero.alpha_bar, closed, rtol=0, atol=1e-12)
    assert zero.alpha_bar[0] == pytest.approx(plain.alpha_bar[0], abs=1e-15)


@pytest.mark.parametrize("schedule", [Schedule(), Schedule("cosine", 64), Schedule("sigmoid", zero_snr=True)])
def test_alpha_bar_beta_and_snr_belong_together(schedule):
    A = schedule.alpha_bar
    assert A.dtype == schedule.beta.dtype == schedule.snr.dtype == np.float64
    assert (np.diff(A) < 0).all()
    np.testing.assert_allclose(np.cumprod(1 - schedule.beta), A, rtol=0, atol=1e-13)
    np.testing.assert_allclose(schedule.snr, A / (1 - A), rtol=1e-15)


def test_defaults_are_ddpms():
    assert Schedule() == Schedule("linear", 1000, 1e-4, 0.02, (), False)
    assert hash(Schedule()) == hash(Schedule())


def test_one_step_schedules():
    assert Schedule(T=1).alpha_bar == pytest.approx([1 - 1e-4])
    assert Schedule(T=1, zero_snr=True).alpha_bar.tolist() == [0]


@pytest.mark.parametrize("name", ["alpha_bar", "beta", "snr"])
def test_nobody_can_change_a_schedule(name):
    schedule = Schedule(T=5)
    with pytest.raises(ValueError, match="read-only"):
        getattr(schedule, name)[0] = 1
    with pytest.raises(FrozenInstanceError):
        schedule.T = 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "exponential"}, "'exponential' is unknown: use one of linear, scaled-linear"),
        ({"kind": "given"}, "a given schedule needs betas"),
        ({"kind": "linear", "betas": (0.1,)}, "a linear schedule takes no betas"),
        ({"kind": "given", "T": 3, "betas": (0.1, 0.2)}, "T is 3 but 2 betas are given"),
        ({"T": 0}, "not T = 0"),
        ({"T": -5}, "not T = -5"),
        ({"T": 1_000_001}, "not T = 1000001"),
        ({"T": 100.0}, "not T = 100.0"),
        ({"T": True}, "not T = True"),
        ({"beta_start": 0.0}, r"beta\[0\] = 0 is outside \(0, 1\)"),
        ({"beta_start": 1e-20, "beta_end": 1e-19}, "beta.0. = 1e-20 adds no noise that float64 can tell from none"),
        ({"beta_start": -1e-4}, r"beta\[0\] = -0.0001 is outside"),
        ({"beta_end": 1.0}, r"beta\[999\] = 1 is outside"),
        ({"beta_end": math.nan}, "beta_end = nan is not a number"),
        ({"beta_start": "a"}, "beta_start = 'a' is not a number"),
        ({"sigma_max": None}, "sigma_max = None is not a number"),
        ({"zero_snr": "no"}, "zero_snr = 'no' is not true or false"),
        ({"beta_end": math.inf}, "is outside"),
        ({"kind": "scaled-linear", "beta_start": -1e-4}, r"beta\[0\] = -0.0001"),
        ({"kind": "given", "T": 2, "betas": (1.0, 0.1)}, r"beta\[0\] = 1 is outside"),
        ({"kind": "given", "T": 1, "betas": (1.0,)}, r"beta\[0\] = 1 is outside"),
        ({"kind": "ve", "sigma_min": 0.0}, "a ve schedule needs 0 < sigma_min < sigma_max and T ≥ 2, not 0, 80"),
        ({"kind": "ve", "sigma_min": 90.0}, "a ve schedule needs 0 < sigma_min < sigma_max"),
        ({"kind": "ve", "sigma_max": math.inf}, "a ve schedule needs 0 < sigma_min < sigma_max"),
        ({"kind": "ve", "T": 1}, "a ve schedule needs .* and 1"),
        ({"kind": "flow", "zero_snr": True}, "a flow schedule takes no zero_snr"),
        ({"kind": "given", "T": 2, "betas": (0.1, 1.0), "zero_snr": True}, r"beta\[1\] = 1 is outside"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_refusals_name_the_value(arguments, message):
    with pytest.raises(EpsrtError, match=message):
        Schedule(**arguments)


@pytest.mark.parametrize("betas", [0.1, [[0.1, 0.2]]])
def test_given_takes_a_list(betas):
    with pytest.raises(EpsrtError, match="betas must be a list of numbers"):
        Schedule.given(betas)


def test_given_without_betas_is_refused():
    with pytest.raises(EpsrtError, match="a given schedule needs betas"):
        Schedule.given([])


@pytest.mark.parametrize("schedule", [Schedule("cosine", 300), Schedule(T=40, zero_snr=True)])
def test_a_schedule_from_its_alpha_bar(schedule):
    made = Schedule.of_alpha_bar(schedule.alpha_bar)
    assert made.T == schedule.T
    np.testing.assert_allclose(made.alpha_bar, schedule.alpha_bar, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("bar", "message"),
    [
        ([0.9, 0.95, 0.1], r"alpha_bar\[1\] = 0.95 is not below the one before it, 0.9"),
        ([0.9, 0.5, 0.5], r"alpha_bar\[2\] = 0.5 is not below the one before it, 0.5"),
        ([1.0, 0.5], r"alpha_bar\[0\] = 1 is outside \(0, 1\)"),
        ([1.2, 0.5], r"alpha_bar\[0\] = 1.2 is outside"),
        ([0.9, 0.0, 0.0], r"alpha_bar\[1\] = 0 is outside \(0, 1\): only the last may be 0"),
        ([0.9, 1e-17], r"alpha_bar\[1\] = 1e-17 is lost beside 0.9: give 0, pure noise"),
        ([0.9, -0.1], r"alpha_bar\[1\] = -0.1 is outside"),
        ([0.9, math.nan, 0.1], r"alpha_bar\[1\] = nan is outside"),
        ([], "alpha_bar must be a list"),
        (0.5, "alpha_bar must be a list"),
    ],
)
def test_alpha_bar_that_does_not_decrease_or_leaves_its_range_is_refused(bar, message):
    with pytest.raises(EpsrtError, match=message):
        Schedule.of_alpha_bar(bar)


def test_ve_is_geometric_and_flow_is_straight():
    alpha, sigma = Schedule("ve", 5, sigma_min=0.01, sigma_max=100).at(np.arange(5))
    assert alpha.tolist() == [1] * 5
    np.testing.assert_allclose(sigma, [0.01, 0.1, 1, 10, 100], rtol=1e-12)
    alpha, sigma = Schedule("flow", 10).at([10, 5, 2.5])
    assert alpha.tolist() == [0, 0.5, 0.75]
    assert sigma.tolist() == [1, 0.5, 0.25]
    np.testing.assert_allclose(Schedule("ve").snr, Schedule("ve").at(np.arange(1000))[1] ** -2)
    assert Schedule("flow", 4).snr[-1] == 0


@pytest.mark.parametrize("kind", ["ve", "flow"])
def test_what_has_no_betas_says_so(kind):
    for name in ("alpha_bar", "beta"):
        with pytest.raises(EpsrtError, match=f"a {kind} schedule has no betas and no ᾱ: use at"):
            getattr(Schedule(kind), name)


@pytest.mark.parametrize("schedule", [Schedule(), Schedule("cosine", 77), Schedule("ve", 50), Schedule("flow", 20)])
def test_timesteps_and_log_snr_invert_each_other(schedule):
    low, high = schedule.span
    t = np.append(np.linspace(low, high - 1, 63), [low, high - 1])
    alpha, sigma = schedule.at(t)
    np.testing.assert_allclose(schedule.t_at(np.log(alpha / sigma)), t, rtol=0, atol=1e-8)
    t2, alpha2, sigma2 = schedule.level(np.log(alpha / sigma))
    for mine, want in ((t2, t), (alpha2, alpha), (sigma2, sigma)):
        np.testing.assert_allclose(mine, want, rtol=1e-7, atol=1e-8)


def test_between_timesteps_log_snr_is_linear():
    schedule = Schedule(T=100)
    lam = np.log(schedule.snr) / 2
    alpha, sigma = schedule.at([30.25])
    assert np.log(alpha / sigma)[0] == pytest.approx(0.75 * lam[30] + 0.25 * lam[31], abs=1e-12)
    assert alpha**2 + sigma**2 == pytest.approx(1)
    np.testing.assert_array_equal(schedule.at([30])[0] ** 2, np.sqrt(schedule.alpha_bar[[30]]) ** 2)


def test_beyond_its_ends_the_timestep_stays():
    for schedule in (Schedule(), Schedule("ve"), Schedule("flow")):
        assert schedule.t_at([-40.0, 40.0]) == pytest.approx([schedule.span[1], 0], abs=1e-12)


@pytest.mark.parametrize("t", [-1, -0.5, 1000.5, math.nan])
@pytest.mark.parametrize("kind", ["linear", "ve", "flow"])
def test_there_is_no_level_outside_the_schedule(kind, t):
    with pytest.raises(EpsrtError, match="leave the schedule, 0 … "):
        Schedule(kind).at([5, t])


def test_between_the_last_two_levels_of_zero_snr_there_is_none():
    zero = Schedule(T=50, zero_snr=True)
    assert zero.at([49])[0] == 0
    assert zero.at([47.5])[0] > 0
    with pytest.raises(EpsrtError, match="t between 48 and 49, where ᾱ = 0, has no level"):
        zero.at([48.5])


def test_spans():
    assert Schedule("flow", 10).span == (1, 10)
    assert Schedule("ve", 10).span == Schedule(T=10).span == (0, 9)


def test_alpha_bars_of_one_and_of_three():
    assert Schedule.of_alpha_bar([0.5]).alpha_bar.tolist() == [0.5]
    np.testing.assert_allclose(Schedule.of_alpha_bar([0.5, 0.2, 0.1]).alpha_bar, [0.5, 0.2, 0.1], rtol=1e-12)
    np.testing.assert_allclose(Schedule.of_alpha_bar([0.5, 0.2, 1e-13]).alpha_bar[-1], 1e-13, rtol=1e-2)
    with pytest.raises(EpsrtError, match=r"alpha_bar\[2\] = 1e-30 is lost beside 0.2: give 0, pure noise"):
        Schedule.of_alpha_bar([0.5, 0.2, 1e-30])
    assert Schedule.of_alpha_bar([0.5, 0.2, 0.0]).alpha_bar[-1] == 0
    for bad, message in (
        ([0.0], r"alpha_bar\[0\] = 0 is outside \(0, 1\)"),
        ([0.5, 1.0], r"alpha_bar\[1\] = 1 is outside"),
        ([0.5, 0.5], r"alpha_bar\[1\] = 0.5 is not below the one before it, 0.5"),
        ([0.5, 0.0, 0.0], r"alpha_bar\[1\] = 0 is outside"),
        ([], r"alpha_bar must be a list of numbers, not an array of shape \[0\]"),
        ([[0.5]], r"not an array of shape \[1, 1\]"),
    ):
        with pytest.raises(EpsrtError, match=message):
            Schedule.of_alpha_bar(bad)


@pytest.mark.parametrize("schedule", [Schedule(T=50), Schedule("cosine", 50), Schedule("ve", 50), Schedule("flow", 50)])
def test_timesteps_and_levels_are_each_others_inverse(schedule):
    t = np.array([1.0, 2.25, 17.5, 48.0, 49.0])
    alpha, sigma = schedule.at(t)
    log_snr = np.log(alpha / sigma)
    np.testing.assert_allclose(schedule.t_at(log_snr), t, rtol=1e-9)
    again, a, s = schedule.level(log_snr)
    np.testing.assert_allclose(again, t, rtol=1e-9)
    np.testing.assert_allclose((a, s), (alpha, sigma), rtol=1e-9)
    assert schedule.t_at([99.0, -99.0]).tolist() == pytest.approx([0, schedule.span[1]])  # clamped
    _, a, s = schedule.level(np.array([-20.0]))  # and goes on beyond
    assert np.log(a / s) == pytest.approx(-20, rel=1e-6)


@pytest.mark.parametrize(("t", "fits"), [(0, True), (9, True), (9.01, False), (-0.01, False), (np.nan, False)])
def test_timesteps_outside_the_schedule(t, fits):
    if fits:
        assert len(Schedule(T=10).at([t])) == 2
        return
    with pytest.raises(EpsrtError, match="leave the schedule, 0 … 9"):
        Schedule(T=10).at([t])


def test_between_the_last_two_of_zero_snr_there_is_no_level():
    zero = Schedule(T=10, zero_snr=True)
    for t in ([8], [9], [7.5], [9, 7.5]):
        assert np.isfinite(zero.at(t)).all()
    for t in (8.001, 8.999):
        with pytest.raises(EpsrtError, match="t between 8 and 9, where ᾱ = 0, has no level: use whole ones"):
            zero.at([t])
    assert Schedule(T=10).at([8.5])[0] > Schedule(T=10).at([9])[0]
