"""Rung 2 of the ladder: whole trajectories of every method against a loop written plainly from its paper, float64."""

import numpy as np
import pytest
import torch
from cases import CASES
from toy import draw, largest, run_plan

from epsrt.plan import COLUMNS, Plan
from epsrt.solvers import METHODS

ELSEWHERE = {"ddpm", "ddim"}  # test_plans_papers: against the trainer's loops


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_papers(name, clip, held):
    case = CASES[name](clip)
    ours = run_plan(case.plan, case.network, case.x, case.z)
    held(f"{name}, clip {clip}", "loop of the paper", ours, case.truth, 1e-10)


def test_every_method_has_a_case():
    assert {CASES[name](None).plan.name for name in CASES} == set(METHODS) - ELSEWHERE


@pytest.mark.parametrize("name", CASES)
def test_it_clips(name):
    """A bound that is a little wider is another trajectory: the clipped comparisons do clip."""
    narrow, wide = (CASES[name](clip).truth for clip in (0.7, 0.707))
    assert largest(narrow, wide) > 1e-4


@pytest.mark.parametrize("name", CASES)
def test_the_comparison_sees_one_per_cent_of_one_coefficient(name):
    """Every coefficient of a middle row that is not 0, one at a time."""
    case = CASES[name](None)
    for row in (len(case.plan) // 2, len(case.plan) // 2 - 1):
        for column in ("t", "in_scale", *"pqabhcdefog"):
            if case.plan[column][row] == 0 or used(case.plan, row, column) == 0:
                continue
            table = case.plan.table.copy()
            table[row, COLUMNS.index(column)] *= 1.01
            damaged = Plan(table, case.plan.start)
            assert largest(run_plan(damaged, case.network, case.x, case.z), case.truth) > 1e-7, (column, row)


def used(plan, row, column):
    """0 for a coefficient of the memory that no later row reads."""
    return plan["c"][row + 1] if column in "efog" else 1


@pytest.mark.parametrize("name", ["heun churned from the first", "euler", "langevin", "euler-maruyama, VE"])
def test_the_comparison_sees_one_per_cent_of_the_start(name):
    case = CASES[name](None)
    signal, noise = case.plan.start
    damaged = Plan(case.plan.table, (signal, noise * 1.01))
    assert largest(run_plan(damaged, case.network, case.x, case.z), case.truth) > 1e-5


def test_a_churned_start_has_the_variance_of_the_raised_level():
    plan = CASES["heun churned from the first"](None).plan
    assert plan.start[1] == pytest.approx(40 * (1 + 5 / 18), rel=1e-12)
    assert CASES["heun with churn"](None).plan.start[1] == pytest.approx(40, rel=1e-12)  # above s_tmax


def test_noise_is_taken_by_row():
    """z of the wrong row is another trajectory."""
    for name in ("heun with churn", "euler-ancestral", "langevin", "dpmpp-2m-sde", "euler-maruyama, VP"):
        case = CASES[name](None)
        z = draw(len(case.plan), seed=1)[1]
        assert largest(run_plan(case.plan, case.network, case.x, z), case.truth) > 1e-2


def test_the_dtype_is_float64_throughout():
    for name in ("heun", "dpmpp-2m", "flow-heun"):
        case = CASES[name](None)
        assert case.truth.dtype == torch.float64
        assert case.plan.table.dtype == np.float64
