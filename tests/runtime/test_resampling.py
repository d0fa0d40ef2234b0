"""epsrt.editing without an engine: RePaint's rows against its paper's procedure, spheres, canvases, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from epsrt import EpsrtError, Plan, Schedule, canvas, slerp
from epsrt.editing import resampled
from epsrt.plan import COLUMNS, DEFAULTS
from epsrt.solvers import make

SCHEDULE = Schedule(T=100, beta_start=1e-3, beta_end=0.2)


def papers_walk(steps, times, jump):
    """RePaint's get_schedule_jump (arXiv 2201.09865, figure 7): levels steps … 0, as (from, to); its t is level − 1."""
    left = {1 + t: times - 1 for t in range(0, steps - jump, jump)}
    level, moves = steps, []
    while level >= 1:
        moves.append((level, level - 1))
        level -= 1
        if left.get(level, 0) > 0:
            left[level] -= 1
            moves.append((level, level + jump))
            level += jump
    return moves


def levels_of(plan):
    """(α, σ) before each row and after the last, of the schedule itself."""
    alpha, sigma = SCHEDULE.at(plan["t"])
    return [*zip(alpha, sigma, strict=True), (1.0, 0.0)]


@pytest.mark.parametrize(("steps", "times", "jump"), [(6, 3, 2), (7, 2, 3), (5, 4, 1), (8, 2, 7), (9, 3, 4)])
@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_rows_run_in_the_papers_order_and_go_back_by_forward_diffusion(method, steps, times, jump):
    plan = make(method, SCHEDULE, steps=steps)
    levels, found = levels_of(plan), resampled(plan, times, jump)
    moves, row = papers_walk(steps, times, jump), 0
    while moves:
        start, end = moves.pop(0)
        i = steps - start  # the plan's row
        assert end == start - 1
        assert found["t"][row] == plan["t"][i]
        np.testing.assert_allclose((found["p"][row], found["q"][row]), (plan["p"][i], plan["q"][i]))
        alpha, sigma = levels[i + 1]
        s, n, to = 1.0, 0.0, (alpha, sigma)
        if moves and moves[0][1] > moves[0][0]:  # x = s·x + n·z, up to the level where the stretch began
            _, up = moves.pop(0)
            to = levels[steps - up]
            s = to[0] / alpha
            n = np.sqrt(to[1] ** 2 - (s * sigma) ** 2)
        for name in "abh":
            assert found[name][row] == pytest.approx(s * plan[name][i], rel=1e-12, abs=1e-15)
        assert found["d"][row] ** 2 == pytest.approx((s * plan["d"][i]) ** 2 + n**2, rel=1e-9, abs=1e-15)
        assert (found["ka"][row], found["kb"][row]) == pytest.approx(to, rel=1e-12, abs=1e-15)
        row += 1
    assert row == len(found)
    assert found["n"].tolist() == list(range(row))
    assert (found.name, found.start, found.level) == (f"{method}-resampled", plan.start, plan.level)


def test_a_learned_variance_is_followed_by_a_row_of_its_own():
    plan = make("ddpm", SCHEDULE, steps=4, variance="learned_range")
    levels, found = levels_of(plan), resampled(plan, 2, 1)
    # rows 0 | 0 1 | 1 2 | 2 3, of which those before a bar go back
    assert found["t"][[0, 2, 3, 5, 6, 8, 9]].tolist() == plan["t"][[0, 0, 1, 1, 2, 2, 3]].tolist()[:7]
    for row, back in ((1, 0), (4, 1), (7, 2)):
        (alpha, sigma), (to_alpha, to_sigma) = levels[back + 1], levels[back]
        s = to_alpha / alpha
        wanted = {"a": s, "d": np.sqrt(to_sigma**2 - (s * sigma) ** 2), "ka": to_alpha, "kb": to_sigma}
        for name in ("a", "d", "ka", "kb", *"bhcefogrs", "w"):
            assert found[name][row] == pytest.approx(wanted.get(name, DEFAULTS[name]), rel=1e-9), name
    assert found["r"][0] == plan["r"][0]
    assert found["n"].tolist() == list(range(10))


def test_once_is_the_plan_itself():
    plan = make("ddpm", SCHEDULE, steps=4)
    assert resampled(plan, 1, 2) is plan


