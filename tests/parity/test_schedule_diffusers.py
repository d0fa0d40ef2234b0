"""Schedules and lists of timesteps against diffusers'."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

from epsrt import Schedule
from epsrt.timesteps import spaced

RANGE = (1e-4, 0.02)
DIFFUSERS = {"linear": "linear", "scaled-linear": "scaled_linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}
COUNTS = [1, 2, 3, 7, 10, 20, 25, 30, 50, 64, 99, 100, 128, 250, 333, 500, 600, 999, 1000]


@pytest.mark.parametrize("T", [100, 1000])
@pytest.mark.parametrize("kind", DIFFUSERS)
def test_alpha_bar_agrees_with_diffusers(kind, T):
    theirs = DDPMScheduler(T, *RANGE, beta_schedule=DIFFUSERS[kind]).alphas_cumprod.numpy()
    np.testing.assert_allclose(Schedule(kind, T, *RANGE).alpha_bar, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", DIFFUSERS)
def test_zero_snr_agrees_with_diffusers(kind):
    plain = DDPMScheduler(1000, *RANGE, beta_schedule=DIFFUSERS[kind])
    betas = rescale_zero_terminal_snr(plain.betas.double())
    theirs = torch.cumprod(1 - betas, 0).numpy()
    schedule = Schedule(kind, 1000, *RANGE, zero_snr=True)
    assert schedule.alpha_bar[-1] == 0
    assert schedule.snr[-1] == 0
    np.testing.assert_allclose(schedule.alpha_bar, theirs, rtol=0, atol=2e-6)
    np.testing.assert_allclose(schedule.beta, betas, rtol=0, atol=2e-4)


def test_a_last_beta_of_one_is_zero_snr():
    """As diffusers stores its rescaled betas."""
    betas = rescale_zero_terminal_snr(torch.linspace(1e-4, 0.02, 50, dtype=torch.float64))
    schedule = Schedule.given(betas)
    assert schedule.alpha_bar[-1] == schedule.snr[-1] == 0
    np.testing.assert_allclose(schedule.alpha_bar, Schedule(T=50, zero_snr=True).alpha_bar, rtol=0, atol=1e-13)


def sigmas(schedule, ts):
    alpha, sigma = schedule.at(ts)
    return sigma / alpha


def diffusers_list(T, steps, spacing):
    scheduler = DDPMScheduler(T, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize("T", [100, 1000])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_lists_are_diffusers(spacing, T):
    compared = 0
    for steps in (s for s in COUNTS if s <= T):
        if steps == 1:  # diffusers visits t = 0 alone, except with trailing
            assert spacing != "trailing" or spaced(T, 1, spacing) == diffusers_list(T, 1, spacing) == [T - 1]
            continue
        theirs = diffusers_list(T, steps, spacing)
        if len(theirs) == steps:  # its trailing list is sometimes one too long, and ends in −1
            assert spaced(T, steps, spacing) == theirs
            compared += 1
    assert compared >= 10


@pytest.mark.filterwarnings("ignore:__array__")  # diffusers' own
def test_karras_sigmas_are_diffusers():
    scheduler = EulerDiscreteScheduler(
        use_karras_sigmas=True, timestep_spacing="leading", sigma_min=0.1, sigma_max=20.0
    )
    scheduler.set_timesteps(15)
    ts = spaced(Schedule(), 15, "karras", sigma_min=0.1, sigma_max=20.0)
    np.testing.assert_allclose(sigmas(Schedule(), ts), scheduler.sigmas[:-1], rtol=2e-6)
    np.testing.assert_allclose(ts, scheduler.timesteps, rtol=0, atol=2e-2)  # theirs in float32
