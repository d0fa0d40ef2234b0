"""Guidance as columns of the rows: each sample's weight of its conditions against none, and of a classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsrt.conditioning import Conditioned
from epsrt.errors import InputError, is_whole
from epsrt.manifest import Manifest
from epsrt.plan import COLUMNS, Plan
from epsrt.request import Guidance, Request
from epsrt.types import Float64

LARGEST = 1e6  # weight

Columns = dict[str, Float64]


def judged(guidance: Guidance) -> bool:
    """Whether a classifier guides any of the samples."""
    return bool(np.any(_numbers("classifier", guidance.classifier)))


def guided_apart(request: Request, m: Manifest) -> bool:
    """Whether guidance is given one a sample, or weighs samples of which only some may have something to weigh."""
    asked, labels = request.guidance, request.labels
    several = (values for values in (asked.weight, asked.classifier, asked.rescale) if isinstance(values, list))
    if any(len(values) > 1 for values in several):
        return True
    if np.all(_numbers("guidance", m.sampling.guidance if asked.weight is None else asked.weight) == 1):
        return False
    given = {*(request.conditions or {}), *(request.null_conditions or {})}
    without = [x is None or (is_whole(x) and x == m.null_label) for x in labels] if isinstance(labels, list) else []
    return any(c.guided and c.name in given for c in m.takes) or len({*without}) > 1


def columns_of(
    m: Manifest, plan: Plan, rederived: Callable[[], Plan | None], asked: Guidance, asks: bool, given: Conditioned
) -> Columns:
    """The columns of each sample, float64 [steps, n], where they are not the plan's own: w, phi, s.

    rederived  makes the plan for samples that are guided, where that is another: the columns that differ are theirs
    asks       whether the caller says what is drawn, by labels say; then the bundle's own weight is the default
    given      the samples' conditions

    Raises InputError for weights, interval or rescale that are none, or that nothing takes.
    """
    weight, guides, count = asked.weight, [c for c in m.takes if c.guided], given.count
    if weight is None:
        weight = m.sampling.guidance if asks and guides else 1.0
    each = {"guidance": weight, "classifier": asked.classifier, "guidance_rescale": asked.rescale}
    w, s, phi = (np.broadcast_to(_numbers(name, value), (count,)) for name, value in each.items())
    told = given.told if guides else np.ones(count, np.bool_)  # without any, Bundle.graph says what is lacking
    if not np.all((phi >= 0) & (phi <= 1)):
        raise InputError(f"guidance_rescale = {asked.rescale} is outside [0, 1]: 0.7 is usual")
    if np.any(w != 1) and (bare := given.lacks(guides)) is not None:
        raise InputError(
            f"guidance weighs the condition {bare.name!r} against another, and {bare.name!r} has no null of its own: "
            f"give null_conditions={{{bare.name!r}: …}}, or guidance=1"
        )
    if asked.weight is not None and np.any(w != 1) and not told.any():
        what = "give labels that are classes" if m.null_label is not None else "give conditions that differ"
        raise InputError(f"guidance weighs a label against none: {what}")
    w = np.where(told, w, 1.0)  # the null label has nothing to be weighed against
    weighed, classified = bool(np.any(w != 1)), bool(np.any(s))
    if classified and not np.any(plan["j"]):
        raise InputError(f"plan {plan.name!r} has no column j, what a classifier's gradient adds: take one of a method")
    used = {"guidance_interval": weighed or classified, "guidance_rescale": weighed}
    for name, there in (("guidance_interval", asked.interval is not None), ("guidance_rescale", np.any(phi))):
        if there and not used[name]:
            raise InputError(f"{name} is for guided samples: give guidance")
    on = _interval(m, plan, asked.interval)[:, None]

    def spread(values: NDArray[Any], otherwise: NDArray[Any] | float, where: NDArray[np.bool_]) -> Float64:
        """[steps, n]; where all samples have the same values it takes the memory of one column."""
        same = [np.all(a == a[..., :1]) for a in (values, np.asarray(where))]
        made = np.where(where[..., :1], values[..., :1], otherwise) if all(same) else np.where(where, values, otherwise)
        return np.broadcast_to(made, (len(plan), count))

    found: Columns = {}
    if weighed:
        found |= {"w": spread(w, 1.0, on), "phi": spread(phi, 0.0, on)}
    if classified:
        found["s"] = spread(s, 0.0, on)
    guided = (w < 0) | (w > 1) | (s != 0)  # between 0 and 1 guidance drives nothing beyond the bounds
    other = rederived() if guided.any() else None
    if other is not None:
        differing = (name for name in COLUMNS if not np.array_equal(plan[name], other[name]))
        found |= {name: spread(other[name][:, None], plan[name][:, None], guided) for name in differing}
    return found


def _numbers(name: str, values: Any) -> Float64:
    try:
        given = np.asarray(values)
        found = given.astype(np.float64) if given.dtype.kind in "iuf" else np.array(np.nan)
    except (TypeError, ValueError, OverflowError):
        found = np.array(np.nan)
    if found.ndim > 1 or not np.isfinite(found).all() or np.any(np.abs(found) > LARGEST):
        raise InputError(f"{name} = {values!r} is not a number within ±{LARGEST:g}, or one a sample")
    return found


def _interval(m: Manifest, plan: Plan, interval: tuple[float, float] | None) -> NDArray[np.bool_]:
    """Whether each row is guided: those whose timestep lies in the interval (arXiv 2404.07724, section 3)."""
    if interval is None:
        return np.ones(len(plan), bool)
    try:
        low, high = (float(v) for v in interval)
    except (TypeError, ValueError, OverflowError):
        low, high = np.nan, np.nan
    if not low <= high:
        raise InputError(f"guidance_interval = {interval!r} is not (low, high), two timesteps that ascend")
    t = m.timesteps(plan["t"])
    on = (t >= low) & (t <= high)
    if not on.any():
        have = f"{t.min():g} … {t.max():g}"
        raise InputError(f"guidance_interval = ({low:g}, {high:g}) holds none of the plan's timesteps, {have}")
    return np.asarray(on)