def test_the_most_rows():
    plan = Plan.of("own", t=np.zeros(370), a=1.0)
    assert len(resampled(plan, 271, 1)) == 100_000
    with pytest.raises(EpsrtError, match="370 steps, resampled 272 times, are 100369 rows: give fewer, 100000 at most"):
        resampled(plan, 272, 1)
    assert len(resampled(plan, 2, 100)) == 370 + 100 * 3


@pytest.mark.parametrize(
    ("times", "jump", "message"),
    [
        (0, 1, "resample = 0 is outside 1 … 1000"),
        (1001, 1, "resample = 1001 is outside 1 … 1000"),
        (2, 0, "jump = 0 is outside 1 … 1000"),
        (2, 1001, "jump = 1001 is outside 1 … 1000"),
        (2, 1000, "jump = 1000 of 4 steps leaves nothing to run again: give less than 4"),
        (2, 4, "jump = 4 of 4 steps leaves nothing to run again"),
        (2.5, 1, "resample = 2.5 is not a whole number"),
        (2, "a", "jump = 'a' is not a whole number"),
    ],
)
def test_numbers_that_do_not_fit(times, jump, message):
    with pytest.raises(EpsrtError, match=message):
        resampled(make("ddpm", SCHEDULE, steps=4), times, jump)


def test_their_ends_are_in():
    plan = make("ddpm", SCHEDULE, steps=4)
    assert len(resampled(plan, 1000, 3)) == 4 + 999 * 3
    assert len(resampled(plan, 2, 3)) == 7
    assert len(resampled(Plan.of("own", t=np.zeros(1001), a=1.0), 2, 1000)) == 2001


@pytest.mark.parametrize("memory", [{"c": 0.1}, {"g": 0.1}, {"c": [0.1, 0.0, 0.0]}, {"g": [0.0, 0.0, 0.1]}])
def test_memory_is_refused(memory):
    with pytest.raises(EpsrtError, match="own remembers what came before, and resampling goes back: use ddpm, ddim or"):
        resampled(Plan.of("own", t=[3, 2, 1], a=1.0, **memory), 2, 1)


class TestSlerp:
    def test_the_formula(self):
        a, b = np.array([[[3.0, 0.0]]]), np.array([[[0.0, 2.0]]])
        path = slerp(a, b, [0, 1 / 3, 0.5, 1, -0.5])
        assert path.shape == (5, 1, 1, 2)
        turn = np.array([0, 1 / 3, 0.5, 1, -0.5]) * np.pi / 2
        np.testing.assert_allclose(path[:, 0, 0], np.stack([3 * np.cos(turn), 2 * np.sin(turn)], 1), atol=1e-6)

    def test_the_angle_is_between_directions_whatever_the_lengths(self):
        a, b = np.array([[[3.0, 0.0]]]), np.array([[[5.0, 5.0]]])
        turn = np.pi / 4
        half = np.sin(turn / 2) / np.sin(turn)
        np.testing.assert_allclose(slerp(a, b, [0.5])[0], half * (a + b), rtol=1e-6)

    def test_zeros_and_what_is_next_to_parallel(self):
        zero, one = np.zeros((1, 1, 2)), np.array([[[1.0, 0.0]]])
        np.testing.assert_allclose(slerp(zero, one, [1.0])[0], one)
        near = np.array([[[2.0, 1e-8]]])
        np.testing.assert_allclose(slerp(one, near, [0.25])[0], 0.75 * one + 0.25 * near, rtol=1e-6)

    @pytest.mark.parametrize("which", [0, 1, 2])
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_any_number_that_is_none(self, which, value):
        given = [np.ones((1, 1, 2)), np.array([[[1.0, 2.0]]]), np.array([0.1, 0.2])]
        given[which].flat[0] = value
        with pytest.raises(EpsrtError, match="slerp was given NaN or infinity"):
            slerp(*given)

    @pytest.mark.parametrize(
        ("a", "b", "fractions", "message"),
        [
            (np.ones((1, 1, 2)), np.ones((1, 2, 1)), [0.5], "slerp takes two latents of one shape, float"),
            (np.ones((1, 1, 2), int), np.ones((1, 1, 2)), [0.5], "not int64"),
            (np.ones((1, 1, 2)), np.ones((1, 1, 2), int), [0.5], "and int64"),
            (np.ones(2), np.ones(2), [0.5], r"takes two latents \[C, H, W\] and a list of fractions"),
            (np.ones((1, 1, 2)), np.ones((1, 1, 2)), 0.5, "a list of fractions"),
            (np.ones((1, 1, 2)), np.ones((1, 1, 2)), None, "a list of fractions"),
            (np.full((1, 1, 2), 1e39), np.full((1, 1, 2), 1e39), [0.5], "beyond what float32 holds: scale them"),
            (np.ones((1, 1, 2)), -np.ones((1, 1, 2)), [0.5], "latents that point in opposite directions"),
        ],
    )
    def test_what_is_refused(self, a, b, fractions, message):
        with pytest.raises(EpsrtError, match=message):
            slerp(a, b, fractions)


