"""The noise schedule: q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I), in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from epsrt.errors import EpsrtError

Array = NDArray[np.float64]
Kind = Literal["linear", "scaled-linear", "cosine", "sigmoid", "given"]
KINDS: tuple[Kind, ...] = ("linear", "scaled-linear", "cosine", "sigmoid", "given")


@dataclass(frozen=True)
class Schedule:
    """A variance schedule of T steps, t = 0 … T−1.

    kind          betas
    linear        β from beta_start to beta_end (DDPM, arXiv 2006.11239, section 4)
    scaled-linear √β from √beta_start to √beta_end (latent diffusion, arXiv 2112.10752)
    cosine        from ᾱ = cos²((t/T + 0.008)/1.008 · π/2), β ≤ 0.999 (arXiv 2102.09672, eq. 17); has no beta range
    sigmoid       β along a sigmoid over [−6, 6] from beta_start to beta_end (GeoDiff, arXiv 2203.02923)
    given         `betas` itself; T is its length

    `zero_snr` rescales √ᾱ so that the last step is pure noise (arXiv 2305.08891, algorithm 1).
    Raises EpsrtError when T is outside 1 … 1,000,000 or a β lies outside (0, 1).
    """

    kind: Kind = "linear"
    T: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    betas: tuple[float, ...] = ()
    zero_snr: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise EpsrtError(f"schedule kind {self.kind!r} is unknown: use one of {', '.join(KINDS)}")
        if (self.kind == "given") != bool(self.betas):
            raise EpsrtError(f"a {self.kind} schedule {'needs' if self.kind == 'given' else 'takes no'} betas")
        if self.kind == "given" and len(self.betas) != self.T:
            raise EpsrtError(f"T is {self.T} but {len(self.betas)} betas are given: leave T to Schedule.given")
        if isinstance(self.T, bool) or not isinstance(self.T, (int, np.integer)) or not 1 <= self.T <= 1_000_000:
            raise EpsrtError(f"a schedule has 1 to 1,000,000 steps, not T = {self.T!r}")
        beta = self._betas()
        bad = np.flatnonzero(~((beta > 0) & (beta < 1)))
        if bad.size:
            raise EpsrtError(f"beta[{bad[0]}] = {beta[bad[0]]:g} is outside (0, 1): check the schedule's range")

    @classmethod
    def given(cls, betas: object, zero_snr: bool = False) -> Schedule:
        """A schedule from explicit betas, array-like of shape [T], each in (0, 1)."""
        flat = np.asarray(betas, dtype=np.float64)
        if flat.ndim != 1:
            raise EpsrtError(f"betas must be a list of numbers, not an array of shape {list(flat.shape)}")
        return cls("given", T=len(flat), betas=tuple(flat.tolist()), zero_snr=zero_snr)

    def _betas(self) -> Array:
        start, end, T = self.beta_start, self.beta_end, self.T
        match self.kind:
            case "linear":
                return np.linspace(start, end, T)
            case "scaled-linear":
                root = np.linspace(start**0.5, end**0.5, T)
                return root**2
            case "sigmoid":
                return np.asarray(start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, T))), np.float64)
            case "cosine":
                f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
                return np.asarray(np.minimum(1 - f[1:] / f[:-1], 0.999), np.float64)
            case "given":
                return np.array(self.betas)

    @cached_property
    def alpha_bar(self) -> Array:
        """ᾱ_t = ∏_{s ≤ t} (1 − β_s), float64 [T], decreasing in (0, 1) (0 last with zero_snr); read-only."""
        bar: Array = np.cumprod(1 - self._betas(), dtype=np.float64)
        if self.zero_snr:
            root = np.sqrt(bar)
            scale = root[0] / (root[0] - root[-1]) if self.T > 1 else 0.0
            bar = ((root - root[-1]) * scale) ** 2
        bar.flags.writeable = False
        return bar

    @cached_property
    def beta(self) -> Array:
        """β_t = 1 − ᾱ_t / ᾱ_{t−1}, float64 [T]; read-only."""
        beta = 1 - self.alpha_bar / np.concatenate([[1.0], self.alpha_bar[:-1]]) if self.zero_snr else self._betas()
        beta.flags.writeable = False
        return beta

    @cached_property
    def snr(self) -> Array:
        """Signal-to-noise ratio ᾱ_t / (1 − ᾱ_t), float64 [T]; read-only."""
        snr = self.alpha_bar / (1 - self.alpha_bar)
        snr.flags.writeable = False
        return snr
