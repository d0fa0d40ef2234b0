"""Inpainting's plans against RePaint's algorithm 1 with its jumps (arXiv 2201.09865), and levels that plans state."""

from itertools import groupby, pairwise
from math import hypot, sqrt

import numpy as np
import pytest
import torch
from toy import Toy, draw, largest, run_plan

from epsrt import Schedule, resampled, timesteps
from epsrt.solvers import METHODS, make

T = 96
SCHEDULE = Schedule(T=T, beta_start=1e-3, beta_end=0.2)


def walk_of(steps: int, jump: int, times: int) -> list[list[int]]:
    """The timesteps that RePaint visits, as diffusers has them; runs of steps back made one: [now, next] each."""
    scheduler = pytest.importorskip("diffusers").RePaintScheduler(num_train_timesteps=T)
    scheduler.set_timesteps(steps, jump_length=jump, jump_n_sample=times)
    visited = [*scheduler.timesteps.tolist(), -1]
    pairs = []
    for up, run in groupby(pairwise(visited), key=lambda pair: pair[1] > pair[0]):
        run = list(run)
        pairs += [[run[0][0], run[-1][1]]] if up else [list(pair) for pair in run]
    return pairs


def bar(t: int) -> float:
    return float(SCHEDULE.alpha_bar[t]) if t >= 0 else 1.0


def repaint(toy, pairs, x, known, mask, z, z2):
    """Algorithm 1; z and z2 are one a denoising step. Where a step is followed by a jump, the two noises of the paper's
    two lines are taken apart from one draw: the way back by which the plan's row must come to the same."""
    i = 0
    for (now, then), (_, after) in pairwise([*pairs, [-1, -1]]):
        if then > now:
            continue
        A, B = bar(now), bar(then)
        a = A / B
        eps = toy.epsilon(x, sqrt(A), sqrt(1 - A))
        x0 = (x - sqrt(1 - A) * eps) / sqrt(A)
        mean = sqrt(B) * (1 - a) / (1 - A) * x0 + sqrt(a) * (1 - B) / (1 - A) * x
        sigma, noised = sqrt((1 - B) / (1 - A) * (1 - a)), sqrt(1 - B)
        if after <= then:
            x = mask * (sqrt(B) * known + noised * z2[i]) + (1 - mask) * (mean + sigma * z[i])
        else:
            s, n = sqrt(bar(after) / B), sqrt(1 - bar(after) / B)
            whole, top = hypot(s * sigma, n), sqrt(1 - bar(after))
            step, of_known = s * sigma / whole * z[i], s * noised / top * z2[i]
            x = mask * (sqrt(B) * known + noised * of_known) + (1 - mask) * (mean + sigma * step)
            x = s * x + n * (mask * n / top * z2[i] + (1 - mask) * n / whole * z[i])
        i += 1
    return x, i


@pytest.mark.parametrize(("steps", "jump", "times"), [(12, 3, 3), (12, 1, 2), (16, 5, 4), (8, 7, 3), (6, 2, 1)])
def test_resampled_ddpm_is_repaints_algorithm(steps, jump, times):
    toy, pairs = Toy(SCHEDULE), walk_of(steps, jump, times)
    plan = make("ddpm", SCHEDULE, timesteps=timesteps.spaced(SCHEDULE, steps, "leading"), clip=None)
    plan = resampled(plan, times, jump)
    x, z = draw(len(plan), seed=1)
    known, z2 = draw(len(plan), seed=2)
    mask = torch.tensor([1.0, 0.0, 0.0] * 4, dtype=torch.float64)
    truth, count = repaint(toy, pairs, x, known, mask, z, z2)
    assert count == len(plan)
    mine = run_plan(plan, toy, x, z, known=known, mask=mask, z2=z2)
    assert largest(mine, truth) < 1e-10
    assert largest(mine[:, mask == 1], known[:, mask == 1]) == 0
    assert list(plan["n"]) == list(range(len(plan)))
    plain = run_plan(make("ddpm", SCHEDULE, steps=steps, spacing="leading", clip=None), toy, x, z)
    assert largest(mine[:, mask == 0], plain[:, mask == 0]) > 0.1


