"""Levels: the noise levels that a sampler visits, and how the network's output is read at each.

At each row x = α·x0 + σ·ε. α' and σ' belong to the next row; after the last row α' = 1 and σ' = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from epsrt.errors import InputError, one_of, typed
from epsrt.plan import CLIP_OFF
from epsrt.schedule import Schedule
from epsrt.timesteps import given
from epsrt.types import Float64

Prediction = Literal["epsilon", "x0", "v", "score", "edm", "velocity"]
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "x0", "v", "score", "edm", "velocity")


class Network(TypedDict, total=False):
    """The options that every solver takes besides its own.

    prediction  what the network returns; epsilon unless given
                epsilon   ε (arXiv 2006.11239, eq. 11)
                x0        the clean image
                v         α·ε − σ·x0 (arXiv 2202.00512, appendix D)
                score     ∇ log p(x) = −ε/σ (arXiv 2011.13456)
                edm       F, with x0 = c_skip·x + c_out·F(c_in·x, ¼ ln σ) (arXiv 2206.00364, eq. 7 and table 1). This
                          is for α = 1; elsewhere x and σ are divided by α first
                velocity  ε − x0, which is dx/ds where α = 1 − s, σ = s (arXiv 2209.03003)
    sigma_data  for edm: the standard deviation of the data (0.5)
    clip        x0 is bounded to [−clip, clip] (1.0, but see the method); None leaves it unbounded
    """

    prediction: str
    sigma_data: float
    clip: float | None


class Affine(NamedTuple):
    """A quantity that is p·x + q·out."""

    p: Float64
    q: Float64


@dataclass(frozen=True, eq=False)
class Levels:
    """S rows: timesteps, signal and noise, here and next, float64 [S] each; x is `scale` times the network's own x."""

    schedule: Schedule
    t: Float64
    alpha: Float64
    sigma: Float64
    alpha_next: Float64
    sigma_next: Float64
    scale: Float64
    prediction: str
    sigma_data: float
    clip: float

    @property
    def ratio(self) -> Float64:
        """ρ = ασ'/(α'σ) = exp(λ − λ'), in [0, 1)."""
        return self.alpha * self.sigma_next / (self.alpha_next * self.sigma)

    @property
    def start(self) -> float:
        """x begins as start·z. In the network's own units that is z where variance is preserved, else σ·z."""
        first = 1.0 if self.schedule.preserves_variance else float(self.sigma[0] / self.scale[0])
        return first * float(self.scale[0])

    def output(self) -> tuple[Float64, Float64, Float64]:
        """(u, w, det): the network returns u·x0 + w·ε of its own x = α·x0 + σ·ε, and det = α·w − σ·u.

        x0 and ε solve the two equations. Where det = 0, x and the output say the same; ε and score do at α = 0.
        """
        a, s = self.alpha / self.scale, self.sigma / self.scale
        one, zero = np.ones_like(a), np.zeros_like(a)
        match self.prediction:
            case "epsilon":
                u, w = zero, one
            case "x0":
                u, w = one, zero
            case "v":
                u, w = -s, a
            case "score":
                u, w = zero, -1 / s
            case "velocity":
                u, w = -one, one
            case _:  # edm: F = (x0 − c_skip·x/α)/c_out
                total = np.sqrt(s**2 + (a * self.sigma_data) ** 2)
                u, w = s / self.sigma_data / total, -a * self.sigma_data / total
        return u, w, a * w - s * u

    @property
    def x0(self) -> Affine:
        """The network's estimate of the clean image."""
        _, w, det = self.output()
        return Affine(w / det / self.scale, -self.sigma / det / self.scale)

    @property
    def epsilon(self) -> Affine:
        """The network's estimate of the noise in x."""
        u, _, det = self.output()
        return Affine(-u / det / self.scale, self.alpha / det / self.scale)

    @property
    def blind(self) -> bool:
        """Whether the output says nothing of x0 at some level, or (edm) the network cannot be told the level."""
        return bool(np.any((self.output()[2] == 0) | ((self.alpha == 0) & (self.prediction == "edm"))))

    def columns(self) -> dict[str, Float64]:
        """The network's part of a plan: t, in_scale, p, q, clip, and j, how far a classifier moves the output.

        g = ∇ log p(y | x) makes ε̂ = ε − σ·g (arXiv 2105.05233, algorithm 2). While x stays, the output u·x0 + w·ε
        changes by det/α as ε changes by 1. A classifier's gradient is taken at its own input, in_scale·x. At α = 0 x
        says nothing of y.
        """
        t, in_scale = self.t, 1 / self.scale
        if self.prediction == "edm":
            s = self.sigma / self.alpha
            t, in_scale = np.log(s) / 4, 1 / np.sqrt(s**2 + self.sigma_data**2) / self.alpha
        p, q = self.x0
        told, alpha = self.alpha > 0, np.where(self.alpha > 0, self.alpha, 1.0)
        j = np.where(told, -self.sigma * self.output()[2] / alpha * in_scale * self.scale, 0.0)
        return {"t": t, "in_scale": in_scale, "p": p, "q": q, "clip": np.full_like(t, self.clip), "j": j}

    def take(self, rows: slice | NDArray[np.integer[Any]]) -> Levels:
        """Some of the rows."""
        here = self.t[rows], self.alpha[rows], self.sigma[rows], self.alpha_next[rows], self.sigma_next[rows]
        return Levels(self.schedule, *here, self.scale[rows], self.prediction, self.sigma_data, self.clip)

    def moved(self, log_snr: Float64) -> Levels:
        """The rows with x at other levels, in the network's own units. The next levels stay as they are."""
        t, alpha, sigma = self.schedule.level(log_snr)
        return replace(self, t=t, alpha=alpha, sigma=sigma, scale=np.ones_like(alpha))

    def exploding(self, method: str) -> Levels:
        """The rows with x in units of α: α = 1 and σ grows without bound. Raises InputError where α is 0."""
        if np.any(self.alpha == 0):
            raise InputError(
                f"{method} works in σ/α, which is infinite at t = {self.t[0]:g}, where α = 0: use ddim or dpmpp-2m, or "
                "timesteps that begin later (spacing karras or leading)"
            )
        return self._scaled(1 / self.alpha, 1 / self.alpha_next)

    def straight(self) -> Levels:
        """The rows with x in units of α + σ: α = 1 − s and σ = s, the straight path of flow matching."""
        return self._scaled(1 / (self.alpha + self.sigma), 1 / (self.alpha_next + self.sigma_next))

    def _scaled(self, here: Float64, after: Float64) -> Levels:
        return replace(
            self,
            alpha=self.alpha * here,
            sigma=self.sigma * here,
            alpha_next=self.alpha_next * after,
            sigma_next=self.sigma_next * after,
            scale=self.scale * here,
        )


