"""What a network is told beside the image: the time and, for a transformer, where each patch is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsrt.errors import InputError

TimeFeatures = Literal["sinusoidal", "fourier"]
FOURIER_SPAN = 1000.0  # timesteps over which a Fourier frequency of 1 turns once


def check_conditions(classes: int, null_label: bool, time_features: str, fourier_scale: float) -> None:
    """Refuse what no network can be conditioned on: the part that every config shares. Raises InputError."""
    if classes < 0 or (null_label and not classes):
        raise InputError(f"classes = {classes} with null_label = {null_label}: it needs classes")
    if time_features not in ("sinusoidal", "fourier"):
        raise InputError(f"time_features {time_features!r} is unknown: use sinusoidal or fourier")
    if not 0 < fourier_scale < math.inf:
        raise InputError(f"fourier_scale = {fourier_scale} must be above 0: 16 suits timesteps up to 1,000")


class Exact(nn.Module):
    """Its buffers are float32 and stay so, to the bit, under .half() and .to(dtype): they follow to devices only."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = [(name, buffer) for name, buffer in self._buffers.items() if buffer is not None]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact:
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class TimeEmbedding(Exact):
    """t [B] -> [B, width]: sines and cosines in float32 whatever the network's dtype, then two linear layers.

    The features are sin(ω_k t) and cos(ω_k t) for channels/2 frequencies ω, in radians a timestep:

    sinusoidal  ω from 1 down to 1e-4 in equal ratios (arXiv 1706.03762, section 3.5, as DDPM's code has it)
    fourier     ω = 2π·w/1000 with w ~ N(0, scale²), drawn once from torch's generator and never trained: random Fourier
                features (arXiv 2006.10739), for time as in NCSN++ (arXiv 2011.13456). They are in the state_dict,
                since no formula gives them back

    Why t/1000: scales like 16 go with a time in (0, 1], and the network is told the timestep, 0 … T − 1 with T = 1000
    nearly always. A feature then turns once in 1000/16 = 62 timesteps at one standard deviation, the fastest of 128 in
    about 24: neighbours in time look alike, and the whole range does not. Of t itself, ω would turn 16 times a
    timestep, and of integers only the fraction left over would be seen: noise. A constant and not T, so that the
    network is a function of t alone; where T is another, scale·1000/T gives the same turns in all.
    """

    frequencies: Tensor  # ω, float32 [channels/2]

    def __init__(
        self, channels: int, width: int, features: TimeFeatures = "sinusoidal", fourier_scale: float = 16.0
    ) -> None:
        super().__init__()
        drawn, count = features == "fourier", channels // 2
        omega = fourier_frequencies(count, fourier_scale) if drawn else sinusoidal_frequencies(count)
        self.register_buffer("frequencies", omega, persistent=drawn)
        self.linear1 = nn.Linear(channels, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        angle = t.to(torch.float32)[:, None] * self.frequencies  # FP16 would round it: t reaches 1,000
        waves = torch.cat([angle.sin(), angle.cos()], dim=1).to(self.linear1.weight.dtype)
        out: Tensor = self.linear2(F.silu(self.linear1(waves)))
        return out


def sinusoidal_frequencies(count: int) -> Tensor:
    """float32 [count], from 1 to 1e-4 radians a timestep in equal ratios."""
    steps = torch.arange(count, dtype=torch.float64)
    return torch.exp(-math.log(10_000) * steps / max(count - 1, 1)).float()


def fourier_frequencies(count: int, scale: float) -> Tensor:
    """float32 [count], 2π·w/1000 radians a timestep, w ~ N(0, scale²) of torch's global generator."""
    return torch.randn(count, dtype=torch.float32) * (2 * math.pi * scale / FOURIER_SPAN)


class PositionEmbedding(Exact):
    """Patches [B, grid², width] + where they are: fixed 2-D sines and cosines (MAE, arXiv 2111.06377; DiT's).

    The first half of the channels tells the column, the second the row, each as sin(ω_k p) then cos(ω_k p) with
    ω_k = 10000^(−4k/width). Rows of patches follow each other. width is a multiple of 4. Not in the state_dict.
    """

    table: Tensor  # float32 [grid², width]

    def __init__(self, grid: int, width: int) -> None:
        super().__init__()
        omega = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
        angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
        axis = torch.cat([angle.sin(), angle.cos()], dim=1)
        table = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)], dim=1).float()
        self.register_buffer("table", table, persistent=False)

    def forward(self, h: Tensor, dtype: torch.dtype) -> Tensor:
        """h + the table, the table in `dtype`: under autocast the sum is kept finer than the product h was."""
        return h + self.table.to(dtype)
