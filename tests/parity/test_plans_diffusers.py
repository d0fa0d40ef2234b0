"""Rung 2 of the ladder: whole trajectories of the plans against diffusers' schedulers, on a float64 toy network.

What differs is that diffusers keeps its constants in float32.
"""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from toy import Toy, draw, run_plan

from epsrt import Schedule, solvers
from epsrt.spacing import timesteps

SCHEDULE = Schedule()
THEIR_PREDICTION = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}


def largest(a, b):
    return float((a - b).abs().max())


def check_scale(x):
    """Nobody's trajectory has collapsed or blown up, so that an absolute figure means something."""
    assert 0.3 < float(x.std()) < 2
    assert float(x.abs().max()) < 10


def their_ddpm(steps, x, z, monkeypatch, prediction="epsilon", **options):
    scheduler = DDPMScheduler(prediction_type=THEIR_PREDICTION[prediction], **options)
    scheduler.set_timesteps(steps)
    network = Toy(SCHEDULE, prediction)
    for i, t in enumerate(scheduler.timesteps):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, i=i, **k: z[i])
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


def their_ddim(steps, x, z, prediction, eta, rederive, **options):
    scheduler = DDIMScheduler(prediction_type=THEIR_PREDICTION[prediction], **options)
    scheduler.set_timesteps(steps)
    network = Toy(SCHEDULE, prediction)
    for i, t in enumerate(scheduler.timesteps):
        more = {"eta": eta, "use_clipped_model_output": rederive, "variance_noise": z[i]}
        x = scheduler.step(network(x, t), t, x, **more).prev_sample
    return x


@pytest.mark.parametrize("steps", [10, 50, 1000])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm(variance, clip, steps, monkeypatch):
    x, z = draw(steps)
    theirs = their_ddpm(steps, x, z, monkeypatch, variance_type=variance, clip_sample=clip is not None)
    plan = solvers.ddpm(SCHEDULE, timesteps(1000, steps, "leading"), variance=variance, clip=clip)
    ours = run_plan(plan, Toy(SCHEDULE), x, z)
    check_scale(ours)
    assert largest(ours, theirs) <= (2e-4 if clip is None else 4e-5)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_ddpm_of_other_predictions(prediction, clip, monkeypatch):
    x, z = draw(50)
    clipping = {"clip_sample": clip is not None, "clip_sample_range": clip}
    theirs = their_ddpm(50, x, z, monkeypatch, prediction, **clipping)
    plan = solvers.ddpm(SCHEDULE, timesteps(1000, 50, "leading"), prediction=prediction, clip=clip)
    ours = run_plan(plan, Toy(SCHEDULE, prediction), x, z)
    check_scale(ours)
    assert largest(ours, theirs) <= 4e-5


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("rederive", [False, True])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim(prediction, steps, eta, clip, rederive):
    x, z = draw(steps)
    theirs = their_ddim(steps, x, z, prediction, eta, rederive, clip_sample=clip is not None)
    options = {"prediction": prediction, "eta": eta, "clip": clip, "rederive": rederive}
    plan = solvers.ddim(SCHEDULE, timesteps(1000, steps, "leading"), **options)
    ours = run_plan(plan, Toy(SCHEDULE, prediction), x, z)
    check_scale(ours)
    assert largest(ours, theirs) <= 8e-5


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_over_all_steps(eta):
    x, z = draw(1000)
    theirs = their_ddim(1000, x, z, "epsilon", eta, False)
    ours = run_plan(solvers.ddim(SCHEDULE, range(999, -1, -1), eta=eta), Toy(SCHEDULE), x, z)
    check_scale(ours)
    assert largest(ours, theirs) <= 8e-5


def test_the_comparison_sees_small_mistakes(monkeypatch):
    """A schedule that ends 1 % lower, a clip, a rederived ε: each is an error far above the figures held."""
    x, z = draw(50)
    theirs = their_ddim(50, x, z, "epsilon", 0.5, False)
    ts = timesteps(1000, 50, "leading")
    for plan in (
        solvers.ddim(Schedule(beta_end=0.0198), ts, eta=0.5),
        solvers.ddim(SCHEDULE, ts, eta=0.5, clip=1.01),
        solvers.ddim(SCHEDULE, ts, eta=0.5, rederive=True),
        solvers.ddim(SCHEDULE, ts, eta=0.49),
        solvers.ddpm(SCHEDULE, ts),
    ):
        assert largest(run_plan(plan, Toy(SCHEDULE), x, z), theirs) > 1e-3


def test_toy_is_the_same_network_in_each_prediction():
    x = draw(0)[0]
    A = float(SCHEDULE.alpha_bar[300])
    out = {name: Toy(SCHEDULE, name)(x, torch.tensor(300)) for name in THEIR_PREDICTION}
    torch.testing.assert_close(A**0.5 * out["x0"] + (1 - A) ** 0.5 * out["epsilon"], x, rtol=0, atol=1e-12)
    torch.testing.assert_close(A**0.5 * out["epsilon"] - (1 - A) ** 0.5 * out["x0"], out["v"], rtol=0, atol=1e-12)
