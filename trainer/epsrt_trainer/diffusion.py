"""The forward process and the training loss (DDPM, arXiv 2006.11239, algorithm 1)."""

from __future__ import annotations

from math import sqrt
from typing import Literal

import numpy as np
from torch import Tensor

from epsrt.errors import InputError
from epsrt.schedule import Schedule
from epsrt.types import Float64

Prediction = Literal["epsilon", "x0", "v"]  # what a network can be trained for here
Output = Literal["epsilon", "x0", "v", "score", "edm", "velocity"]  # what a sampled one may return
Weighting = Literal["simple", "vlb", "min-snr"]
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "x0", "v")
OUTPUTS: tuple[Output, ...] = (*PREDICTIONS, "score", "edm", "velocity")
WEIGHTINGS: tuple[Weighting, ...] = ("simple", "vlb", "min-snr")
GAMMA = 5.0  # min-SNR's clip, arXiv 2303.09556, section 3.4
SIGMA_DATA = 0.5  # EDM's

# Below, x = signal·x0 + noise·ε: √ᾱ_t and √(1 − ᾱ_t) where training is concerned; floats, or tensors that broadcast
# against x.


def q_sample(x0: Tensor, eps: Tensor, signal: Tensor | float, noise: Tensor | float) -> Tensor:
    """x_t = √ᾱ x0 + √(1 − ᾱ) ε (DDPM eq. 4)."""
    return signal * x0 + noise * eps


def target(prediction: Prediction, x0: Tensor, eps: Tensor, signal: Tensor | float, noise: Tensor | float) -> Tensor:
    """What the network is asked for: ε, x0, or v = √ᾱ ε − √(1 − ᾱ) x0 (arXiv 2202.00512, appendix D)."""
    match prediction:
        case "epsilon":
            return eps
        case "x0":
            return x0
        case "v":
            return signal * eps - noise * x0
    raise InputError(f"prediction {prediction!r} is unknown: use one of {', '.join(PREDICTIONS)}")


def predicted_x0(
    prediction: Output, x: Tensor, out: Tensor, signal: float, noise: float, sigma_data: float = SIGMA_DATA
) -> Tensor:
    """The network's estimate of the clean image.

    epsilon   solved for x0: DDPM eq. 15
    v         α·ε − σ·x0, with x solved for x0 (arXiv 2202.00512, appendix D)
    score     ∇ log p(x): Tweedie's formula, E[x0 | x] = (x + σ²·score)/α (arXiv 2011.13456)
    edm       c_skip·y + c_out·F of y = x/α, whose noise is s = σ/α (arXiv 2206.00364, eq. 7 and table 1)
    velocity  ε − x0, with x solved for x0 (arXiv 2209.03003)

    Raises InputError for ε, score and edm where signal = 0: x holds nothing of x0 there, and nor does the output.
    """
    if signal == 0 and prediction in ("epsilon", "score", "edm"):
        name = "ε" if prediction == "epsilon" else prediction
        raise InputError(
            f"{name}-prediction cannot start from α = 0 (ᾱ = 0, zero terminal SNR; or a flow's end): use x0, v or "
            "velocity"
        )
    match prediction:
        case "epsilon":
            return (x - noise * out) / signal
        case "x0":
            return out
        case "v":
            return (signal * x - noise * out) / (signal**2 + noise**2)
        case "score":
            return (x + noise**2 * out) / signal
        case "edm":
            y, s = x / signal, noise / signal
            c_skip, c_out = sigma_data**2 / (s**2 + sigma_data**2), s * sigma_data / sqrt(s**2 + sigma_data**2)
            return c_skip * y + c_out * out
        case "velocity":
            return (x - noise * out) / (signal + noise)
    raise InputError(f"prediction {prediction!r} is unknown: use one of {', '.join(OUTPUTS)}")


def predicted_epsilon(
    prediction: Output, x: Tensor, out: Tensor, signal: float, noise: float, sigma_data: float = SIGMA_DATA
) -> Tensor:
    """The network's estimate of the noise in x; the formulas are those of `predicted_x0`."""
    match prediction:
        case "epsilon":
            return out
        case "v":
            return (noise * x + signal * out) / (signal**2 + noise**2)
        case "score":
            return -noise * out
        case "velocity":
            return (x + signal * out) / (signal + noise)
    return (x - signal * predicted_x0(prediction, x, out, signal, noise, sigma_data)) / noise


def loss_weights(schedule: Schedule, prediction: Prediction, weighting: Weighting) -> Float64:
    """The weight of each timestep's squared error of the network's own output; float64 [T].

    simple   1 (DDPM eq. 14)
    vlb      DDPM's λ_t of eq. 12, β²/(2σ²α(1−ᾱ)) for ε with σ² the posterior variance. That is 0 at t = 0, where the
             bound has a discrete decoder instead: t = 0 takes σ² of t = 1, as arXiv 2102.09672 does
    min-snr  min(SNR, 5) for x0, min(SNR, 5)/SNR for ε, min(SNR, 5)/(SNR + 1) for v (arXiv 2303.09556, section 3.4)

    An error of x0 counts SNR times in ε and 1/(1−ᾱ) times in v, squared: the three are one weighting.
    Raises InputError for ε with a schedule that ends at ᾱ = 0: nothing of x0 can be learned or sampled there.
    """
    if prediction not in PREDICTIONS:
        raise InputError(f"prediction {prediction!r} is unknown: use one of {', '.join(PREDICTIONS)}")
    bar = schedule.alpha_bar
    if prediction == "epsilon" and bar[-1] == 0:
        raise InputError("ε-prediction cannot learn from ᾱ = 0 (zero terminal SNR): set prediction to v or x0")
    match weighting:
        case "simple":
            return np.ones(schedule.T)
        case "vlb":
            before = np.concatenate([[1.0], bar[:-1]])
            variance = schedule.beta * (1 - before) / (1 - bar)
            variance[0] = variance[1] if schedule.T > 1 else schedule.beta[0]
            of_x0: Float64 = before * (schedule.beta / (1 - bar)) ** 2 / (2 * variance)
        case "min-snr":
            of_x0 = np.minimum(schedule.snr, GAMMA)
        case _:
            raise InputError(f"weighting {weighting!r} is unknown: use one of {', '.join(WEIGHTINGS)}")
    match prediction:
        case "x0":
            return of_x0
        case "epsilon":
            return np.asarray(of_x0 / schedule.snr)
        case "v":
            return np.asarray(of_x0 * (1 - bar))


def loss(out: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared error, the mean over samples and pixels; weight [B], out and wanted [B, C, H, W]; a scalar."""
    return (weight * (out.float() - wanted).square().flatten(1).mean(1)).mean()
