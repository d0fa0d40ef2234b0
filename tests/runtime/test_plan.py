"""epsrt.plan: the table, what it refuses, and the identity row."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from epsrt import COLUMNS, EpsrtError, Plan, idle_row
from epsrt.plan import CLIP_OFF, DEFAULTS, MAX_N, STEP_COLUMNS


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
