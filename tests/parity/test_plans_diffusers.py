"""Rung 2 of the ladder: whole trajectories of DDPM's and DDIM's plans against diffusers', on a float64 toy network.

What differs is that diffusers keeps its constants in float32: where they are float64, so little is left as TIGHT.
"""

import pytest
import torch
from theirs import TIGHT, DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, ready, trajectory
from toy import Toy, draw, largest, run_plan

from epsrt import Schedule, solvers
from epsrt.timesteps import spaced

SCHEDULE = Schedule()
PREDICTIONS = ("epsilon", "x0", "v")


class Squared(Toy):
    """diffusers' learned variance is σ² itself; ours is log σ²."""

    def __call__(self, x, t, label=None):
        out, v = super().__call__(x, t).chunk(2, dim=1)
        return torch.cat([out, torch.exp(v)], dim=1)


def clipping(clip):
    return {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}


@pytest.mark.parametrize("steps", [10, 50, 1000])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm(variance, clip, steps, monkeypatch, diffusers, held):
    x, z = draw(steps)
    made = ready(DDPMScheduler, steps, variance_type=variance, **clipping(clip))
    theirs = trajectory(made, Toy(SCHEDULE), x, z, monkeypatch)
    plan = solvers.ddpm(SCHEDULE, spaced(1000, steps, "leading"), variance=variance, clip=clip)
    ours = run_plan(plan, Toy(SCHEDULE), x, z)
    figure = 2e-4 if clip is None else 4e-5
    held(f"ddpm {variance}, clip {clip}", diffusers, ours, theirs, figure if diffusers == "float32" else TIGHT)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_ddpm_of_other_predictions(prediction, clip, monkeypatch, diffusers, held):
    x, z = draw(50)
    made = ready(DDPMScheduler, 50, prediction, **clipping(clip))
    theirs = trajectory(made, Toy(SCHEDULE, prediction), x, z, monkeypatch)
    plan = solvers.ddpm(SCHEDULE, spaced(1000, 50, "leading"), prediction=prediction, clip=clip)
    ours = run_plan(plan, Toy(SCHEDULE, prediction), x, z)
    held(f"ddpm of {prediction}", diffusers, ours, theirs, 4e-5 if diffusers == "float32" else TIGHT)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(("variance", "around"), [("learned", -5.0), ("learned_range", 0.0)])
def test_ddpm_with_a_learned_variance(variance, around, clip, monkeypatch, diffusers, held):
    x, z = draw(50)
    made = ready(DDPMScheduler, 50, variance_type=variance, **clipping(clip))
    theirs = trajectory(made, (Squared if variance == "learned" else Toy)(SCHEDULE, learned=around), x, z, monkeypatch)
    plan = solvers.ddpm(SCHEDULE, spaced(1000, 50, "leading"), variance=variance, clip=clip)
    ours = run_plan(plan, Toy(SCHEDULE, learned=around), x, z)
    held(f"ddpm {variance}", diffusers, ours, theirs, 4e-5 if diffusers == "float32" else TIGHT)
    assert largest(run_plan(plan, Toy(SCHEDULE, learned=around + 0.1), x, z), ours) > 1e-3  # it is the network's


