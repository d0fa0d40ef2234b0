"""EDM's preconditioners: D(x, σ) = c_skip·x + c_out·F(c_in·x, c_noise) in the words of a Source (arXiv 2206.00364)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from epsrt.errors import InputError, one_of
from epsrt.manifest import Sampling
from epsrt.schedule import Schedule
from epsrt.types import Float64
from epsrt_export.families.negative import Negative
from epsrt_export.families.nvlabs import Settings, settled

# what each is told, with its owner's defaults
PRECONDS: dict[str, Settings] = {
    "EDMPrecond": {"sigma_data": 0.5, "sigma_min": 0.0, "sigma_max": math.inf},
    "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5},
    "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100.0},
    "iDDPMPrecond": {"C_1": 0.001, "C_2": 0.008, "M": 1000},
}
LOW, HIGH = 0.002, 80.0  # σ of the owner's sampler
MOST = 1_000_000  # timesteps of iDDPM
T = 1000  # of schedules whose networks know no whole timesteps


class VP(nn.Module):
    """D = x − σ·F(x/√(1 + σ²), (M − 1)·s), where ln(1 + σ²) = ½·beta_d·s² + beta_min·s, for x in units of √(1 + σ²).

    What F is told comes from a table of the timesteps, with parabolas between them. A formula's rounding would be
    multiplied by M, differently in each engine.
    """

    table: Tensor

    def __init__(self, model: nn.Module, schedule: Schedule, settings: Settings) -> None:
        super().__init__()
        self.model = model
        d, low, M = (settings[name] for name in ("beta_d", "beta_min", "M"))
        total = -np.log(schedule.alpha_bar)
        told = (M - 1) * 2 * total / (low + np.sqrt(low**2 + 2 * d * total))
        rise = np.diff(told)
        bend = np.gradient(rise) / 2
        table = torch.tensor(np.stack([told[:-1], rise, bend], axis=1), dtype=torch.float32)
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], t [B] float32 -> ε [B, C, H, W]."""
        i = t.long().clamp(0, len(self.table) - 1)
        told, rise, bend = self.table[i].unbind(1)
        w = t - i
        out: Tensor = self.model(x, told + w * (rise + (w - 1) * bend), label)
        return out


def precond_of(given: str | None, init: Mapping[str, Any] | None, learned: bool, notes: list[str]) -> str:
    """The class of the preconditioner, as an option or the file has it. What is taken for granted goes to `notes`."""
    said = (init or {}).get("precond")
    for value in (given, said):
        if value is not None and (not isinstance(value, str) or value not in PRECONDS):
            raise InputError(f"precond {value!r} is unknown: {one_of(str(value), PRECONDS)}")
    if given is not None and said not in (None, given):
        raise InputError(f"precond = {given} contradicts the file, whose network has {said}: leave it out")
    if learned and (given or said) not in (None, "iDDPMPrecond"):
        raise InputError(f"precond = {given or said} is of networks without a learned variance: iDDPMPrecond has one")
    own = [name for name in PRECONDS if any(key in (init or {}) for key in PRECONDS[name].keys() - {"M"})]
    if kind := given or said or ("iDDPMPrecond" if learned else None):
        return str(kind)
    if len(own) == 1:
        return own[0]
    notes.append(
        "nothing in the file says how the network is preconditioned: it was taken for EDMPrecond, as EDM trains them; "
        "--set precond=VPPrecond or VEPrecond is for its baselines"
    )
    return "EDMPrecond"


def settings_of(
    kind: str, options: Mapping[str, float | None], init: Mapping[str, Any] | None, notes: list[str]
) -> Settings:
    """The numbers of a preconditioner, and label_dropout, from options, the file's `init` and the owner's defaults."""
    defaults = {**PRECONDS[kind], "label_dropout": 0.0}
    for name, value in options.items():
        if value is not None and name not in defaults:
            takers = " and ".join(other for other in PRECONDS if name in PRECONDS[other])
            raise InputError(f"{name} is of {takers}, and this network has {kind}: leave it out")
    found = settled(kind, defaults, options, init, notes)
    for name in defaults.keys() - {"sigma_min", "label_dropout"}:
        if not found[name] > 0 or (name == "M" and not (float(found[name]).is_integer() and found[name] <= MOST)):
            raise InputError(f"{name} = {found[name]:g} makes no {kind}: its default is {defaults[name]:g}")
    return found


def heun(schedule: Schedule) -> Sampling:
    """The owner's sampler, within the σ that a schedule has."""
    low, high = schedule.sigma_min, schedule.sigma_max
    if schedule.preserves_variance:
        high, low = (math.exp(-end) for end in schedule.log_snr_range)
    return Sampling("heun", 18, "karras", {"sigma_min": max(LOW, low), "sigma_max": min(HIGH, high)})


def diffusion(kind: str, s: Settings, unet: nn.Module, levels: Float64 | None) -> tuple[Schedule, str, nn.Module]:
    """The schedule, what the network returns, and the network as a Source has it. `levels`: u of iDDPMPrecond."""
    match kind:
        case "EDMPrecond":
            ends = max(LOW, s["sigma_min"]), min(HIGH, s["sigma_max"])
            return Schedule("ve", T, sigma_min=ends[0], sigma_max=ends[1]), "edm", unet
        case "VEPrecond":
            schedule = Schedule("ve", T, sigma_min=s["sigma_min"], sigma_max=s["sigma_max"])
            slope = math.log(schedule.sigma_max / schedule.sigma_min) / (T - 1)
            return schedule, "epsilon", Negative(unet, math.log(schedule.sigma_min / 2), slope)  # of ln ½σ
        case "VPPrecond":
            t = np.array([s["epsilon_t"], 1.0])
            first, last = np.log(np.expm1(s["beta_d"] * t**2 / 2 + s["beta_min"] * t)) / 2
            schedule = _preserving(np.exp(np.linspace(first, last, T)))
            return schedule, "epsilon", VP(unet, schedule, s)
    u = _levels(s) if levels is None else levels
    return _preserving(u[-2::-1]), "epsilon", unet  # u begins with the noisiest and ends with 0


def _preserving(sigma: Float64) -> Schedule:
    """The schedule that preserves variance and has these σ/α, cleanest first."""
    return Schedule.of_alpha_bar(1 / (1 + sigma**2))


def _levels(s: Settings) -> Float64:
    """σ of iDDPM's timesteps, the noisiest first, then 0 (table 1)."""
    steps = int(s["M"])
    bar = np.sin(np.pi / 2 * np.arange(steps + 1) / steps / (s["C_2"] + 1)) ** 2
    u = np.zeros(steps + 1)
    for j in range(steps, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(bar[j - 1] / bar[j], s["C_1"]) - 1)
    return u
