"""Which timesteps a sampler visits: descending lists of t in [0, T). The previous t is always the next entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from epsrt.errors import EpsrtError

Spacing = Literal["leading", "linspace", "trailing", "quadratic"]
SPACINGS: tuple[Spacing, ...] = ("leading", "linspace", "trailing", "quadratic")


def timesteps(T: int, steps: int, spacing: str = "trailing") -> list[int]:
    """`steps` distinct timesteps of a schedule of T, from noisy to clean.

    leading    0, k, 2k, … with k = ⌊T/steps⌋ (DDPM's and DDIM's own; never reaches T − 1 unless steps = T)
    linspace   T−1 … 0 in even, rounded strides
    trailing   T−1, T−1−T/steps, … (arXiv 2305.08891, table 2: starts where training ended)
    quadratic  ⌊c i²⌋ up to 0.8 T (arXiv 2010.02502, section D.2 and its code), moved up where two would coincide

    Raises EpsrtError when `steps` is outside [1, T], or when it is 1 and the spacing would visit only t = 0.
    """
    if spacing not in SPACINGS:
        raise EpsrtError(f"spacing {spacing!r} is unknown: use one of {', '.join(SPACINGS)}")
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= T:
        raise EpsrtError(f"steps = {steps!r} is outside 1 … {T}, the steps that the schedule has")
    if steps == 1 and T > 1 and spacing in ("leading", "quadratic"):
        raise EpsrtError(f"{spacing} spacing with 1 step visits only t = 0, where nothing is left to do: use trailing")
    up: NDArray[Any]
    match spacing:
        case "leading":
            up = np.arange(steps) * (T // steps)
        case "linspace":
            up = np.linspace(0, T - 1, steps).round() if steps > 1 else np.array([T - 1])
        case "trailing":
            up = np.round(np.arange(T, 0, -T / steps)[:steps])[::-1] - 1
        case _:
            rank = np.arange(steps)
            floors = 4 * T * rank**2 // (5 * max(steps - 1, 1) ** 2)  # in integers: in floats 800 may come out as 799
            up = rank + np.maximum.accumulate(floors - rank)
    return [int(t) for t in up[::-1]]


def given(T: int, ts: Sequence[int]) -> list[int]:
    """Check an explicit list: integers in [0, T), strictly descending. Raises EpsrtError naming the first misfit."""
    if len(ts) == 0:
        raise EpsrtError("the list of timesteps is empty: give at least one")
    for i, t in enumerate(ts):
        number = isinstance(t, (int, float, np.integer, np.floating)) and not isinstance(t, bool)
        if not number or not 0 <= t < T or int(t) != t:
            raise EpsrtError(f"timestep {t!r} is not an integer in 0 … {T - 1}")
        if i and t >= ts[i - 1]:
            why = "appears twice" if t == ts[i - 1] else f"comes after {ts[i - 1]}"
            raise EpsrtError(f"timestep {t} {why}: timesteps must descend, from noisy to clean")
    return [int(t) for t in ts]