def test_fixed_large_log_is_nan_in_diffusers_and_fixed_large_here(monkeypatch):
    """They take the square root of log β."""
    x, z = draw(50)
    made = ready(DDPMScheduler, 50, variance_type="fixed_large_log")
    assert torch.isnan(trajectory(made, Toy(SCHEDULE), x, z, monkeypatch)).all()
    plans = [
        solvers.ddpm(SCHEDULE, spaced(1000, 50, "leading"), variance=name)
        for name in ("fixed_large_log", "fixed_large")
    ]
    assert (plans[0].table == plans[1].table).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("rederive", [False, True])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim(prediction, steps, eta, clip, rederive, monkeypatch, diffusers, held):
    x, z = draw(steps)
    made = ready(DDIMScheduler, steps, prediction, **clipping(clip))
    more = {"eta": eta, "use_clipped_model_output": rederive}
    theirs = trajectory(made, Toy(SCHEDULE, prediction), x, z, monkeypatch, **more)
    options = {"prediction": prediction, "eta": eta, "clip": clip, "rederive": rederive}
    plan = solvers.ddim(SCHEDULE, spaced(1000, steps, "leading"), **options)
    ours = run_plan(plan, Toy(SCHEDULE, prediction), x, z)
    held(f"ddim η = {eta:g}", diffusers, ours, theirs, 8e-5 if diffusers == "float32" else TIGHT)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_over_all_steps(eta, monkeypatch, diffusers, held):
    x, z = draw(1000)
    theirs = trajectory(ready(DDIMScheduler, 1000), Toy(SCHEDULE), x, z, monkeypatch, eta=eta)
    ours = run_plan(solvers.ddim(SCHEDULE, range(999, -1, -1), eta=eta), Toy(SCHEDULE), x, z)
    held(f"ddim η = {eta:g}", diffusers, ours, theirs, 8e-5 if diffusers == "float32" else TIGHT)


@pytest.mark.parametrize("steps", [10, 50, 300, 1000])
@pytest.mark.parametrize("clip", [None, 0.9])
def test_ddim_inversion(clip, steps, monkeypatch, diffusers, held):
    """Of ε, on leading timesteps; for the rest see compatible = "diffusers"."""
    images = 0.4 + 0.6 * draw(0)[0]
    made = ready(DDIMInverseScheduler, steps, **clipping(clip))
    theirs = trajectory(made, Toy(SCHEDULE), images, [None] * steps, monkeypatch)
    plan = solvers.ddim_inversion(SCHEDULE, spaced(1000, steps, "leading"), clip=clip)
    ours = run_plan(plan, Toy(SCHEDULE), images, [0] * len(plan))
    held(f"ddim-inversion, clip {clip}", diffusers, ours, theirs, 8e-5 if diffusers == "float32" else TIGHT)


def test_the_comparison_sees_small_mistakes(monkeypatch):
    """A schedule that ends 1 % lower, a clip, a rederived ε: each is an error far above the figures held."""
    x, z = draw(50)
    made = ready(DDIMScheduler, 50, **clipping(1.0))
    theirs = trajectory(made, Toy(SCHEDULE), x, z, monkeypatch, eta=0.5)
    ts = spaced(1000, 50, "leading")
    assert largest(run_plan(solvers.ddim(SCHEDULE, ts, eta=0.5), Toy(SCHEDULE), x, z), theirs) < 1e-4
    for plan in (
        solvers.ddim(Schedule(beta_end=0.0198), ts, eta=0.5),
        solvers.ddim(SCHEDULE, ts, eta=0.5, clip=1.01),
        solvers.ddim(SCHEDULE, ts, eta=0.5, rederive=True),
        solvers.ddim(SCHEDULE, ts, eta=0.49),
        solvers.ddpm(SCHEDULE, ts),
    ):
        assert largest(run_plan(plan, Toy(SCHEDULE), x, z), theirs) > 1e-3


@pytest.mark.parametrize("schedule", [Schedule(), Schedule("ve"), Schedule("flow")])
def test_toy_is_the_same_network_in_each_prediction(schedule):
    x = draw(0)[0]
    alpha, sigma = (float(v) for v in schedule.at(300))
    said = {name: Toy(schedule, name).said(x, alpha, sigma) for name in ("epsilon", "x0", "v", "score", "velocity")}
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(alpha * said["x0"] + sigma * said["epsilon"], x, **close)
    torch.testing.assert_close(alpha * said["epsilon"] - sigma * said["x0"], said["v"], **close)
    torch.testing.assert_close(-sigma * said["score"], said["epsilon"], **close)
    torch.testing.assert_close(said["epsilon"] - said["x0"], said["velocity"], **close)
