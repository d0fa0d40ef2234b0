"""Samplers: pure functions (schedule, timesteps, …) -> Plan, in float64.

A = ᾱ at the row's timestep, A' = ᾱ at the next (cleaner) one, 1 after the last.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from epsrt import spacing as spacings
from epsrt.errors import EpsrtError
from epsrt.plan import CLIP_OFF, Plan
from epsrt.schedule import Schedule

Array = NDArray[np.float64]
Prediction = Literal["epsilon", "x0", "v"]
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "x0", "v")
Variance = Literal["fixed_small", "fixed_large"]


def ddpm(
    schedule: Schedule,
    timesteps: Sequence[int],
    *,
    prediction: str = "epsilon",
    clip: float | None = 1.0,
    variance: str = "fixed_small",
) -> Plan:
    """Ancestral sampling, DDPM (arXiv 2006.11239, eq. 7 and algorithm 2) on any sub-sequence of timesteps.

    `clip` bounds x0 to [−clip, clip]; None leaves it. `variance`: fixed_small is the posterior's β̃, fixed_large β.
    """
    ts, A, A_next = _levels(schedule, timesteps, prediction)
    beta = 1 - A / A_next
    if variance not in ("fixed_small", "fixed_large"):
        raise EpsrtError(f"variance {variance!r} is unknown: use fixed_small or fixed_large")
    sigma2 = beta * (1 - A_next) / (1 - A) if variance == "fixed_small" else beta
    x0 = _x0_from(A, prediction)
    return Plan.of(
        "ddpm", t=ts, p=x0.p, q=x0.q, clip=_clip(clip),
        a=np.sqrt(A / A_next) * (1 - A_next) / (1 - A),
        b=np.sqrt(A_next) * beta / (1 - A),
        d=np.where(A_next < 1, np.sqrt(sigma2), 0.0),
        ka=np.sqrt(A_next), kb=np.sqrt(1 - A_next),
    )  # fmt: skip


def ddim(
    schedule: Schedule,
    timesteps: Sequence[int],
    *,
    prediction: str = "epsilon",
    clip: float | None = 1.0,
    eta: float = 0.0,
    rederive: bool = False,
) -> Plan:
    """DDIM (arXiv 2010.02502, eq. 12, σ from eq. 16): η = 0 is deterministic, η = 1 has DDPM's variance.

    `rederive` computes ε anew from the clipped x0 (diffusers' use_clipped_model_output); else it is the network's own.
    """
    ts, A, A_next = _levels(schedule, timesteps, prediction)
    if not 0 <= eta <= 1:
        raise EpsrtError(f"eta = {eta} is outside [0, 1]: 0 is deterministic DDIM, 1 has DDPM's variance")
    sigma = eta * np.sqrt((1 - A_next) / (1 - A)) * np.sqrt(1 - A / A_next)
    k = np.sqrt(np.maximum(1 - A_next - sigma**2, 0))  # "direction pointing to x_t"
    x0, eps = _x0_from(A, prediction), _eps_from(A, prediction)
    if rederive:  # ε = (x − √A x0) / √(1−A)
        a, b, h = k / np.sqrt(1 - A), np.sqrt(A_next) - k * np.sqrt(A / (1 - A)), np.zeros_like(A)
    else:
        a, b, h = k * eps.p, np.sqrt(A_next), k * eps.q
    return Plan.of(
        "ddim", t=ts, p=x0.p, q=x0.q, clip=_clip(clip), a=a, b=b, h=h, d=sigma,
        ka=np.sqrt(A_next), kb=np.sqrt(1 - A_next),
    )  # fmt: skip


METHODS: dict[str, Callable[..., Plan]] = {"ddpm": ddpm, "ddim": ddim}


def make(
    method: str,
    schedule: Schedule,
    *,
    steps: int = 50,
    spacing: str = "trailing",
    timesteps: Sequence[int] | None = None,
    **options: object,
) -> Plan:
    """The plan of a method by its name; `timesteps` overrides steps and spacing; `options` are the method's own.

    Raises EpsrtError for an unknown method, or an option that the method does not take.
    """
    if method not in METHODS:
        raise EpsrtError(f"method {method!r} is unknown: use one of {', '.join(METHODS)}")
    solver = METHODS[method]
    known = [name for name, p in inspect.signature(solver).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise EpsrtError(f"{method} takes no option {name!r}; it takes {', '.join(known)}")
    ts = spacings.timesteps(schedule.T, steps, spacing) if timesteps is None else timesteps
    return solver(schedule, ts, **options)


class Affine(NamedTuple):
    """A quantity that is p·x + q·out."""

    p: Array
    q: Array


def _x0_from(A: Array, prediction: str) -> Affine:
    match prediction:
        case "epsilon":  # DDPM eq. 15
            return Affine(1 / np.sqrt(A), -np.sqrt((1 - A) / A))
        case "v":  # arXiv 2202.00512, section 4 and appendix D
            return Affine(np.sqrt(A), -np.sqrt(1 - A))
        case _:
            return Affine(np.zeros_like(A), np.ones_like(A))


def _eps_from(A: Array, prediction: str) -> Affine:
    match prediction:
        case "epsilon":
            return Affine(np.zeros_like(A), np.ones_like(A))
        case "v":
            return Affine(np.sqrt(1 - A), np.sqrt(A))
        case _:
            return Affine(1 / np.sqrt(1 - A), -np.sqrt(A / (1 - A)))


def _levels(schedule: Schedule, timesteps: Sequence[int], prediction: str) -> tuple[list[int], Array, Array]:
    if prediction not in PREDICTIONS:
        raise EpsrtError(f"prediction {prediction!r} is unknown: use one of {', '.join(PREDICTIONS)}")
    ts = spacings.given(schedule.T, timesteps)
    A = schedule.alpha_bar[ts]
    if prediction == "epsilon" and A[0] <= 0:
        raise EpsrtError(f"ε-prediction says nothing of x0 at t = {ts[0]}, where ᾱ = 0: use a v or x0 network")
    return ts, A, np.append(A[1:], 1.0)


def _clip(clip: float | None) -> float:
    if clip is None:
        return CLIP_OFF
    if not 0 < clip < CLIP_OFF:
        raise EpsrtError(f"clip = {clip} is not a positive bound: give one, or None for no clipping")
    return float(clip)
