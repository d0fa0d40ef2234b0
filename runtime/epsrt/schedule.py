"""Schedule: the noise of each timestep, q(x_t | x_0) = N(α_t x_0, σ_t² I), in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from epsrt.errors import InputError, is_whole, typed
from epsrt.types import Float64

Kind = Literal["linear", "scaled-linear", "cosine", "sigmoid", "given", "ve", "flow"]
KINDS: tuple[Kind, ...] = ("linear", "scaled-linear", "cosine", "sigmoid", "given", "ve", "flow")


@dataclass(frozen=True)
class Schedule:
    """A schedule of T steps. All kinds but the last two preserve variance: α_t = √ᾱ_t, σ_t = √(1 − ᾱ_t).

    linear        β runs evenly from beta_start to beta_end (DDPM, arXiv 2006.11239, section 4)
    scaled-linear √β runs evenly from √beta_start to √beta_end (latent diffusion, arXiv 2112.10752)
    cosine        ᾱ = cos²((t/T + 0.008)/1.008 · π/2), β ≤ 0.999 (arXiv 2102.09672, eq. 17); it has no beta range
    sigmoid       β follows a sigmoid over [−6, 6] from beta_start to beta_end (GeoDiff, arXiv 2203.02923)
    given         `betas` are the schedule; T is their number; a last β of 1 is zero terminal SNR
    ve            α = 1, σ geometric from sigma_min (t = 0) to sigma_max (t = T−1): NCSN (arXiv 1907.05600, section 4),
                  EDM (arXiv 2206.00364, whose defaults these are)
    flow          α = 1 − t/T, σ = t/T, 0 < t ≤ T: flow matching, rectified flow (arXiv 2209.03003)

    t is a number in 0 … T−1; between whole timesteps λ = ln(α/σ) is linear. A flow's t is any number above 0, up to T.
    `zero_snr` rescales √ᾱ so that the last step is pure noise (arXiv 2305.08891, algorithm 1).

    Raises InputError when T is outside 1 … 1,000,000, when a β is outside (0, 1) or is lost in rounding, and when
    sigma_min and sigma_max of ve are not positive and ascending.
    """

    kind: Kind = "linear"
    T: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    betas: tuple[float, ...] = ()
    zero_snr: bool = False
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"schedule kind {self.kind!r} is unknown: use one of {', '.join(KINDS)}")
        for name in ("beta_start", "beta_end", "sigma_min", "sigma_max"):
            object.__setattr__(self, name, typed(name, getattr(self, name), 0.0))  # 80 is 80.0, in a manifest too
        typed("zero_snr", self.zero_snr, False)
        if (self.kind == "given") != bool(self.betas):
            raise InputError(f"a {self.kind} schedule {'needs' if self.kind == 'given' else 'takes no'} betas")
        if self.kind == "given" and len(self.betas) != self.T:
            raise InputError(f"T is {self.T} but {len(self.betas)} betas are given: leave T to Schedule.given")
        if not is_whole(self.T) or not 1 <= self.T <= 1_000_000:
            raise InputError(f"a schedule has 1 to 1,000,000 steps, not T = {self.T!r}")
        if not self.preserves_variance:
            if self.zero_snr:
                raise InputError(f"a {self.kind} schedule takes no zero_snr: it is for those made of betas")
            if self.kind == "ve" and not (0 < self.sigma_min < self.sigma_max < np.inf and self.T > 1):
                raise InputError(
                    f"a ve schedule needs 0 < sigma_min < sigma_max and T ≥ 2, not {self.sigma_min:g}, "
                    f"{self.sigma_max:g} and {self.T}"
                )
            return
        beta = self._betas()
        fine = (beta > 0) & (beta < 1)
        fine[-1] |= self.kind == "given" and self.T > 1 and beta[-1] == 1 and not self.zero_snr
        if not fine.all():
            bad = int(np.argmin(fine))
            raise InputError(f"beta[{bad}] = {beta[bad]:g} is outside (0, 1): check the schedule's range")
        if 1 - beta[0] == 1:
            raise InputError(f"beta[0] = {beta[0]:g} adds no noise that float64 can tell from none: raise it")

    @classmethod
    def given(cls, betas: object, zero_snr: bool = False) -> Schedule:
        """A schedule from explicit betas, array-like of shape [T], each in (0, 1); the last may be 1."""
        flat = np.asarray(betas, dtype=np.float64)
        if flat.ndim != 1:
            raise InputError(f"betas must be a list of numbers, not an array of shape {list(flat.shape)}")
        return cls("given", T=len(flat), betas=tuple(flat.tolist()), zero_snr=zero_snr)

    @classmethod
    def of_alpha_bar(cls, alpha_bar: object) -> Schedule:
        """A schedule from explicit ᾱ, array-like [T], decreasing in (0, 1); the last may be 0 (zero terminal SNR)."""
        bar = np.asarray(alpha_bar, dtype=np.float64)
        if bar.ndim != 1 or not bar.size:
            raise InputError(f"alpha_bar must be a list of numbers, not an array of shape {list(bar.shape)}")
        fine = (bar > 0) & (bar < 1)
        fine[-1] |= bar[-1] == 0 and len(bar) > 1
        if not fine.all():
            bad = int(np.argmin(fine))
            raise InputError(
                f"alpha_bar[{bad}] = {bar[bad]:g} is outside (0, 1): only the last may be 0, for pure noise"
            )
        down = np.diff(bar) < 0
        if not down.all():
            bad = int(np.argmin(down)) + 1
            raise InputError(f"alpha_bar[{bad}] = {bar[bad]:g} is not below the one before it, {bar[bad - 1]:g}")
        if len(bar) > 1 and 0 < bar[-1] < 1e-15 * bar[-2]:
            raise InputError(f"alpha_bar[{len(bar) - 1}] = {bar[-1]:g} is lost beside {bar[-2]:g}: give 0, pure noise")
        return cls.given(1 - bar / np.append(1.0, bar[:-1]))

    @property
    def preserves_variance(self) -> bool:
        """Whether α² + σ² = 1."""
        return self.kind not in ("ve", "flow")

    @property
    def span(self) -> tuple[int, int]:
        """The cleanest and the noisiest whole timestep, in this order."""
        return (1, self.T) if self.kind == "flow" else (0, self.T - 1)

    def _betas(self) -> Float64:
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
            case _:
                return np.array(self.betas)

    @cached_property
    def alpha_bar(self) -> Float64:
        """ᾱ_t = ∏_{s ≤ t} (1 − β_s), float64 [T], decreasing in (0, 1) (0 last with zero_snr); read-only."""
        if not self.preserves_variance:
            raise InputError(f"a {self.kind} schedule has no betas and no ᾱ: use at(t) for α and σ")
        bar: Float64 = np.cumprod(1 - self._betas(), dtype=np.float64)
        if self.zero_snr:
            root = np.sqrt(bar)
            scale = root[0] / (root[0] - root[-1]) if self.T > 1 else 0.0
            bar = ((root - root[-1]) * scale) ** 2
        return _read_only(bar)

    @cached_property
    def beta(self) -> Float64:
        """β_t = 1 − ᾱ_t / ᾱ_{t−1}, float64 [T]; read-only."""
        bar = self.alpha_bar
        return _read_only(1 - bar / np.append(1.0, bar[:-1]) if self.zero_snr else self._betas())

    @cached_property
    def snr(self) -> Float64:
        """The signal-to-noise ratio α_t² / σ_t², float64 [T], cleanest first; read-only."""
        alpha, sigma = self.at(np.arange(self.span[0], self.span[1] + 1))
        return _read_only((alpha / sigma) ** 2)

    @cached_property
    def log_snr_range(self) -> tuple[float, float]:
        """λ = ln(α/σ) at the noisiest whole timestep that is not pure noise, and at the cleanest one."""
        finite = self.snr[self.snr > 0]
        if not finite.size:
            raise InputError("the schedule has no noise level below infinity: give it more than one timestep")
        return float(np.log(finite[-1]) / 2), float(np.log(finite[0]) / 2)

    @cached_property
    def _log_snr(self) -> Float64:
        with np.errstate(divide="ignore"):
            return np.log(self.alpha_bar / (1 - self.alpha_bar)) / 2

    def at(self, t: ArrayLike) -> tuple[Float64, Float64]:
        """α and σ at timesteps t, whole or fractional: float64 of t's shape each.

        Raises InputError outside 0 … T−1 (flow: 0 … T), and between the last two where the last is pure noise.
        """
        t = np.asarray(t, np.float64)
        if not np.all((t >= 0) & (t <= self.span[1])):
            raise InputError(f"timesteps {np.min(t):g} … {np.max(t):g} leave the schedule, 0 … {self.span[1]}")
        match self.kind:
            case "ve":
                power = t / (self.T - 1)
                return np.ones_like(t), self.sigma_min ** (1 - power) * self.sigma_max**power
            case "flow":
                return 1 - t / self.T, t / self.T
        whole = t.astype(np.int64)
        bar = self.alpha_bar[whole]
        if np.any(whole != t):
            if self.alpha_bar[-1] == 0 and np.any((t > self.T - 2) & (t < self.T - 1)):
                raise InputError(f"t between {self.T - 2} and {self.T - 1}, where ᾱ = 0, has no level: use whole ones")
            between = np.interp(t, np.arange(self.T), self._log_snr)
            bar = np.where(whole == t, bar, 1 / (1 + np.exp(-2 * between)))
        return np.sqrt(bar), np.sqrt(1 - bar)

    def t_at(self, log_snr: ArrayLike) -> Float64:
        """The fractional timestep at which ln(α/σ) is `log_snr`: at's inverse, clamped to 0 … T−1 (flow: 0 … T)."""
        log_snr = np.asarray(log_snr, np.float64)
        match self.kind:
            case "ve":
                low, high = np.log(self.sigma_min), np.log(self.sigma_max)
                t = (-log_snr - low) / (high - low) * (self.T - 1)
            case "flow":
                t = self.T / (1 + np.exp(log_snr))
            case _:
                finite = self.T - (self.alpha_bar[-1] == 0)  # np.interp takes no infinity
                t = np.interp(-log_snr, -self._log_snr[:finite], np.arange(finite))
        return np.asarray(np.clip(t, 0, self.span[1]), np.float64)

    def level(self, log_snr: Float64) -> tuple[Float64, Float64, Float64]:
        """t, α and σ where ln(α/σ) is `log_snr`. Beyond the schedule's ends α and σ go on, and t stays (see t_at)."""
        signal = 1 / (1 + np.exp(-log_snr * (2 if self.preserves_variance else 1)))
        match self.kind:
            case "ve":
                alpha, sigma = np.ones_like(log_snr), np.exp(-log_snr)
            case "flow":
                alpha, sigma = signal, 1 - signal
            case _:
                alpha, sigma = np.sqrt(signal), np.sqrt(1 - signal)
        return self.t_at(log_snr), alpha, sigma


def _read_only(values: Float64) -> Float64:
    values.flags.writeable = False
    return values