def visit(schedule: Schedule, timesteps: Sequence[float] | Float64, **network: Unpack[Network]) -> Levels:
    """The levels of descending timesteps. Raises InputError for what does not fit the schedule or the network."""
    for name in network.keys() - Network.__annotations__.keys():
        raise InputError(f"no sampler takes an option {name!r} of its network: {one_of(name, Network.__annotations__)}")
    prediction = typed("prediction", network.get("prediction", "epsilon"), "")
    sigma_data = typed("sigma_data", network.get("sigma_data", 0.5), 0.0)
    if prediction not in PREDICTIONS:
        raise InputError(f"prediction {prediction!r} is unknown: {one_of(prediction, PREDICTIONS)}")
    if not 1e-6 <= sigma_data <= 1e6:
        raise InputError(f"sigma_data = {sigma_data} is outside 1e-6 … 1e6: EDM's is 0.5")
    t = given(schedule, timesteps)
    alpha, sigma = schedule.at(t)
    clip = network.get("clip", 1.0)
    if clip is not None and not 1 / CLIP_OFF < typed("clip", clip, 0.0) < CLIP_OFF:
        raise InputError(f"clip = {clip} is not a positive bound: give one, or None for no clipping")
    levels = Levels(
        schedule,
        t,
        alpha,
        sigma,
        np.append(alpha[1:], 1.0),
        np.append(sigma[1:], 0.0),
        np.ones_like(alpha),
        prediction,
        sigma_data,
        CLIP_OFF if clip is None else float(clip),
    )
    if levels.blind:
        name = "ε" if prediction == "epsilon" else prediction
        where = f"t = {t[0]:g}, where {'ᾱ' if schedule.preserves_variance else 'α'} = 0"
        raise InputError(f"{name}-prediction says nothing of x0 at {where}: use an x0, v or velocity network")
    return levels
