"""DDPM and DDIM sampling, written plainly from the papers: what the export's sampling is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log, sqrt
from typing import Literal

import torch
from torch import Tensor

from epsrt.errors import InputError
from epsrt.schedule import Schedule
from epsrt_trainer.diffusion import SIGMA_DATA, Output, predicted_epsilon, predicted_x0

Network = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]
OnStep = Callable[[int, Tensor, Tensor], object]
Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
VARIANCES: tuple[Variance, ...] = ("fixed_small", "fixed_large", "learned", "learned_range")

# Shared by both loops:
#   network    (x [B, C, …], t [B] float32) -> [B, C, …], or [B, 2C, …] where the second half is a learned variance; its
#              caller has bound to it what else it takes
#   x_T        [B, C, …], in the network's dtype and on its device: standard normal where the schedule preserves
#              variance, else σ of the first timestep times that
#   timesteps  descending, in the schedule, whole or fractional; where the list ends, α' = 1 and σ' = 0
#   prediction, sigma_data   what the network returns, and the data's standard deviation for edm: see predicted_x0
#   noise      row number i -> z like x_T; not called for rows that add none
#   clip       the predicted x0 is clamped to [−clip, clip]; None: not clamped
#   thresholding  (ratio, maximum): it is thresholded to [−clip, clip] instead, see `threshold`
#   on_step    called with (i, the new x, the predicted x0) after each row
# Below, x = α·x0 + σ·ε here, and α', σ' are those of the row's end; of DDPM's schedules, α² = ᾱ_t and σ² = 1 − ᾱ_t.
# Coefficients are Python floats (float64). Returns the last x.


@torch.inference_mode()
def ddpm_loop(
    network: Network,
    schedule: Schedule,
    x_T: Tensor,
    timesteps: Sequence[float],
    noise: Noise,
    *,
    prediction: Output = "epsilon",
    sigma_data: float = SIGMA_DATA,
    clip: float | None = 1.0,
    thresholding: tuple[float, float] | None = None,
    variance: Variance = "fixed_small",
    on_step: OnStep | None = None,
) -> Tensor:
    """DDPM's algorithm 2 on a sub-sequence of the timesteps, for any α and σ (arXiv 2107.00630, appendix A).

    The step from (α', σ') to (α, σ) is N(step·x, β) with step = α/α' and β = σ² − step²·σ'²: DDPM's √(1 − β_t) and β_t.

    variance  fixed_large     σ² = β, or
              fixed_small     the posterior's β̃ = β·σ'²/σ², DDPM section 3.2
              learned         the network's v is log σ² (diffusers' network gives σ² itself)
              learned_range   log σ² is between log β̃ (v = −1) and log β (v = 1), arXiv 2102.09672, eq. 15
              The last step adds no noise.
    The rest is described above the function.
    """
    if variance not in VARIANCES:
        raise InputError(f"variance {variance!r} is unknown: use one of {', '.join(VARIANCES)}")
    x = x_T
    for i, (alpha, sigma), (alpha_next, sigma_next), t in _steps(schedule, x_T, timesteps):
        x_in, time = network_input(prediction, x, t, alpha, sigma, sigma_data)
        out, v = _halves(network(x_in, time), x)
        x0 = predicted_x0(prediction, x, out, alpha, sigma, sigma_data)
        x0 = _bounded(x0, clip, thresholding)
        step = alpha / alpha_next
        beta = sigma**2 - step**2 * sigma_next**2
        mean = alpha_next * beta / sigma**2 * x0 + step * sigma_next**2 / sigma**2 * x  # DDPM eq. 7
        posterior = beta * sigma_next**2 / sigma**2
        x = mean if i + 1 == len(timesteps) else mean + _deviation(variance, beta, posterior, v) * noise(i)
        if on_step:
            on_step(i, x, x0)
    return x


def _deviation(variance: Variance, beta: float, posterior: float, v: Tensor | None) -> Tensor | float:
    match variance:
        case "fixed_small":
            return sqrt(posterior)
        case "fixed_large":
            return sqrt(beta)
    if v is None:
        raise InputError(f"variance {variance!r} needs a network that returns twice the channels: use fixed_small")
    if variance == "learned":
        return torch.exp(v / 2)
    share = (v + 1) / 2
    return torch.exp((share * log(beta) + (1 - share) * log(posterior)) / 2)


@torch.inference_mode()
def ddim_loop(
    network: Network,
    schedule: Schedule,
    x_T: Tensor,
    timesteps: Sequence[float],
    noise: Noise | None = None,
    *,
    eta: float = 0.0,
    prediction: Output = "epsilon",
    sigma_data: float = SIGMA_DATA,
    clip: float | None = 1.0,
    thresholding: tuple[float, float] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM (arXiv 2010.02502): eq. 12 with σ of eq. 16. ε stays the network's own where x0 is clamped.

    eta  0 (deterministic; noise may be None) to 1 (DDPM's fixed_small); raises EpsrtError outside [0, 1]
    The rest is described above the functions.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta = {eta} is outside [0, 1]")
    if eta and noise is None:
        raise InputError(f"eta = {eta} needs noise: give a function of the row, or eta = 0")
    x = x_T
    for i, (alpha, sigma), (alpha_next, sigma_next), t in _steps(schedule, x_T, timesteps):
        x_in, time = network_input(prediction, x, t, alpha, sigma, sigma_data)
        out, _ = _halves(network(x_in, time), x)
        x0 = predicted_x0(prediction, x, out, alpha, sigma, sigma_data)
        eps = predicted_epsilon(prediction, x, out, alpha, sigma, sigma_data)
        x0 = _bounded(x0, clip, thresholding)
        up = eta * sigma_next / sigma * sqrt(sigma**2 - (alpha / alpha_next) ** 2 * sigma_next**2)
        x = alpha_next * x0 + sqrt(max(sigma_next**2 - up**2, 0.0)) * eps
        if up and noise is not None:
            x = x + up * noise(i)
        if on_step:
            on_step(i, x, x0)
    return x


def network_input(
    prediction: Output, x: Tensor, t: Tensor, alpha: float, sigma: float, sigma_data: float = SIGMA_DATA
) -> tuple[Tensor, Tensor]:
    """What the network is given for x and t: for edm c_in·y and c_noise = ¼ ln s, y = x/α and s = σ/α its noise.

    arXiv 2206.00364, table 1. t float32 [B]. At α = 0 x is passed on: predicted_x0 has the words for it.
    """
    if prediction != "edm" or alpha == 0:
        return x, t
    s = sigma / alpha
    return x / (alpha * sqrt(s**2 + sigma_data**2)), torch.full_like(t, log(s) / 4)


Level = tuple[float, float]  # α, σ


def _steps(schedule: Schedule, x: Tensor, timesteps: Sequence[float]) -> list[tuple[int, Level, Level, Tensor]]:
    """(row, level, the next row's level, t as float32 [B]) of every row."""
    ts, (low, high) = [float(t) for t in timesteps], schedule.span
    inside = all(low <= t <= high or (schedule.kind == "flow" and 0 < t < low) for t in ts)
    if not ts or not inside or any(a <= b for a, b in pairwise(ts)):
        few = ", ".join(f"{t:g}" for t in ts[:5])
        raise InputError(f"timesteps must descend within {low} … {high}, not [{few}]{' …' if ts[5:] else ''}")
    levels = [(float(alpha), float(sigma)) for alpha, sigma in map(schedule.at, ts)] + [(1.0, 0.0)]
    one = torch.ones(x.shape[0], dtype=torch.float32, device=x.device)
    return [(i, levels[i], levels[i + 1], one * t) for i, t in enumerate(ts)]


def threshold(x0: Tensor, ratio: float, maximum: float, bound: float = 1.0) -> Tensor:
    """Dynamic thresholding (Imagen, arXiv 2205.11487, section 2.3) of x0 [B, ...] to [−bound, bound].

    In units of bound: s is the `ratio` quantile of a sample's |x0|, at least 1 and at most `maximum`; x0 is clamped to
    [−s, s] and divided by s.
    """
    unit = x0 / bound
    s = torch.quantile(unit.abs().flatten(1), ratio, dim=1).clamp(1, maximum).view(-1, *[1] * (x0.ndim - 1))
    return bound * unit.clamp(-s, s) / s


def _bounded(x0: Tensor, clip: float | None, thresholding: tuple[float, float] | None) -> Tensor:
    if thresholding is not None:
        if clip is None:
            raise InputError("thresholding scales x0 to the bound that clip gives: set clip")
        return threshold(x0, *thresholding, bound=clip)
    return x0 if clip is None else x0.clamp(-clip, clip)


def _halves(out: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The network's prediction, and its learned variance where it returns twice the channels of x."""
    channels = x.shape[1]
    return out[:, :channels], out[:, channels:] if out.shape[1] == 2 * channels else None