class TestCanvas:
    def test_the_middle_and_the_corners(self):
        images = np.arange(1.0, 13, dtype=np.float32).reshape(2, 1, 2, 3)
        for size, at, place in (
            ((5, 6), None, (1, 1)),
            ((2, 3), None, (0, 0)),
            ((4, 5), (0, 0), (0, 0)),
            ((4, 5), (2, 2), (2, 2)),
            (np.array([3, 4]), [1, 0], (1, 0)),
        ):
            known, mask = canvas(images, size, at)
            top, left = place
            inside = np.zeros(tuple(size), bool)
            inside[top : top + 2, left : left + 3] = True
            np.testing.assert_array_equal(mask, np.broadcast_to(inside, (2, 1, *size)))
            np.testing.assert_array_equal(known[..., inside], images.reshape(2, 1, 6))
            assert not known[..., ~inside].any()
            assert (known.dtype, mask.dtype) == (np.float32, np.float32)

    @pytest.mark.parametrize(
        ("images", "size", "at", "message"),
        [
            (np.zeros((1, 2, 3), np.float32), (4, 4), None, r"canvas takes images float \[n, C, h, w\], not float32"),
            (np.zeros((1, 1, 2, 3), np.uint8), (4, 4), None, "canvas takes images float .*, not uint8"),
            (np.zeros((1, 1, 2, 3)), (4,), None, r"size = \(4,\) is not a pair of whole numbers, down and across"),
            (np.zeros((1, 1, 2, 3)), (4, 4), (0, 0, 0), r"at = \(0, 0, 0\) is not a pair"),
            (np.zeros((1, 1, 2, 3)), (4, 4.5), None, "size = 4.5 is not a whole number"),
            (np.zeros((1, 1, 2, 3)), (4.5, 4), None, "size = 4.5 is not a whole number"),
            (np.zeros((1, 1, 2, 3)), (65537, 4), None, "a canvas of 65537 × 4 is over 65536 pixels a side"),
            (np.zeros((1, 1, 2, 3)), (4, 65537), None, "a canvas of 4 × 65537 is over 65536 pixels a side"),
            (np.zeros((1, 1, 2, 3)), (4, 4), (3, 0), r"images of 2 × 3 at \(3, 0\) do not fit a canvas of 4 × 4"),
            (np.zeros((1, 1, 2, 3)), (4, 4), (0, 2), "do not fit a canvas"),
            (np.zeros((1, 1, 2, 3)), (4, 4), (-1, 0), "do not fit a canvas"),
            (np.zeros((1, 1, 2, 3)), (4, 4), (0, -1), "do not fit a canvas"),
        ],
    )
    def test_what_is_refused(self, images, size, at, message):
        with pytest.raises(EpsrtError, match=message):
            canvas(images, size, at)

    def test_the_largest_side(self):
        known, _ = canvas(np.zeros((1, 1, 1, 1)), (65536, 1))
        assert known.shape == (1, 1, 65536, 1)
        known, _ = canvas(np.zeros((1, 1, 1, 1)), (1, 65536))
        assert known.shape == (1, 1, 1, 65536)


def test_columns_are_all_carried():
    """What resampling does not speak of stays."""
    plan = Plan.of("own", t=[3, 2, 1], a=1.0, in_scale=0.5, clip=2.0, j=0.3, phi=0.2)
    found = resampled(plan, 2, 1)
    for name in set(COLUMNS) - {"t", "n", "d", "ka", "kb", "a"}:
        assert (found[name] == plan[name][0]).all(), name
