"""compatible = "diffusers": its conventions where they are not the exact ones, and for which counts the two agree."""

import numpy as np
import pytest
from theirs import TIGHT, DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, ready, trajectory
from toy import Toy, draw, largest, run_plan

from epsrt import EpsrtError, Schedule, solvers
from epsrt.timesteps import spaced

SCHEDULE = Schedule()
SPACINGS = [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]
COUNTS = [2, 3, 7, 10, 12, 30, 37, 50, 112, 334]


def chosen(steps, spacing, offset=0):
    return spaced(1000, steps, spacing, **({"steps_offset": offset} if offset else {}))


def agree(spacing, offset, steps):
    """The rule for DDIM: whether the previous timestep in the list is t − ⌊T/S⌋ throughout, below 0 after the last."""
    match spacing:
        case "leading":
            return 1000 // steps > offset
        case "trailing":
            return 1000 % steps == 0
    return steps == 1000


def of_spacing(spacing, offset):
    return {"timestep_spacing": spacing, "steps_offset": offset}


def figure(diffusers, loose):
    return loose if diffusers == "float32" else TIGHT


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
def test_ddim(spacing, offset, to_one, eta, monkeypatch, diffusers, held):
    for steps in (3, 12, 30, 50, 334):
        x, z = draw(steps, images=16)
        options = {"set_alpha_to_one": to_one, "clip_sample": False}
        made = ready(DDIMScheduler, steps, "v", **options, **of_spacing(spacing, offset))
        ts = chosen(steps, spacing, offset)
        assert made.timesteps.tolist() == ts
        options = {"compatible": "diffusers", "set_alpha_to_one": to_one, "prediction": "v", "clip": None}
        plan = solvers.ddim(SCHEDULE, ts, eta=eta, **options)
        theirs = trajectory(made, Toy(SCHEDULE, "v"), x, z, monkeypatch, eta=eta)
        ours = run_plan(plan, Toy(SCHEDULE, "v"), x, z)
        held("ddim, compatible", diffusers, ours, theirs, figure(diffusers, 3e-5))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
def test_ddpm(spacing, offset, variance, monkeypatch, diffusers, held):
    """Its last row adds noise where t > 0: of fixed_small 1e-10, of learned_range between that and β."""
    for steps in (12, 50):
        x, z = draw(steps)
        network = Toy(SCHEDULE, learned=0.0 if variance == "learned_range" else None)
        made = ready(DDPMScheduler, steps, variance_type=variance, **of_spacing(spacing, offset))
        theirs = trajectory(made, network, x, z, monkeypatch)
        ts = chosen(steps, spacing, offset)
        plan = solvers.ddpm(SCHEDULE, ts, variance=variance, compatible="diffusers")
        held("ddpm, compatible", diffusers, run_plan(plan, network, x, z), theirs, figure(diffusers, 2e-5))
        default = run_plan(solvers.ddpm(SCHEDULE, ts, variance=variance), network, x, z)
        assert (largest(default, theirs) > 1e-3) == (ts[-1] > 0 and variance != "fixed_small")


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS[:3])
def test_ddim_inversion(spacing, offset, prediction, to_one, monkeypatch, diffusers, held):
    for steps in (10, 12, 30, 334):
        images = 0.4 + 0.6 * draw(0)[0]
        options = {"set_alpha_to_one": to_one, "clip_sample": False}
        made = ready(DDIMInverseScheduler, steps, prediction, **options, **of_spacing(spacing, offset))
        theirs = trajectory(made, Toy(SCHEDULE, prediction), images, [None] * steps, monkeypatch)
        ts = chosen(steps, spacing, offset)
        options = {"compatible": "diffusers", "set_alpha_to_one": to_one, "prediction": prediction}
        plan = solvers.ddim_inversion(SCHEDULE, ts, **options)
        ours = run_plan(plan, Toy(SCHEDULE, prediction), images, [0.0] * steps)
        held("ddim-inversion, compatible", diffusers, ours, theirs, figure(diffusers, 3e-5))


@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
def test_the_timesteps_are_theirs(spacing, offset):
    """But for 62 counts of trailing, where their arange adds a timestep, −1, by a rounding error."""
    made, longer = DDIMScheduler(**of_spacing(spacing, offset)), 0
    for steps in range(2, 1001 - offset):
        made.set_timesteps(steps)
        theirs = made.timesteps.tolist()
        longer += theirs[-1] == -1
        assert theirs[: len(theirs) - (theirs[-1] == -1)] == chosen(steps, spacing, offset), steps
    assert (longer > 0) == (spacing == "trailing")


@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
def test_for_which_counts_the_default_ddim_is_diffusers(spacing, offset):
    """leading: where ⌊T/S⌋ > steps_offset; trailing: where S divides T; linspace: where S = T."""
    for steps in range(2, 1001 - offset):
        ts = chosen(steps, spacing, offset)
        exact, compatible = (solvers.ddim(SCHEDULE, ts, eta=0.5, compatible=which) for which in (None, "diffusers"))
        same = np.allclose(exact.table, compatible.table, rtol=1e-12, atol=0)
        assert same == agree(spacing, offset, steps), steps


@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
def test_and_so_say_its_trajectories(spacing, offset, monkeypatch):
    for steps in [*COUNTS, 500, 501, 999]:
        x, z = draw(steps, images=2)
        made = ready(DDIMScheduler, steps, clip_sample=False, **of_spacing(spacing, offset))
        theirs = trajectory(made, Toy(SCHEDULE), x, z, monkeypatch)
        ours = run_plan(solvers.ddim(SCHEDULE, chosen(steps, spacing, offset), clip=None), Toy(SCHEDULE), x, z)
        assert (largest(ours, theirs) <= 8e-5) == agree(spacing, offset, steps), steps


@pytest.mark.parametrize("options", [{"set_alpha_to_one": False}, {"compatible": "k-diffusion"}])
def test_conventions_that_are_nobodys_are_refused(options):
    with pytest.raises(EpsrtError, match="diffusers"):
        solvers.ddim(SCHEDULE, [999, 0], **options)


def test_inversion_of_x0_has_no_compatible_form():
    with pytest.raises(EpsrtError, match="divides by σ = 0 for x0"):
        solvers.ddim_inversion(SCHEDULE, [999, 0], compatible="diffusers", prediction="x0")
