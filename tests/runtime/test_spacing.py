"""epsrt.spacing: against diffusers' and DDIM's lists, for every number of steps, and what is refused."""

import math
from itertools import pairwise

import numpy as np
import pytest
from diffusers import DDPMScheduler

from epsrt import EpsrtError
from epsrt.spacing import SPACINGS, given, timesteps

COUNTS = [1, 2, 3, 7, 10, 20, 25, 30, 50, 64, 99, 100, 128, 250, 333, 500, 600, 999, 1000]


def diffusers_list(T, steps, spacing):
    scheduler = DDPMScheduler(T, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize("T", [100, 1000])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_lists_are_diffusers(spacing, T):
    compared = 0
    for steps in (s for s in COUNTS if s <= T):
        if steps == 1:  # diffusers visits t = 0 alone, except with trailing
            assert spacing != "trailing" or timesteps(T, 1, spacing) == diffusers_list(T, 1, spacing) == [T - 1]
            continue
        theirs = diffusers_list(T, steps, spacing)
        if len(theirs) == steps:  # its trailing list is sometimes one too long, and ends in −1
            assert timesteps(T, steps, spacing) == theirs
            compared += 1
    assert compared >= 10


def test_quadratic_is_ddims():
    """⌊c i²⌋ exactly; the floats of DDIM's own code truncate four of those to one less when steps are 16 or 26."""
    for steps in range(2, 30):
        code = (np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2).astype(int)[::-1]
        assert len(set(code)) == steps
        exact = [math.floor(4000 * i * i // (5 * (steps - 1) ** 2)) for i in range(steps)][::-1]
        assert timesteps(1000, steps, "quadratic") == exact
        assert np.abs(code - exact).max() <= (steps in (16, 26))


def test_quadratic_ends_at_eight_tenths():
    for steps in range(2, 400):
        assert timesteps(1000, steps, "quadratic")[0] == 800


def test_quadratic_moves_coinciding_steps_up():
    ts = np.array(timesteps(1000, 100, "quadratic")[::-1])
    raw = np.array([800 * i * i // 99**2 for i in range(100)])
    assert len(set(raw)) < 100
    assert (ts >= raw).all()
    assert ts[:3].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(ts[60:], raw[60:])


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_count_gives_distinct_descending_steps_in_range(spacing):
    for steps in range(1 if spacing in ("linspace", "trailing") else 2, 1001):
        ts = timesteps(1000, steps, spacing)
        assert len(ts) == steps
        assert all(a > b for a, b in pairwise(ts)), steps
        assert ts[0] <= 999
        assert ts[-1] >= 0
        assert all(type(t) is int for t in ts)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_all_steps_are_all_timesteps(spacing):
    assert timesteps(100, 100, spacing) == list(range(99, -1, -1))
    assert timesteps(1, 1, spacing) == [0]


def test_trailing_is_the_default_and_starts_at_the_noise():
    assert timesteps(1000, 4) == [999, 749, 499, 249]
    assert timesteps(1000, 1, "linspace") == [999]


def test_numpy_counts_are_counts():
    assert timesteps(1000, np.int32(4)) == timesteps(1000, 4)


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
        (10, "karras", "'karras' is unknown: use one of leading, linspace, trailing, quadratic"),
    ],
)
def test_refusals_name_the_value(steps, spacing, message):
    with pytest.raises(EpsrtError, match=message):
        timesteps(100, steps, spacing)


@pytest.mark.parametrize("ts", [[99, 50, 0], (7,), np.array([9, 3]), range(99, -1, -1), [5.0, 1.0]])
def test_given_lists_pass_as_integers(ts):
    checked = given(100, ts)
    assert checked == [int(t) for t in ts]
    assert all(type(t) is int for t in checked)


@pytest.mark.parametrize(
    ("ts", "message"),
    [
        ([], "the list of timesteps is empty"),
        ([5, 5], "timestep 5 appears twice"),
        ([5, 6], "timestep 6 comes after 5"),
        (np.array([9, 3, 4]), "timestep .*4.* comes after 3|timestep 4 comes after 3"),
        ([100], "timestep 100 is not an integer in 0 … 99"),
        ([5, -1], "timestep -1 is not an integer"),
        ([5.5], "timestep 5.5 is not an integer"),
        ([True], "timestep True is not an integer"),
        ([math.nan], "timestep nan is not an integer"),
        ([math.inf], "timestep inf is not an integer"),
        (["a"], "timestep 'a' is not an integer"),
        ([None], "timestep None is not an integer"),
    ],
)
def test_given_refusals_name_the_first_misfit(ts, message):
    with pytest.raises(EpsrtError, match=message):
        given(100, ts)
