"""Timesteps: which ones a sampler visits. Descending lists of t in the schedule, whole or fractional."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsrt.errors import InputError, is_whole, one_of, sane, typed
from epsrt.limits import length
from epsrt.schedule import Schedule
from epsrt.types import Float64

# name -> its options
SPACINGS: dict[str, tuple[str, ...]] = {
    "leading": ("steps_offset", "shift"),
    "linspace": ("shift",),
    "trailing": ("shift",),
    "quadratic": (),
    "karras": ("sigma_min", "sigma_max", "rho"),
    "exponential": ("sigma_min", "sigma_max"),
    "lambda": ("lambda_min", "lambda_max"),
}
OPTIONS = tuple(dict.fromkeys(option for options in SPACINGS.values() for option in options))
MOST_STEPS = 1_000_000
APART = 1e-9  # of T: timesteps nearer than this are one
_RESPACING = re.compile(r"ddim([0-9]{1,7})|([0-9]{1,7}(?:,[0-9]{1,7})*)")


def respaced(spacing: str) -> bool:
    """Whether `spacing` is a respacing string (ddim25; 10,10,15), which says itself how many steps there are."""
    return isinstance(spacing, str) and _RESPACING.fullmatch(spacing) is not None


def spaced(schedule: Schedule | int, steps: int | None, spacing: str = "trailing", **options: Any) -> list[float]:
    """`steps` distinct timesteps of a schedule (or of any schedule of T = `schedule` steps), from noisy to clean.

    leading      0, k, 2k, … with k = ⌊T/steps⌋, moved up by `steps_offset` (0). It is DDPM's and DDIM's own, and never
                 reaches T − 1 unless steps = T
    linspace     T−1 … 0 in even, rounded strides
    trailing     T−1, T−1−T/steps, … It starts where training ended (arXiv 2305.08891, table 2)
    quadratic    ⌊c i²⌋ up to 0.8 T (arXiv 2010.02502, section D.2 and its code), moved up where two would coincide
    karras       σ^(1/ρ) is even from sigma_max to sigma_min, ρ = `rho` (7) (arXiv 2206.00364, eq. 5)
    exponential  ln σ is even from sigma_max to sigma_min
    lambda       λ = ln(α/σ) is even from lambda_min to lambda_max (arXiv 2206.00927, section 3.3)
    ddim25       0, k, 2k, … with the k that gives 25 (improved-diffusion's respacing); refused where none does
    10,10,15     the schedule is cut into equal sections, each with so many even, rounded strides, the cleanest first

    A flow's leading, linspace and trailing timesteps are not rounded. They are then shifted: s' = shift·s/(1 + (shift −
    1)s), s = t/T (arXiv 2403.03206, eq. 23). The σ of karras and exponential is σ/α. Their ends, and lambda's, are the
    schedule's unless given, and all three visit fractional timesteps. A respacing string takes `steps` None or its own
    count.

    Raises InputError when `steps` is outside [1, T] (karras, exponential, lambda: below 1), for a range that leaves the
    schedule, for an option that the spacing does not take, and when it would visit only t = 0.
    """
    if not isinstance(schedule, Schedule):
        schedule = Schedule("linear", T=typed("T", schedule, 1))
    spacing = typed("spacing", spacing, "trailing")
    strings = respaced(spacing)
    if spacing not in SPACINGS and not strings:
        raise InputError(f"spacing {spacing!r} is unknown: {one_of(spacing, SPACINGS)}, ddim25 or 10,10,15")
    takes = () if strings else SPACINGS[spacing]
    for name, value in options.items():
        if name not in takes:
            raise InputError(f"{spacing} spacing takes no option {name!r}; its options: {', '.join(takes) or 'none'}")
        options[name] = typed(name, value, 0 if name == "steps_offset" else 0.0)
    if strings:
        found = _respace(schedule.T, spacing)
        if steps is not None and steps != len(found):
            raise InputError(f"spacing {spacing!r} has {len(found)} steps, not {steps}: leave steps out")
        return [t + schedule.span[0] for t in found]
    sane("steps", steps)
    even = spacing not in ("karras", "exponential", "lambda")
    most = schedule.T if even else MOST_STEPS
    if steps is None or not is_whole(steps) or not 1 <= steps <= most:
        why = ", the steps that the schedule has" if even else ""
        raise InputError(f"steps = {steps!r} is outside 1 … {most}{why}")
    if even:
        return _even(schedule, int(steps), spacing, **options)
    return _by_noise(schedule, int(steps), spacing, **options)


def _even(schedule: Schedule, steps: int, spacing: str, steps_offset: int = 0, shift: float = 1.0) -> list[float]:
    T, flow = schedule.T, schedule.kind == "flow"
    if steps == 1 and T > 1 and spacing in ("leading", "quadratic") and not flow and not steps_offset:
        raise InputError(f"{spacing} spacing with 1 step visits only t = 0, where nothing is left to do: use trailing")
    if not abs(steps_offset) <= T:
        raise InputError(f"steps_offset moves the timesteps outside 0 … {T - 1}: it is 0, or 1 in diffusers' own")
    if shift != 1 and not flow:
        raise InputError(f"shift = {shift} is for flow schedules; this one is {schedule.kind}")
    if not 1e-3 <= shift <= 1e3:
        raise InputError(f"shift = {shift} is outside 0.001 … 1000; 1 shifts nothing")
    up: NDArray[Any]
    match spacing:
        case "leading":
            up = np.arange(steps) * (T // steps) + steps_offset
        case "linspace":
            up = np.linspace(0, T - 1, steps) if steps > 1 else np.array([T - 1])
        case "trailing":
            up = np.arange(T, 0, -T / steps)[:steps][::-1]
            up = (up if flow else np.round(up)) - 1
        case _:
            rank = np.arange(steps)
            floors = 4 * T * rank**2 // (5 * max(steps - 1, 1) ** 2)  # in integers: in floats 800 may come out as 799
            up = rank + np.maximum.accumulate(floors - rank)
    if not 0 <= up[0] <= up[-1] <= T - 1:
        raise InputError(
            f"steps_offset = {steps_offset} moves the timesteps to {up[0]} … {up[-1]}, outside 0 … {T - 1}"
        )
    if flow:
        s = (up + 1) / T
        return [float(t) for t in (T * (shift * s / (1 + (shift - 1) * s)))[::-1]]
    return [int(t) for t in np.round(up)[::-1]]


def _by_noise(schedule: Schedule, steps: int, spacing: str, rho: float = 7.0, **ends: float) -> list[float]:
    noisy, clean = schedule.log_snr_range
    lam = {"sigma_max": noisy, "lambda_min": noisy, "sigma_min": clean, "lambda_max": clean}
    for name, value in ends.items():
        if name.startswith("sigma"):
            lam[name], low, high = -np.log(value) if value > 0 else np.inf, np.exp(-clean), np.exp(-noisy)
        else:
            lam[name], low, high = value, noisy, clean
        if not noisy - 1e-9 <= lam[name] <= clean + 1e-9:
            raise InputError(f"{name} = {value:g} is outside {low:g} … {high:g}, the schedule's")
    names = ("lambda_min", "lambda_max") if spacing == "lambda" else ("sigma_max", "sigma_min")
    first, last = (lam[name] for name in names)
    if first >= last and steps > 1:
        raise InputError(f"{spacing} spacing from σ = {np.exp(-first):g} to {np.exp(-last):g} does not descend")
    ramp = np.linspace(0, 1, steps)
    if spacing == "karras":
        if not 0.1 <= rho <= 1e3:
            raise InputError(f"rho = {rho} is outside 0.1 … 1000: EDM's is 7")
        high, low = np.exp(-first / rho), np.exp(-last / rho)  # σ^(1/ρ)
        return [float(t) for t in schedule.t_at(-rho * np.log((1 - ramp) * high + ramp * low))]
    return [float(t) for t in schedule.t_at(first + ramp * (last - first))]


def _respace(T: int, text: str) -> list[int]:
    """The timesteps of one of improved-diffusion's strings, descending."""
    if text.startswith("ddim"):
        count = int(text[4:])
        strides = [k for k in range(1, T) if -(-T // k) == count]
        if not strides:
            raise InputError(f"spacing {text!r}: no whole stride visits {count} of {T} timesteps: use leading")
        return list(range(0, T, strides[0]))[::-1]
    counts, up, start = [int(word) for word in text.split(",")], [], 0
    for i, count in enumerate(counts):
        size = T // len(counts) + (i < T % len(counts))
        if not 1 <= count <= size:
            raise InputError(f"spacing {text!r}: {count} is outside 1 … {size}, the timesteps of section {i + 1}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        up += [start + round(rank) for rank in np.cumsum([0.0] + [stride] * (count - 1)).tolist()]
        start += size
    if up == [0] and T > 1:
        raise InputError(f"spacing {text!r} visits only t = 0, where nothing is left to do: ask for more")
    return up[::-1]


def given(schedule: Schedule, ts: Sequence[float] | Float64) -> Float64:
    """An explicit list as float64 [len(ts)]: numbers in the schedule that strictly descend.

    Raises InputError that names the first misfit.
    """
    if not isinstance(ts, (Sequence, np.ndarray)) or isinstance(ts, str) or getattr(ts, "ndim", 1) == 0:
        raise InputError(f"timesteps = {ts!r} is not a list of numbers")
    if not 1 <= length(ts) <= MOST_STEPS:
        what = f"has {length(ts)}: give {MOST_STEPS} at most" if length(ts) else "is empty: give at least one"
        raise InputError(f"the list of timesteps {what}")
    low, high = schedule.span
    span = f"above 0, up to {high}" if schedule.kind == "flow" else f"in {low} … {high}"
    try:
        values = np.asarray(ts)
    except ValueError:  # lists in a list
        values = np.asarray(ts, object)
    if values.ndim != 1 or values.dtype.kind not in "iuf":
        odd = next((t for t in ts if isinstance(t, bool) or not isinstance(t, (int, float, np.number))), ts)
        raise InputError(f"timestep {odd!r} is not a number {span}")
    values = values.astype(np.float64)
    inside = (values <= high) & (values > 0 if schedule.kind == "flow" else values >= low)
    if not inside.all():
        raise InputError(f"timestep {ts[int(np.argmin(inside))]!r} is not a number {span}")
    down = np.diff(values) < -APART * schedule.T
    if not down.all():
        i = int(np.argmin(down)) + 1
        why = "appears twice" if abs(values[i] - values[i - 1]) <= APART * schedule.T else f"comes after {ts[i - 1]}"
        raise InputError(f"timestep {ts[i]} {why}: timesteps must descend, from noisy to clean")
    return values