def test_a_learned_variance_goes_back_by_a_row_of_its_own():
    """exp(r·v)·z joins no other noise: the row is followed by one that is forward diffusion alone."""
    toy = Toy(SCHEDULE, learned=0.2)
    plan = make("ddpm", SCHEDULE, steps=8, spacing="leading", clip=None, variance="learned_range")
    back = resampled(plan, 2, 4)
    jumps = np.flatnonzero((back["b"] == 0) & (back["d"] != 0))
    assert len(back) == len(plan) + 4 + 1
    assert len(jumps) == 1
    x, z = draw(1, seed=3)
    (row,) = jumps
    alone = back.cut(row, row + 1, start=(1.0, 0.0))
    (before, after) = back.levels[row], back.levels[row + 1]
    s = after[0] / before[0]
    noised = s * x + sqrt(after[1] ** 2 - (s * before[1]) ** 2) * z[0]
    assert largest(run_plan(alone, toy, x, z), noised) < 1e-12


@pytest.mark.parametrize("method", [m for m in METHODS if m != "ddim-inversion"])
@pytest.mark.parametrize("kind", ["linear", "ve", "flow"])
def test_each_row_says_at_what_level_it_leaves_x(method, kind):
    """ka and kb against p and q of the row that reads x next: of an x0 network they say nothing, of ε and velocity all.

    For ε, x0 = (x − σ·out)/α; for velocity, x0 = (x − σ·out)/(α + σ).
    """
    schedule = Schedule(kind, T=T)
    options = {"s_churn": 20.0} if METHODS[method].stochastic == "s_churn" else {}
    for prediction in ("epsilon", "velocity"):
        plan = make(method, schedule, timesteps=[90, 71, 50, 33, 20, 8, 1], prediction=prediction, **options)
        ka, kb = plan.levels[:-1].T
        total = ka if prediction == "epsilon" else ka + kb
        np.testing.assert_allclose(plan["p"], 1 / total, rtol=1e-9)
        np.testing.assert_allclose(plan["q"], -kb / total, rtol=1e-9)
        assert tuple(plan.levels[-1]) == (1.0, 0.0)
        assert plan.level == tuple(plan.levels[0])


@pytest.mark.parametrize("method", ["heun", "dpmpp-2m", "dpmpp-2m-sde", "dpmpp-2s", "flow-heun"])
def test_methods_with_memory_are_not_resampled(method):
    from epsrt import EpsrtError

    with pytest.raises(EpsrtError, match="remembers what came before, and resampling goes back: use ddpm, ddim or eul"):
        resampled(make(method, SCHEDULE, steps=8), 2, 3)


@pytest.mark.parametrize("method", METHODS)
def test_begun_plans_are_the_last_rows(method):
    """img2img: from where the steps are cut, every method ends as its own plan of the remaining timesteps does."""
    toy = Toy(SCHEDULE)
    if method == "ddim-inversion":
        return
    each = {"each": 1, "denoise": False} if method == "langevin" else {}
    ts = timesteps.spaced(SCHEDULE, 10, "trailing")
    whole, last = (make(method, SCHEDULE, timesteps=t, clip=None, **each) for t in (ts, ts[6:]))
    begun = whole.begun(len(whole) - len(last))
    assert begun.start == begun.level == tuple(whole.levels[len(whole) - len(last)])
    assert list(begun["n"]) == list(whole["n"][len(whole) - len(last) :])
    x0, z = draw(len(last), seed=5)
    eps, _ = draw(1, seed=6)
    x = begun.level[0] * x0 + begun.level[1] * eps
    unit = begun.cut(0, start=(1.0, 0.0)), last.cut(0, start=(1.0, 0.0))
    mine, theirs = (run_plan(plan, toy, x, z) for plan in unit)
    assert largest(mine, theirs) < 1e-10


def test_heun_is_not_begun_between_its_two_rows():
    plan = make("heun", SCHEDULE, steps=6)
    assert len(plan.begun(5)) == len(plan.begun(4)) == len(plan) - 4
    assert plan.begun(4).level == tuple(plan.levels[4])
