"""Rung 2 of the ladder: the plans against loops written plainly from the papers, float64."""

import numpy as np
import pytest
from toy import Toy, draw, run_plan

from epsrt import Schedule, solvers
from epsrt.timesteps import spaced
from epsrt_trainer.sample import ddim_loop, ddpm_loop

SCHEDULES = [Schedule(), Schedule("cosine", 400), Schedule("sigmoid", 333, zero_snr=False)]


def compare(loop, plan, schedule, ts, prediction, learned=None, **options):
    x, z = draw(len(ts), images=16)
    network = Toy(schedule, prediction, learned)
    truth = loop(network, schedule, x, ts, lambda i: z[i], prediction=prediction, **options)
    return float((run_plan(plan, network, x, z) - truth).abs().max())


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("spacing", ["trailing", "quadratic", "linspace"])
def test_ddpm_is_the_papers(spacing, variance, clip, prediction):
    for schedule in SCHEDULES:
        ts = spaced(schedule.T, 37, spacing)
        options = {"prediction": prediction, "clip": clip, "variance": variance}
        assert compare(ddpm_loop, solvers.ddpm(schedule, ts, **options), schedule, ts, **options) <= 1e-9


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize(("variance", "around"), [("learned", -4.0), ("learned_range", 0.2)])
def test_ddpm_with_a_learned_variance_is_the_papers(variance, around, clip, prediction):
    for schedule in SCHEDULES:
        ts = spaced(schedule.T, 37, "trailing")
        options = {"prediction": prediction, "clip": clip, "variance": variance}
        plan = solvers.ddpm(schedule, ts, **options)
        assert compare(ddpm_loop, plan, schedule, ts, learned=around, **options) <= 1e-9


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["trailing", "quadratic", "linspace"])
def test_ddim_is_the_papers(spacing, eta, clip, prediction):
    for schedule in SCHEDULES:
        ts = spaced(schedule.T, 37, spacing)
        options = {"prediction": prediction, "clip": clip, "eta": eta}
        assert compare(ddim_loop, solvers.ddim(schedule, ts, **options), schedule, ts, **options) <= 1e-9


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("loop", [ddpm_loop, ddim_loop])
def test_zero_snr_agrees_too(loop, prediction):
    zero, ts = Schedule(T=200, zero_snr=True), spaced(200, 20)
    method = {"ddpm_loop": solvers.ddpm, "ddim_loop": solvers.ddim}[loop.__name__]
    assert compare(loop, method(zero, ts, prediction=prediction), zero, ts, prediction) <= 1e-9


def test_explicit_timesteps_end_where_they_end():
    """A list that stops above t = 0 still lands on x0: ᾱ is 1 after its last entry."""
    schedule, ts = Schedule(), [999, 640, 300, 120]
    assert compare(ddpm_loop, solvers.ddpm(schedule, ts), schedule, ts, "epsilon", clip=1.0) <= 1e-9
    assert compare(ddim_loop, solvers.ddim(schedule, ts), schedule, ts, "epsilon", clip=1.0) <= 1e-9


@pytest.mark.parametrize("method", [solvers.ddpm, solvers.ddim])
def test_rows_rounded_to_float32_cost_little(method):
    schedule = Schedule()
    x, z = draw(1000, images=16)
    plan, network = method(schedule, range(999, -1, -1)), Toy(schedule)
    exact, rounded = run_plan(plan, network, x, z), run_plan(plan, network, x, z, dtype=np.float32)
    assert 0 < float((exact - rounded).abs().max()) <= 6e-6
