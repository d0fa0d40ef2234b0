"""DDPM and DDIM sampling, written plainly from the papers: what the export's sampling is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log, sqrt
from typing import Literal

import torch
from torch import Tensor

from epsrt.errors import EpsrtError
from epsrt.schedule import Schedule
from epsrt_trainer.diffusion import Prediction, predicted_epsilon, predicted_x0

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Noise = Callable[[int], Tensor]
OnStep = Callable[[int, Tensor, Tensor], object]
Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
VARIANCES: tuple[Variance, ...] = ("fixed_small", "fixed_large", "learned", "learned_range")

# Shared by both loops:
#   network    (x [B, C, H, W], t [B] float32, label [B] int64 or None) -> [B, C, H, W], or [B, 2C, H, W] where the
#              second half is a learned variance
#   x_T        [B, C, H, W], standard normal, in the network's dtype and on its device
#   timesteps  descending, in [0, T); the one before an entry is the list's next, and ᾱ = 1 after the last
#   noise      row number i -> z like x_T; not called for rows that add none
#   clip       the predicted x0 is clamped to [−clip, clip]; None: not clamped
#   thresholding  (ratio, maximum): it is thresholded to [−clip, clip] instead, see `threshold`
#   on_step    called with (i, the new x, the predicted x0) after each row
# Coefficients are Python floats (float64). Returns the last x.


@torch.inference_mode()
def ddpm_loop(
    network: Network,
    schedule: Schedule,
    x_T: Tensor,
    timesteps: Sequence[int],
    noise: Noise,
    *,
    prediction: Prediction = "epsilon",
    clip: float | None = 1.0,
    thresholding: tuple[float, float] | None = None,
    variance: Variance = "fixed_small",
    label: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDPM's algorithm 2 on a sub-sequence of the timesteps: α_t becomes ᾱ_t/ᾱ_prev (arXiv 2102.09672, section 4).

    variance  fixed_large     σ² = β, or
              fixed_small     the posterior's β̃, DDPM section 3.2
              learned         the network's v is log σ² (diffusers' network gives σ² itself)
              learned_range   log σ² is between log β̃ (v = −1) and log β (v = 1), arXiv 2102.09672, eq. 15
              The last step adds no noise.
    The rest is described above the function.
    """
    if variance not in VARIANCES:
        raise EpsrtError(f"variance {variance!r} is unknown: use one of {', '.join(VARIANCES)}")
    x = x_T
    for i, bar, bar_prev, t in _steps(schedule, x_T, timesteps):
        out, v = _halves(network(x, t, label), x)
        x0 = _bounded(predicted_x0(prediction, x, out, sqrt(bar), sqrt(1 - bar)), clip, thresholding)
        alpha = bar / bar_prev
        beta = 1 - alpha
        mean = sqrt(bar_prev) * beta / (1 - bar) * x0 + sqrt(alpha) * (1 - bar_prev) / (1 - bar) * x  # DDPM eq. 7
        x = mean if i + 1 == len(timesteps) else mean + _sigma(variance, beta, bar, bar_prev, v) * noise(i)
        if on_step:
            on_step(i, x, x0)
    return x


def _sigma(variance: Variance, beta: float, bar: float, bar_prev: float, v: Tensor | None) -> Tensor | float:
    posterior = beta * (1 - bar_prev) / (1 - bar)
    match variance:
        case "fixed_small":
            return sqrt(posterior)
        case "fixed_large":
            return sqrt(beta)
    if v is None:
        raise EpsrtError(f"variance {variance!r} needs a network that returns twice the channels: use fixed_small")
    if variance == "learned":
        return torch.exp(v / 2)
    share = (v + 1) / 2
    return torch.exp((share * log(beta) + (1 - share) * log(posterior)) / 2)


@torch.inference_mode()
def ddim_loop(
    network: Network,
    schedule: Schedule,
    x_T: Tensor,
    timesteps: Sequence[int],
    noise: Noise | None = None,
    *,
    eta: float = 0.0,
    prediction: Prediction = "epsilon",
    clip: float | None = 1.0,
    thresholding: tuple[float, float] | None = None,
    label: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM (arXiv 2010.02502): eq. 12 with σ of eq. 16. ε stays the network's own where x0 is clamped.

    eta  0 (deterministic; noise may be None) to 1 (DDPM's fixed_small); raises EpsrtError outside [0, 1]
    The rest is described above the functions.
    """
    if not 0 <= eta <= 1:
        raise EpsrtError(f"eta = {eta} is outside [0, 1]")
    if eta and noise is None:
        raise EpsrtError(f"eta = {eta} needs noise: give a function of the row, or eta = 0")
    x = x_T
    for i, bar, bar_prev, t in _steps(schedule, x_T, timesteps):
        out, _ = _halves(network(x, t, label), x)
        x0 = _bounded(predicted_x0(prediction, x, out, sqrt(bar), sqrt(1 - bar)), clip, thresholding)
        eps = predicted_epsilon(prediction, x, out, sqrt(bar), sqrt(1 - bar))
        sigma = eta * sqrt((1 - bar_prev) / (1 - bar)) * sqrt(1 - bar / bar_prev)
        x = sqrt(bar_prev) * x0 + sqrt(max(1 - bar_prev - sigma**2, 0.0)) * eps
        if sigma and noise is not None:
            x = x + sigma * noise(i)
        if on_step:
            on_step(i, x, x0)
    return x


def _steps(schedule: Schedule, x: Tensor, timesteps: Sequence[int]) -> list[tuple[int, float, float, Tensor]]:
    """(row, ᾱ_t, ᾱ_prev, t as float32 [B]) of every row."""
    ts = [int(t) for t in timesteps]
    if not ts or not all(schedule.T > t >= 0 for t in ts) or any(a <= b for a, b in pairwise(ts)):
        raise EpsrtError(f"timesteps must descend within 0 … {schedule.T - 1}, not {ts[:5]}{' …' if ts[5:] else ''}")
    bars = [float(schedule.alpha_bar[t]) for t in ts] + [1.0]
    one = torch.ones(x.shape[0], dtype=torch.float32, device=x.device)
    return [(i, bars[i], bars[i + 1], one * t) for i, t in enumerate(ts)]


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
            raise EpsrtError("thresholding scales x0 to the bound that clip gives: set clip")
        return threshold(x0, *thresholding, bound=clip)
    return x0 if clip is None else x0.clamp(-clip, clip)


def _halves(out: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The network's prediction, and its learned variance where it returns twice the channels of x."""
    channels = x.shape[1]
    return out[:, :channels], out[:, channels:] if out.shape[1] == 2 * channels else None
