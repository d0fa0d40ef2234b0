"""Editing: what plans need for more than drawing at random, and latents and canvases to begin from. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsrt.errors import InputError, LimitError, typed, whole
from epsrt.plan import COLUMNS, DEFAULTS, Plan
from epsrt.request import Begin, Known
from epsrt.types import Float32, Float64

MOST_PIXELS = 65536  # of a side
MOST_ROWS = 100_000  # of a plan with jumps


def check_begin(plan: Plan, begin: Begin) -> None:
    """Raise InputError unless a plan begins from what is given: one of noise, images and latents."""
    if begin.init is not None and begin.x is not None:
        raise InputError("init and x were both given: init is noised, or inverted; x is where the plan begins as it is")
    if plan.start[0]:
        if begin.init is None:
            raise InputError(f"plan {plan.name!r} begins from images: give them as init")
        if begin.strength is not None:
            raise InputError(f"plan {plan.name!r} begins from images as they are: leave strength out")
    elif begin.init is not None and begin.strength is None:
        raise InputError(f"plan {plan.name!r} begins from noise: give strength, 0 to 1, to begin from init noised")
    if begin.strength is not None:
        if begin.init is None:
            raise InputError("strength says how far init is noised: give init")
        number = isinstance(begin.strength, (int, float, np.number)) and not isinstance(begin.strength, bool)
        if not number or not 0 < begin.strength <= 1:
            raise InputError(f"strength = {begin.strength} is outside (0, 1]: 0.6 runs the last 60 % of the steps")


def edited(
    plan: Plan, begin: Begin, known: Known, own_scale: Callable[[Plan], float], most_rows: int = MOST_ROWS
) -> Plan:
    """The plan, begun where a request begins and resampled as it asks, to `most_rows`; `own_scale` is Bundle.own_scale.

    Raises InputError for known pixels that the plan cannot bring back, and for resampling without any.
    """
    masked = known.images is not None
    if masked and not np.allclose(plan.levels[-1], (1.0, 0.0)):
        raise InputError(f"plan {plan.name!r} does not end with clean images, so known pixels could not come back")
    if begin.strength is not None:
        plan = plan.begun(len(plan) - max(1, round(len(plan) * float(begin.strength))))
    if begin.x is not None:
        plan = replace(plan, start=(own_scale(plan), 0.0))
    if whole("resample", known.resample) != 1:
        if not masked:
            raise InputError(f"resample = {known.resample} is for masked samples: give known and mask")
        plan = resampled(plan, known.resample, known.jump, most_rows)
    return plan


def resampled(plan: Plan, times: int, jump: int = 10, most_rows: int = MOST_ROWS) -> Plan:
    """RePaint's plan (arXiv 2201.09865, section 4.2 and figure 7): it goes back by `jump` rows after every `jump` rows.

    times      how often each stretch of rows is run, r in the paper; 1 is the plan itself
    jump       how many rows a stretch has, j in the paper
    most_rows  that the plan may then have, 100,000 at most

    Going back is forward diffusion, x = s·x + n·z, from the level that a row leaves to the one before the stretch. It
    is part of that row: its noise joins the row's own (equal in law), and it costs no evaluation of the network. Only a
    row with a learned variance is followed by one for the way back. Noise indices count the new rows.

    Raises InputError where the numbers are not whole and at least 1, and for plans with memory, whose rows cannot run
    out of order.
    """
    times, jump = typed("resample", times, 1), typed("jump", jump, 1)
    for name, value in (("resample", times), ("jump", jump)):
        if not 1 <= value <= 1000:
            raise InputError(f"{name} = {value} is outside 1 … 1000")
    if times == 1:
        return plan
    if np.any(plan["c"]) or np.any(plan["g"]):
        raise InputError(f"{plan.name} remembers what came before, and resampling goes back: use ddpm, ddim or euler")
    if jump >= len(plan):
        raise InputError(f"jump = {jump} of {len(plan)} steps leaves nothing to run again: give less than {len(plan)}")
    total = len(plan) + (times - 1) * jump * len(range(0, len(plan) - jump, jump))
    most = min(most_rows, MOST_ROWS)
    if total > most:
        raise LimitError(f"{len(plan)} steps, resampled {times} times, are {total} rows: give fewer, {most} at most")
    rows: list[Float64] = []
    levels = plan.levels
    for row, back in _walk(len(plan), times, jump):
        rows += _rows(plan, levels, row, back)
    table = np.array(rows)
    table[:, COLUMNS.index("n")] = np.arange(len(table))
    return replace(plan, table=table, name=f"{plan.name}-resampled")


def _walk(count: int, times: int, jump: int) -> list[tuple[int, int | None]]:
    """The rows in the order in which they run, and the row that each then goes back to, or None."""
    left = {count - 1 - k: times - 1 for k in range(0, count - jump, jump)}
    walk: list[tuple[int, int | None]] = []
    row = 0
    while row < count:
        after = row + 1
        if left.get(after, 0):
            left[after] -= 1
            walk.append((row, after - jump))
            row = after - jump
        else:
            walk.append((row, None))
            row = after
    return walk


def _rows(plan: Plan, levels: Float64, row: int, back: int | None) -> list[Float64]:
    """A row with the way back to the level of row `back`, as one row or two."""
    table, at = plan.table[row].copy(), {name: i for i, name in enumerate(COLUMNS)}
    if back is None:
        return [table]
    (alpha, sigma), (to_alpha, to_sigma) = levels[row + 1], levels[back]
    s = to_alpha / alpha
    n = np.sqrt(max(to_sigma**2 - (s * sigma) ** 2, 0.0))
    noised = {"d": n, "ka": to_alpha, "kb": to_sigma}
    if table[at["r"]]:  # exp(r·v)·z joins no other noise
        forward = plan.table[back].copy()  # what it tells the network does not matter
        for name in "bhcefogrs":
            forward[at[name]] = 0.0
        for name, value in {"a": s, **noised}.items():
            forward[at[name]] = value
        forward[at["w"]] = DEFAULTS["w"]
        return [table, forward]
    for name in "abh":
        table[at[name]] *= s
    for name, value in {**noised, "d": np.hypot(s * table[at["d"]], n)}.items():
        table[at[name]] = value
    return [table]


def slerp(a: Float32, b: Float32, fractions: Sequence[float] | NDArray[np.floating]) -> Float32:
    """Spherical interpolation between two latents (DDIM, arXiv 2010.02502, eq. 67): float32 [len(fractions), C, …].

    a, b       float32 [C, …] each
    fractions  0 is a, 1 is b; beyond, the great circle goes on

    The norm of normal latents is nearly the same everywhere. A straight line between two cuts inside that sphere, and
    this does not. Raises InputError for latents of two shapes, for NaN, and for latents that point in opposite
    directions.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype.kind != "f" or b.dtype.kind != "f":
        raise InputError(
            f"slerp takes two latents of one shape, float, not {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        )
    try:
        f = np.asarray(fractions, np.float64)
    except (TypeError, ValueError, OverflowError):
        f = np.array(np.nan)
    if f.ndim != 1 or a.ndim not in (2, 3, 4):
        raise InputError("slerp takes two latents [C, H, W] and a list of fractions, such as [0, 0.5, 1]")
    f = f.reshape(-1, *[1] * a.ndim)
    one, two = a.astype(np.float64), b.astype(np.float64)
    if not (np.isfinite(one).all() and np.isfinite(two).all() and np.isfinite(f).all()):
        raise InputError("slerp was given NaN or infinity")
    lengths = np.linalg.norm(one), np.linalg.norm(two)
    cosine = float((one * two).sum() / max(lengths[0] * lengths[1], 1e-300))
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(angle) < 1e-6:
        if cosine < 0:
            raise InputError("slerp has no one way between latents that point in opposite directions: choose others")
        between = (1 - f) * one + f * two  # the sphere is flat between neighbours
    else:
        between = (np.sin((1 - f) * angle) * one + np.sin(f * angle) * two) / np.sin(angle)
    with np.errstate(over="ignore"):
        found = np.asarray(between, np.float32)
    if not np.isfinite(found).all():
        raise InputError("slerp's latents are beyond what float32 holds: scale them")
    return found


def _pair(name: str, given: Any) -> tuple[int, int]:
    values = list(given) if isinstance(given, (tuple, list, np.ndarray)) else []
    if len(values) != 2:
        raise InputError(f"{name} = {given!r} is not a pair of whole numbers, down and across")
    return typed(name, values[0], 1), typed(name, values[1], 1)


def canvas(images: Float32, size: tuple[int, int], at: tuple[int, int] | None = None) -> tuple[Float32, Float32]:
    """Images on a larger canvas, and a mask that is 1 where they lie: `known` and `mask` of outpainting.

    images  float32 [n, C, h, w]
    size    height and width of the canvas
    at      top and left of the images on it; None: in its middle

    Returns float32 [n, C, H, W] and [n, 1, H, W]. Raises InputError where the images do not fit.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype.kind != "f":
        raise InputError(f"canvas takes images float [n, C, h, w], not {images.dtype} {list(images.shape)}")
    (n, channels, h, w), (height, width) = images.shape, _pair("size", size)
    top, left = ((height - h) // 2, (width - w) // 2) if at is None else _pair("at", at)
    if height > MOST_PIXELS or width > MOST_PIXELS:
        raise InputError(f"a canvas of {height} × {width} is over {MOST_PIXELS} pixels a side")
    if not (0 <= top <= height - h and 0 <= left <= width - w):
        raise InputError(f"images of {h} × {w} at ({top}, {left}) do not fit a canvas of {height} × {width}")
    known = np.zeros((n, channels, height, width), np.float32)
    mask = np.zeros((n, 1, height, width), np.float32)
    known[..., top : top + h, left : left + w] = images
    mask[..., top : top + h, left : left + w] = 1
    return known, mask
