"""epsrt.timesteps: for every number of steps, and what is refused (tests/parity has diffusers' lists)."""

import math
from itertools import pairwise

import numpy as np
import pytest

from epsrt import EpsrtError, Schedule
from epsrt.timesteps import given, respaced, spaced

EVEN = ("leading", "linspace", "trailing", "quadratic")


def test_quadratic_is_ddims():
    """⌊c i²⌋ exactly; the floats of DDIM's own code truncate four of those to one less when steps are 16 or 26."""
    for steps in range(2, 30):
        code = (np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2).astype(int)[::-1]
        assert len(set(code)) == steps
        exact = [math.floor(4000 * i * i // (5 * (steps - 1) ** 2)) for i in range(steps)][::-1]
        assert spaced(1000, steps, "quadratic") == exact
        assert np.abs(code - exact).max() <= (steps in (16, 26))


def test_quadratic_ends_at_eight_tenths():
    for steps in range(2, 400):
        assert spaced(1000, steps, "quadratic")[0] == 800


def test_quadratic_moves_coinciding_steps_up():
    ts = np.array(spaced(1000, 100, "quadratic")[::-1])
    raw = np.array([800 * i * i // 99**2 for i in range(100)])
    assert len(set(raw)) < 100
    assert (ts >= raw).all()
    assert ts[:3].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(ts[60:], raw[60:])


@pytest.mark.parametrize("spacing", EVEN)
def test_every_count_gives_distinct_descending_steps_in_range(spacing):
    for steps in range(1 if spacing in ("linspace", "trailing") else 2, 1001):
        ts = spaced(1000, steps, spacing)
        assert len(ts) == steps
        assert all(a > b for a, b in pairwise(ts)), steps
        assert ts[0] <= 999
        assert ts[-1] >= 0
        assert all(type(t) is int for t in ts)


@pytest.mark.parametrize("spacing", EVEN)
def test_all_steps_are_all_timesteps(spacing):
    assert spaced(100, 100, spacing) == list(range(99, -1, -1))
    assert spaced(1, 1, spacing) == [0]


def test_trailing_is_the_default_and_starts_at_the_noise():
    assert spaced(1000, 4) == [999, 749, 499, 249]
    assert spaced(1000, 1, "linspace") == [999]


def test_numpy_counts_are_counts():
    assert spaced(1000, np.int32(4)) == spaced(1000, 4)


@pytest.mark.parametrize(
    ("steps", "spacing", "message"),
    [
        (0, "trailing", "steps = 0 is outside 1 … 100"),
        (-1, "linspace", "steps = -1 is outside"),
        (101, "trailing", "steps = 101 is outside 1 … 100"),
        (101, "leading", "steps = 101 is outside"),
        (True, "trailing", "steps = True is outside"),
        (10.0, "trailing", "steps = 10.0 is outside"),
        ("10", "trailing", "steps = '10' is outside"),
        (None, "trailing", "steps = None is outside"),
        (1, "leading", "leading spacing with 1 step visits only t = 0"),
        (1, "quadratic", "quadratic spacing with 1 step visits only t = 0"),
        (10, "karas", "'karas' is unknown: did you mean karras.*use one of leading, linspace, trailing, quadratic"),
        (10, "10,,5", "'10,,5' is unknown"),
        (0, "karras", "steps = 0 is outside 1 … 1000000"),
        (None, "lambda", "steps = None is outside"),
        (None, "ddim77", "no whole stride visits 77 of 100 timesteps"),
        (None, "0,5", "0 is outside 1 … 50, the timesteps of section 1"),
        (None, "10,51", "51 is outside 1 … 50, the timesteps of section 2"),
        (None, "1", "spacing '1' visits only t = 0"),
        (9, "ddim10", "spacing 'ddim10' has 10 steps, not 9"),
    ],
)
def test_refusals_name_the_value(steps, spacing, message):
    with pytest.raises(EpsrtError, match=message):
        spaced(100, steps, spacing)


@pytest.mark.parametrize(
    ("spacing", "options", "message"),
    [
        ("trailing", {"rho": 5}, "trailing spacing takes no option 'rho'; its options: shift"),
        ("quadratic", {"shift": 5}, "quadratic spacing takes no option 'shift'; its options: none"),
        ("trailing", {"shift": 3.0}, "shift = 3.0 is for flow schedules; this one is linear"),
        ("karras", {"rho": 0}, "rho = 0.0 is outside 0.1 … 1000: EDM's is 7"),
        ("karras", {"rho": "abc"}, "rho = 'abc' is not a number"),
        ("karras", {"rho": 1e17}, "rho = 1e.17 is outside 0.1 … 1000"),
        ("leading", {"steps_offset": 0.5}, "steps_offset = 0.5 is not a whole number"),
        ("leading", {"steps_offset": -50}, "steps_offset = -50 moves the timesteps to -50 … 850, outside 0 … 999"),
        ("leading", {"steps_offset": 10**400}, "steps_offset moves the timesteps outside 0 … 999"),
        ("leading", {"steps_offset": 500}, "steps_offset = 500 moves the timesteps to 500 … 1400"),
        ("ddim25", {"rho": 7}, "ddim25 spacing takes no option 'rho'; its options: none"),
        ("karras", {"sigma_max": 1000.0}, "sigma_max = 1000 is outside .*, the schedule's"),
        ("karras", {"sigma_min": 0.0}, "sigma_min = 0 is outside"),
        ("exponential", {"sigma_min": math.nan}, "sigma_min = nan is not a number"),
        ("lambda", {"lambda_max": 9.0}, "lambda_max = 9 is outside -5.*4.6.*, the schedule's"),
        ("karras", {"sigma_min": 20.0, "sigma_max": 2.0}, "karras spacing from σ = 2 to 20 does not descend"),
    ],
)
def test_options_that_do_not_fit(spacing, options, message):
    with pytest.raises(EpsrtError, match=message):
        spaced(Schedule(), 10, spacing, **options)
    with pytest.raises(EpsrtError, match="shift = -1.0 is outside 0.001 … 1000"):
        spaced(Schedule("flow"), 10, shift=-1)


def sigmas(schedule, ts):
    alpha, sigma = schedule.at(ts)
    return sigma / alpha


@pytest.mark.parametrize("schedule", [Schedule(), Schedule("cosine"), Schedule("ve"), Schedule("flow")])
def test_karras_exponential_and_lambda_are_their_formulas(schedule):
    ends = {"sigma_min": 0.05, "sigma_max": 9.0}
    i, n = np.arange(12), 11
    karras = (9.0 ** (1 / 5) + i / n * (0.05 ** (1 / 5) - 9.0 ** (1 / 5))) ** 5  # EDM eq. 5
    np.testing.assert_allclose(sigmas(schedule, spaced(schedule, 12, "karras", rho=5, **ends)), karras, rtol=1e-9)
    even = 9.0 * (0.05 / 9.0) ** (i / n)
    np.testing.assert_allclose(sigmas(schedule, spaced(schedule, 12, "exponential", **ends)), even, rtol=1e-9)
    lam = spaced(schedule, 12, "lambda", lambda_min=-2.0, lambda_max=2.5)
    np.testing.assert_allclose(-np.log(sigmas(schedule, lam)), -2 + i / n * 4.5, rtol=0, atol=1e-9)


@pytest.mark.parametrize("spacing", ["karras", "exponential", "lambda"])
def test_by_default_they_span_the_schedule(spacing):
    assert spaced(Schedule(), 20, spacing)[::19] == [999, 0]
    assert spaced(Schedule(), 1, spacing) == [999]
    zero = spaced(Schedule(zero_snr=True), 20, spacing)
    assert zero[0] == 998  # the noisiest that is not pure noise
    for steps in (2, 50, 1000, 3000):
        ts = spaced(Schedule(), steps, spacing)
        assert len(ts) == steps
        assert all(a > b for a, b in pairwise(ts))
    with pytest.raises(EpsrtError, match="has no noise level below infinity"):
        spaced(Schedule(T=1, zero_snr=True), 1, spacing)


def test_leading_can_be_moved_up():
    assert spaced(1000, 4, "leading", steps_offset=1) == [751, 501, 251, 1]
    assert spaced(1000, 1, "leading", steps_offset=1) == [1]


def test_a_flow_is_visited_evenly_and_shifted():
    flow = Schedule("flow", 1000)
    assert spaced(flow, 4) == [1000, 750, 500, 250]
    assert spaced(flow, 3) == pytest.approx([1000, 2000 / 3, 1000 / 3])  # not rounded
    assert spaced(flow, 3, "linspace") == pytest.approx([1000, 500.5, 1])
    assert spaced(flow, 4, shift=3.0) == pytest.approx([1000, 900, 750, 500])
    assert spaced(flow, 4, "leading") == [751, 501, 251, 1]


def test_respacing_strings():
    """improved-diffusion's own example: 300 timesteps in sections of 10, 15 and 20."""
    up = spaced(300, None, "10,15,20")[::-1]
    parts = [[t for t in up if 100 * i <= t < 100 * i + 100] for i in range(3)]
    assert [len(part) for part in parts] == [10, 15, 20]
    assert [(part[0], part[-1]) for part in parts] == [(0, 99), (100, 199), (200, 299)]
    assert parts[0] == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert spaced(1000, None, "ddim25") == list(range(0, 1000, 40))[::-1]
    assert spaced(1000, 25, "ddim25") == spaced(1000, None, "ddim25")
    assert spaced(1000, None, "ddim250") == list(range(0, 1000, 4))[::-1]
    assert spaced(100, None, "100") == list(range(99, -1, -1))
    assert spaced(100, None, "1,3") == [99, 74, 50, 0]  # the middle of 50 … 99 is 74.5, rounded to even
    assert spaced(7, None, "2,2") == [6, 4, 3, 0]  # the first section has one more


@pytest.mark.parametrize("ts", [[99, 50, 0], (7,), np.array([9, 3]), range(99, -1, -1), [5.0, 1.5]])
def test_given_lists_pass(ts):
    checked = given(Schedule(T=100), ts)
    assert checked.dtype == np.float64
    assert checked.tolist() == list(ts)


def test_a_flows_timesteps_lie_above_zero():
    assert given(Schedule("flow", 10), [10, 0.5]).tolist() == [10, 0.5]
    with pytest.raises(EpsrtError, match="timestep 0 is not a number above 0, up to 10"):
        given(Schedule("flow", 10), [10, 0])


@pytest.mark.parametrize(
    ("ts", "message"),
    [
        ([], "the list of timesteps is empty"),
        ([5, 5], "timestep 5 appears twice"),
        ([5, 6], "timestep 6 comes after 5"),
        (np.array([9, 3, 4]), "timestep 4 comes after 3"),
        ([100], "timestep 100 is not a number in 0 … 99"),
        ([5, -1], "timestep -1 is not a number"),
        ([99.5], "timestep 99.5 is not a number in 0 … 99"),
        ([True], "timestep True is not a number"),
        ([math.nan], "timestep nan is not a number"),
        ([math.inf], "timestep inf is not a number"),
        (["a"], "timestep 'a' is not a number"),
        ([None], "timestep None is not a number"),
        ([[5, 3]], r"timestep \[5, 3\] is not a number"),
        ([[5], [3, 2]], r"timestep \[5\] is not a number"),
        ([5, [3, 2]], r"timestep \[3, 2\] is not a number"),
    ],
)
def test_given_refusals_name_the_first_misfit(ts, message):
    with pytest.raises(EpsrtError, match=message):
        given(Schedule(T=100), ts)


def test_timesteps_nearer_than_a_billionth_of_the_schedule_are_one():
    for T in (100, 1000):
        schedule, near = Schedule(T=T), 1e-9 * T
        assert len(given(schedule, [50 + 1.1 * near, 50])) == 2
        with pytest.raises(EpsrtError, match="timestep 50 appears twice: timesteps must descend"):
            given(schedule, [50 + 0.9 * near, 50])
        with pytest.raises(EpsrtError, match="timestep 50.* appears twice"):
            given(schedule, [50, 50 + 0.9 * near])
        with pytest.raises(EpsrtError, match="timestep 50.* comes after 50"):
            given(schedule, [50, 50 + 1.1 * near])
        with pytest.raises(EpsrtError, match="timestep 0 appears twice"):
            given(schedule, [near, 0])  # exactly so near


FLOW = Schedule("flow")


@pytest.mark.parametrize(
    ("schedule", "spacing", "name", "inside", "outside"),
    [
        (FLOW, "trailing", "shift", 1e-3, 0.99e-3),
        (FLOW, "trailing", "shift", 1e3, 1000.5),
        (Schedule(), "karras", "rho", 0.1, 0.099),
        (Schedule(), "karras", "rho", 1e3, 1000.5),
        (Schedule("ve"), "karras", "sigma_max", 80.0, 80.1),
        (Schedule("ve"), "exponential", "sigma_min", 0.002, 0.00199),
        (Schedule("ve"), "lambda", "lambda_max", -math.log(0.002), -math.log(0.00199)),
        (Schedule("ve"), "lambda", "lambda_min", -math.log(80), -math.log(80.1)),
        (Schedule(), "leading", "steps_offset", 0, -1),
        (Schedule(), "leading", "steps_offset", 99, 100),  # 900 + 99 = T − 1
        (Schedule(), "leading", "steps_offset", 99, 1000),
    ],
)
def test_ends_of_ranges_are_in(schedule, spacing, name, inside, outside):
    assert len(spaced(schedule, 10, spacing, **{name: inside})) == 10
    with pytest.raises(EpsrtError, match=f"{name} = .*(outside|moves the timesteps)"):
        spaced(schedule, 10, spacing, **{name: outside})


def test_one_step_of_each_spacing():
    for spacing, only in (("trailing", 999), ("linspace", 999), ("karras", 999), ("exponential", 999), ("lambda", 999)):
        assert spaced(Schedule(), 1, spacing) == [only]
    assert spaced(FLOW, 1, "leading") == [1]
    assert spaced(FLOW, 1, "quadratic") == [1]
    for spacing in ("leading", "quadratic"):
        with pytest.raises(EpsrtError, match=f"{spacing} spacing with 1 step visits only t = 0"):
            spaced(2, 1, spacing)
    assert spaced(1, 1, "leading") == spaced(1, 1, "quadratic") == spaced(1, None, "1") == [0]
    assert spaced(Schedule(), 1, "karras", sigma_min=20.0, sigma_max=2.0)  # nothing to descend


def test_quadratic_is_the_papers_where_steps_are_few_and_moves_up_where_they_are_many():
    assert spaced(1000, 5, "quadratic") == [800, 450, 200, 50, 0]
    many = spaced(50, 40, "quadratic")
    assert len(set(many)) == 40
    assert many[::-1][:5] == [0, 1, 2, 3, 4]
    assert max(many) <= 49
    assert spaced(1000, 2, "quadratic") == [800, 0]


def test_the_most_steps():
    with pytest.raises(EpsrtError, match="steps = 1000001 is outside 1 … 1000000$"):
        spaced(Schedule(), 1_000_001, "karras")
    with pytest.raises(EpsrtError, match="steps = 101 is outside 1 … 100, the steps that the schedule has"):
        spaced(100, 101)
    assert len(spaced(100, 100, "leading")) == 100


@pytest.mark.parametrize(
    ("text", "timesteps"),
    [
        ("ddim100", list(range(99, -1, -1))),
        ("ddim50", list(range(98, -1, -2))),
        ("1,1", [50, 0]),
        ("50,50", list(range(99, -1, -1))),
        ("2", [99, 0]),
        ("3,1,2", [99, 67, 34, 33, 16, 0]),  # sections of 34, 33 and 33
    ],
)
def test_respacing_strings_in_full(text, timesteps):
    assert spaced(100, None, text) == timesteps


def test_words_that_are_no_respacing():
    assert respaced("ddim25")
    assert respaced("10,10,15")
    assert not any(map(respaced, ("trailing", "ddim", "ddim12345678", "10,", 25, None)))
