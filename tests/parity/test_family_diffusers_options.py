"""Each option of DDPMScheduler and DDIMScheduler, from a saved pipeline to the default plan of its bundle: exact."""

import json

import pytest
from diffusers import DDPMPipeline
from theirs import DDIMScheduler, DDPMScheduler, trajectory
from toy import Toy, draw, run_plan

from epsrt.bundle import Bundle
from epsrt_export import families
from epsrt_export.manifest import manifest_of
from nets import diffusers_unet

SMALL = {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2}
ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
BETAS = [0.001 + 0.002 * i for i in range(100)]
BOTH = {
    "as saved": {}, "linear": SMALL, "scaled_linear": {**SMALL, "beta_schedule": "scaled_linear"},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": {"num_train_timesteps": 100, "trained_betas": BETAS},
    "sample": {**SMALL, "prediction_type": "sample"}, "v_prediction": {**SMALL, "prediction_type": "v_prediction"},
    "no clip": {**SMALL, "clip_sample": False}, "clip 0.7": {**SMALL, "clip_sample_range": 0.7},
    "zero snr": {**ZERO, "timestep_spacing": "trailing"}, "zero snr, leading": ZERO,
    "linspace": {"timestep_spacing": "linspace"}, "trailing": {"timestep_spacing": "trailing"},
    "offset": {"steps_offset": 1}, "offset that trailing ignores": {"steps_offset": 1, "timestep_spacing": "trailing"},
    "thresholding": {**SMALL, "thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5},
    "thresholding, clip off": {**SMALL, "thresholding": True, "clip_sample": False, "sample_max_value": 1.0},
}  # fmt: skip
DDPM = {
    "sigmoid": {**SMALL, "beta_schedule": "sigmoid"}, "laplace": {"beta_schedule": "laplace", "clip_sample": True},
    **{kind: {**SMALL, "variance_type": kind} for kind in ("fixed_small", "fixed_small_log", "fixed_large")},
    "fixed_large, trailing": {"variance_type": "fixed_large", "timestep_spacing": "trailing"},
}  # fmt: skip
DDIM = {
    "to alpha_0": {"set_alpha_to_one": False}, "to alpha_0, offset": {"set_alpha_to_one": False, "steps_offset": 1},
    "to alpha_0, linspace": {"set_alpha_to_one": False, "timestep_spacing": "linspace"},
}  # fmt: skip
CASES = [(DDPMScheduler, name) for name in {**BOTH, **DDPM}] + [(DDIMScheduler, name) for name in {**BOTH, **DDIM}]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(kind, twice) is a folder of a pipeline whose scheduler_config.json a test overwrites."""
    made = {}

    def get(twice=False):
        if twice not in made:
            made[twice] = tmp_path_factory.mktemp("saved") / "pipeline"
            DDPMPipeline(diffusers_unet(out_channels=6 if twice else 3), DDPMScheduler()).save_pretrained(made[twice])
        return made[twice]

    return get


def plan_and_network(folder, scheduler, steps=None):
    """The bundle's default plan, the toy in its network's place, and how the step graph thresholds."""
    scheduler.save_pretrained(folder / "scheduler")
    source = families.load("diffusers", folder)
    learned = None if source.variance is None else 0.0
    toy = Toy(source.schedule, source.prediction, learned)
    return source, Bundle(folder, manifest_of(source, 1, ())).plan(steps=steps), toy


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind.__name__}-{name}" for kind, name in CASES])
@pytest.mark.parametrize("steps", [12, 50])
def test_each_option(saved, kind, name, steps, monkeypatch, diffusers, held):
    options = {**BOTH, **DDPM, **DDIM}[name]
    scheduler = kind(**options)
    source, plan, toy = plan_and_network(saved(), scheduler, steps)
    assert plan.name == ("ddpm" if kind is DDPMScheduler else "ddim")
    scheduler.set_timesteps(steps)
    assert plan["t"].tolist() == scheduler.timesteps.tolist()
    x, z = draw(steps)
    ours = run_plan(plan, toy, x, z, threshold=source.threshold)
    theirs = trajectory(scheduler, toy, x, z, monkeypatch)
    at_most = 1e-4 if diffusers == "float32" else 1e-5 if name == "sigmoid" else 1e-6  # its ramp is float32 in any case
    held(f"{kind.__name__} saved", diffusers, ours, theirs, at_most)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_learned_variances(saved, variance, monkeypatch, diffusers, held):
    scheduler = DDPMScheduler(**SMALL, variance_type=variance)
    _, plan, toy = plan_and_network(saved(twice=True), scheduler, 50)
    toy.learned = -4.0 if variance == "learned" else 0.0
    x, z = draw(50)
    ours = run_plan(plan, toy, x, z)
    scheduler.set_timesteps(50)

    def theirs(x, t):  # their `learned` takes σ² itself: the source's network takes its logarithm
        out = toy(x, t)
        if variance == "learned":
            out[:, 12:] = out[:, 12:].exp()
        return out

    held(f"DDPMScheduler {variance}", diffusers, ours, trajectory(scheduler, theirs, x, z, monkeypatch), 1e-4)


def test_steps_of_their_pipelines(saved):
    for kind, options, steps in (
        (DDPMScheduler, {}, 1000),
        (DDIMScheduler, {}, 50),
        (DDPMScheduler, SMALL, 100),
        (DDIMScheduler, {"num_train_timesteps": 20}, 20),
    ):
        assert len(plan_and_network(saved(), kind(**options))[1]) == steps


def test_every_option_is_met_here(saved):
    """A new one of diffusers' must be looked at: nothing is ignored."""
    met = {key for options in (*BOTH.values(), *DDPM.values(), *DDIM.values()) for key in options}
    for kind in (DDPMScheduler, DDIMScheduler):
        kind().save_pretrained(saved() / "scheduler")
        config = json.loads((saved() / "scheduler" / "scheduler_config.json").read_bytes())
        assert {key for key in config if not key.startswith("_")} <= met
