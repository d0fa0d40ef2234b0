"""epsrt.plan: the table, what it refuses, and the identity row."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from epsrt import COLUMNS, EpsrtError, Plan, Schedule, idle_row
from epsrt.plan import CLIP_OFF, DEFAULTS, MAX_N, STEP_COLUMNS
from epsrt.solvers import make

SCHEDULE = Schedule(T=100, beta_start=1e-3, beta_end=0.2)


def test_columns_are_the_designs():
    assert " ".join(COLUMNS) == "t in_scale p q clip a b h c d e f o g n r w phi s j ka kb"
    assert " ".join(STEP_COLUMNS) == "t in_scale p q clip a b h c d e f o g n"


def test_of_broadcasts_numbers_and_fills_the_rest_with_defaults():
    plan = Plan.of("some", t=[2, 1, 0], a=0.5, h=[-1, -2, -3])
    assert len(plan) == 3
    assert plan.name == "some"
    assert plan.start == (0.0, 1.0)
    assert plan["t"].tolist() == [2, 1, 0]
    assert plan["a"].tolist() == [0.5] * 3
    assert plan["h"].tolist() == [-1, -2, -3]
    for column in set(COLUMNS) - {"t", "a", "h", "n"}:
        assert (plan[column] == DEFAULTS[column]).all(), column


def test_defaults_take_nothing_from_a_sampler_that_does_not_speak_of_them():
    others = {"in_scale": 1.0, "clip": CLIP_OFF, "w": 1.0, "ka": 1.0}
    assert dict.fromkeys(COLUMNS, 0.0) | others == DEFAULTS
    assert np.isfinite(np.float32(CLIP_OFF))


def test_noise_indices_count_unless_given():
    assert Plan.of("some", t=[3, 2, 1])["n"].tolist() == [0, 1, 2]
    assert Plan.of("some", t=[3, 2, 1], n=[7, 7, MAX_N - 1])["n"].tolist() == [7, 7, MAX_N - 1]
    assert len(Plan.of("one row", a=1.0)) == 1


def test_unknown_columns_are_named():
    with pytest.raises(EpsrtError, match="no column 'sigma'; the columns are t, in_scale"):
        Plan.of("some", sigma=1.0)
    with pytest.raises(EpsrtError, match="no column 'x'"):
        Plan.of("some", t=1.0)["x"]


@pytest.mark.parametrize("columns", [{"t": [1, 2], "a": [1, 2, 3]}, {"t": [[1, 2]]}, {"t": []}])
def test_other_lengths_are_refused(columns):
    with pytest.raises(EpsrtError, match="columns must be lists of one length|a plan is a table"):
        Plan.of("some", **columns)


@pytest.mark.parametrize("shape", [(0, len(COLUMNS)), (3, len(COLUMNS) - 1), (len(COLUMNS),), (1, 2, len(COLUMNS))])
def test_tables_of_another_shape_are_refused(shape):
    with pytest.raises(EpsrtError, match=r"a plan is a table \[steps ≥ 1, 22\], not \["):
        Plan(np.zeros(shape))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(value):
    with pytest.raises(EpsrtError, match=f"plan 'some': h is {value} in row 1"):
        Plan.of("some", t=[1, 0], h=[0, value])


@pytest.mark.parametrize("n", [-1, 0.5, MAX_N])
def test_noise_indices_outside_their_range_are_refused(n):
    with pytest.raises(EpsrtError, match="noise indices n must be integers in 0 … 16777215"):
        Plan.of("some", t=[1, 0], n=[0, n])


def test_cut_keeps_noise_indices_name_and_rows():
    plan = Plan.of("some", t=range(9, -1, -1), d=range(10))
    part = plan.cut(3, 7)
    np.testing.assert_array_equal(part.table, plan.table[3:7])
    assert part["n"].tolist() == [3, 4, 5, 6]
    assert part["t"].tolist() == [6, 5, 4, 3]
    assert (part.name, part.start) == ("some", (0.0, 1.0))
    assert plan.cut(8)["n"].tolist() == [8, 9]
    assert plan.cut(8, start=(0.6, 0.8)).start == (0.6, 0.8)
    with pytest.raises(EpsrtError, match=r"cut\(10, None\) leaves none of the 10 rows of plan 'some'"):
        plan.cut(10)


def test_rows_select_columns_in_their_order_as_contiguous_float32():
    plan = Plan.of("some", t=[3, 2], a=[0.1, 0.2], d=1 / 3)
    rows = plan.rows(("d", "t", "a"))
    assert rows.dtype == np.float32
    assert rows.flags.c_contiguous
    np.testing.assert_array_equal(rows, np.array([[1 / 3, 3, 0.1], [1 / 3, 2, 0.2]], np.float32))
    assert plan.rows(COLUMNS).shape == (2, 22)


def test_noise_indices_survive_float32():
    n = [0, 1, 999_999, MAX_N - 1]
    rows = Plan.of("some", t=0.0, n=n).rows(STEP_COLUMNS)
    assert rows[:, STEP_COLUMNS.index("n")].astype(int).tolist() == n


@pytest.mark.parametrize(("column", "value", "feature"), [("w", 2.0, "guidance"), ("r", 0.1, "learned variance")])
def test_graphs_without_a_feature_refuse_plans_that_use_it(column, value, feature):
    plan = Plan.of("some", t=[1, 0], **{column: [DEFAULTS[column], value]})
    with pytest.raises(EpsrtError, match=rf"plan 'some' uses {feature} \(column '{column}'\), which this step graph"):
        plan.rows(STEP_COLUMNS)
    assert plan.rows((*STEP_COLUMNS, column))[1, -1] == np.float32(value)
    assert len(plan.cut(0, 1).rows(STEP_COLUMNS)) == 1  # this row asks for nothing


def test_a_plan_is_a_copy_that_nobody_can_change():
    table = np.zeros((2, len(COLUMNS)))
    plan = Plan(table)
    table[0, 0] = 5
    assert plan["t"][0] == 0
    with pytest.raises(ValueError, match="read-only"):
        plan.table[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        plan["t"][0] = 1
    with pytest.raises(FrozenInstanceError):
        plan.start = (1.0, 0.0)


def test_stochastic_is_whether_a_step_adds_noise():
    assert Plan.of("some", d=[0, -0.1]).stochastic
    assert not Plan.of("some", t=[1, 0]).stochastic


@pytest.mark.parametrize("columns", [COLUMNS, STEP_COLUMNS, STEP_COLUMNS[::-1]])
def test_idle_row_is_the_identity(columns):
    row = idle_row(columns)
    assert row.dtype == np.float32
    k = {**DEFAULTS, **dict(zip(columns, row.tolist(), strict=True))}
    x, m, out, z = 1.7, -0.3, 5.0, 11.0
    x0 = min(max(k["p"] * x + k["q"] * out, -k["clip"]), k["clip"])
    assert k["a"] * x + k["b"] * x0 + k["h"] * out + k["c"] * m + k["d"] * z == x
    assert k["e"] * x + k["f"] * x0 + k["o"] * out + k["g"] * m == m
    Plan.of("idle", **dict(zip(columns, row.tolist(), strict=True))).rows(STEP_COLUMNS)  # needs no feature


@pytest.mark.parametrize("start", [(1.0,), 3, (float("nan"), 1.0), (0.0, float("inf")), ("a", 1.0), (0.0, 1.0, 2.0)])
def test_a_start_is_two_finite_numbers(start):
    with pytest.raises((EpsrtError, TypeError), match="start|iterable"):
        Plan.of("odd", start, t=[1])


def test_values_that_float32_cannot_hold_are_named():
    with pytest.raises(EpsrtError, match="d is 1e.300 in row 1"):
        Plan.of("huge", t=[2, 1], d=[0, 1e300])


def test_the_level_of_a_plan_of_ones_own_is_pure_noise():
    assert Plan.of("some", t=1.0).level == Plan(np.zeros((1, len(COLUMNS)))).level == (0.0, 1.0)


class TestBegun:
    """Plans that begin from noised images, at a later row."""

    def test_a_method_without_memory_begins_at_the_row(self):
        whole = make("ddim", SCHEDULE, steps=8)
        for first in (0, 3, 7):
            part = whole.begun(first)
            np.testing.assert_array_equal(part.table, whole.table[first:])
            alpha, sigma = SCHEDULE.at(whole["t"][first])
            assert part.start == part.level == pytest.approx((alpha, sigma), rel=1e-12)
        assert part.name == "ddim"

    @pytest.mark.parametrize("method", ["dpmpp-2m", "dpmpp-2m-sde"])
    def test_a_row_that_would_read_the_x0_before_takes_its_own(self, method):
        whole = make(method, SCHEDULE, steps=8)
        assert whole["c"][3]
        part = whole.begun(3)
        assert len(part) == 5
        assert part["c"][0] == 0
        assert part["b"][0] == pytest.approx(whole["b"][3] + whole["c"][3], rel=1e-12)
        assert part["f"][0] == 1
        np.testing.assert_array_equal(part.table[1:], whole.table[4:])
        first = whole.begun(0)
        np.testing.assert_array_equal(first.table, whole.table)

    def test_memory_of_memory_is_taken_over_too(self):
        plan = Plan.of("own", t=[3, 2, 1], f=[0.5, 0.25, 0.0], g=[0.0, 2.0, 0.0], b=1.0, c=[0.0, 0.0, 3.0])
        part = plan.begun(1)
        assert part["f"].tolist() == [0.25 + 2.0 * 0.5, 0.0]
        assert part["g"].tolist() == [0.0, 0.0]
        assert part["b"].tolist() == [1.0, 1.0]
        np.testing.assert_array_equal(plan.begun(2).table, part.table)  # what row 1 leaves is more than an x0

    def test_memory_that_is_not_read_holds_nothing_back(self):
        plan = Plan.of("own", t=[3, 2, 1], a=1.0, e=1.0, g=[0.0, 0.0, 1.0])
        assert plan.begun(1)["t"].tolist() == [2, 1]
        reads = Plan.of("own", t=[3, 2], a=1.0, c=0.5, e=1.0)  # m is 0 at first
        np.testing.assert_array_equal(reads.begun(0).table, reads.table)

    @pytest.mark.parametrize("method", ["heun", "dpmpp-2s", "flow-heun"])
    def test_a_second_row_needs_its_first(self, method):
        whole = make(method, SCHEDULE, steps=4)
        for first, begins in ((0, 0), (1, 0), (2, 2), (3, 2), (6, 6)):
            np.testing.assert_array_equal(whole.begun(first).table, whole.table[begins:])
            assert whole.begun(first).start == tuple(whole.levels[begins])

    @pytest.mark.parametrize("first", [-1, 8])
    def test_rows_that_there_are_not(self, first):
        with pytest.raises(EpsrtError, match=f"row {first} is outside 0 … 7, the rows of plan 'ddim'"):
            make("ddim", SCHEDULE, steps=8).begun(first)


def test_a_cut_plan_knows_its_level():
    whole = make("ddim", SCHEDULE, steps=8)
    for first in (0, 5):
        assert whole.cut(first).level == tuple(whole.levels[first])
    assert whole.cut(-3).level == tuple(whole.levels[5])
    assert whole.levels[-1].tolist() == [1.0, 0.0]


def test_features_that_a_plan_needs():
    assert Plan.of("plain", t=1.0, phi=0.5, j=1.0, ka=0.5).features == ()
    assert Plan.of("all", t=[1.0, 0.0], r=[0.0, 0.1], w=[1.0, 0.9], s=[0.1, 0.0]).features == (
        "learned variance",
        "guidance",
        "classifier",
    )
