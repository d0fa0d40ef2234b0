"""Requests: what a caller wants drawn, checked, and made into lanes' samples and rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from epsrt import editing, noise, solvers
from epsrt.bundle import Bundle
from epsrt.engine import Sample, image_shape
from epsrt.errors import InputError, whole
from epsrt.guidance import columns_of, judged
from epsrt.images import array_of, images_of, mask_of
from epsrt.manifest import Manifest
from epsrt.plan import FEATURES, Plan
from epsrt.timesteps import SPACINGS, respaced

Samples = NDArray[np.float32]

PER_SAMPLE = ("seeds", "labels", "targets", "guidance", "classifier", "guidance_rescale")
REQUEST_BYTES = 512  # a request's own, about
MOST_BYTES = 64 << 30


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """The arguments of Sampler.sample that say what to draw; see there."""

    n: int | None = None
    method: str | None = None
    steps: int | None = None
    plan: Plan | None = None
    seed: int = 0
    seeds: Sequence[int] | None = None
    first: int = 0
    labels: int | Sequence[int] | None = None
    guidance: float | Sequence[float] | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    classifier: float | Sequence[float] = 0.0
    targets: int | Sequence[int] | None = None
    init: ArrayLike | None = None
    strength: float | None = None
    x: ArrayLike | None = None
    known: ArrayLike | None = None
    mask: ArrayLike | None = None
    resample: int = 1
    jump: int = 10
    size: tuple[int, int] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Work:
    """A request that has been checked: samples of one shape C, H, W, their plan, and the columns that differ by sample.

    `own` has float64 [steps, n] for each such column; `features` are what the step graph must have.
    """

    plan: Plan
    samples: list[Sample]
    shape: tuple[int, int, int]
    features: tuple[str, ...]
    own: dict[str, NDArray[np.float64]]

    def rows(self, columns: Sequence[str], table: Samples, steps: slice, samples: slice) -> Samples:
        """float32 [steps, batch, len(columns)] for some steps of some samples; `table` is plan.rows(columns)."""
        shared, batch = table[steps], len(self.samples[samples])
        rows = np.broadcast_to(shared[:, None], (len(shared), batch, len(columns)))
        if self.own:
            rows = rows.copy()
            for name, values in self.own.items():
                rows[:, :, columns.index(name)] = values[steps, samples]
        return rows


def plan_of(manifest: Manifest, method: str | None = None, steps: int | None = None, **options: Any) -> Plan:
    """The plan of a method for a bundle's network; arguments and errors as in epsrt.solvers.make.

    What the manifest says is the default: prediction, sigma_data, how its owner samples, ddpm's variance where the
    network learned one, and x0 clipped (not for methods that would not be themselves with it).
    """
    by = manifest.sampling
    method = by.method if method is None else method
    chosen, owners = solvers.options_of(method), solvers.method_of(method) is solvers.method_of(by.method)
    known: dict[str, Any] = {"prediction": manifest.prediction, "sigma_data": manifest.sigma_data}
    if solvers.method_of(method).clips:
        known["clip"] = manifest.clip
    if manifest.variance is not None and "variance" in chosen:
        known["variance"] = manifest.variance
    known |= {name: value for name, value in by.options.items() if name in chosen}
    if "timesteps" not in options and "spacing" not in options:
        counted = respaced(by.spacing)  # says itself how many steps there are
        spacing = by.spacing if not counted or (owners and steps is None) else "trailing"
        steps = by.steps if owners and steps is None else steps
        known |= {"spacing": spacing}
        known |= {name: value for name, value in by.options.items() if name in SPACINGS.get(spacing, ())}
    return solvers.make(method, manifest.schedule, steps=steps, **{**known, **options})


def prepare(bundle: Bundle, request: Request) -> Work:
    """Check a request against a bundle. Raises InputError, or BundleError where the bundle cannot do it."""
    r, m = _listed(request), bundle.manifest
    plan = _plan(m, r)
    given = {
        name: None if getattr(r, name) is None else array_of(name, getattr(r, name)) for name in ("init", "x", "known")
    }
    _check_begin(plan, r)
    extent = next((a.shape[2:] for a in given.values() if a is not None and a.ndim == 4), None)
    shape = image_shape(bundle, extent if r.size is None and m.sizes is not None else r.size)
    count = _count(r, given)
    need = count * (4 * math.prod(shape) + REQUEST_BYTES)
    if need > MOST_BYTES:
        raise InputError(f"n = {count} samples at once take {need >> 30} GiB: draw them in several runs, with first=")
    within = None if m.clip is None else m.value_range  # what is not clipped has no bounds
    noised = r.strength is not None or bool(plan.start[0] and plan.start[1])
    states = not noised and plan.level != (1.0, 0.0)  # what a plan begins from that are no images
    init = images_of("init", given["init"], count, shape, None if states else within)
    known = images_of("known", given["known"], count, shape, within)
    latents = images_of("x", given["x"], count, shape, None)
    mask = mask_of(r.mask, count, shape)
    if (known is None) != (mask is None):
        raise InputError("known and mask go together: mask is 1 where known is kept, 0 where it is redrawn")
    plan = _edited(plan, m, r, known is not None)
    labels, targets = _classes(bundle, r, count)

    def rederived() -> Plan | None:
        other = _rederived(m, r)
        return None if other is None else _edited(other, m, r, known is not None)

    own = columns_of(m, plan, rederived, r, labels, count)
    begin = latents if init is None else init
    stream = noise.FORWARD if noised else noise.START
    samples = [
        Sample(
            seed=s,
            index=i,
            start=plan.start,
            init=None if begin is None else begin[k],
            label=labels[k],
            stream=stream,
            target=targets[k],
            known=None if known is None else known[k],
            mask=None if mask is None else mask[k],
        )
        for k, (s, i) in enumerate(seeds_of(r, count))
    ]
    wanted = {*plan.features, *(f for f, names in FEATURES.items() if set(names) & set(own))}
    wanted |= set() if mask is None else {"mask"}
    return Work(plan, samples, shape, tuple(f for f in FEATURES if f in wanted), own)


def own_scale(manifest: Manifest, plan: Plan) -> float:
    """How many times the network's own x a plan's first row reads: some methods keep x in other units."""
    if plan.level == (0.0, 1.0):
        return 1.0
    _, sigma = manifest.schedule.at(manifest.timesteps(plan["t"][:1]))
    return float(plan.level[1] / sigma[0])


def checked_plan(plan: Plan | None) -> Plan | None:
    """Raises InputError where it is something else."""
    if plan is not None and not isinstance(plan, Plan):
        raise InputError(f"plan = {plan!r} is no Plan: give one, or method and steps")
    return plan


def noise_of(r: Request) -> list[tuple[int, int]]:
    """(seed, index) of each sample of a request for noise alone."""
    r = _listed(r)
    return seeds_of(r, _count(r, {}))


def _listed(r: Request) -> Request:
    """With lists for what may be one a sample: no generators, no arrays."""
    found: dict[str, Any] = {}
    for name in PER_SAMPLE:
        value = getattr(r, name)
        if isinstance(value, np.ndarray):
            value = value.tolist()
        elif isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
            value = list(value)
        found[name] = value
    if r.seeds is not None and not isinstance(found["seeds"], list):
        raise InputError(f"seeds = {r.seeds!r} are not one a sample: give a list, or seed=")
    return replace(r, **found)


def _plan(manifest: Manifest, r: Request, **fitting: Any) -> Plan:
    plan = checked_plan(r.plan)
    if plan is None:
        if r.x is not None:
            fitting["clip"] = None  # a clipped step does not undo an inverted one
        return plan_of(manifest, r.method, r.steps, **{**fitting, **r.options})
    if r.options or r.steps is not None or r.method is not None:
        first = next(iter(r.options), "steps" if r.steps is not None else "method")
        raise InputError(f"{first} was given beside a plan, which has settled it: give one of them")
    return plan


def _rederived(manifest: Manifest, r: Request) -> Plan | None:
    """DDIM's plan for guided samples, unless somebody says of ε what it is to be; None for other methods.

    Guidance drives x0 beyond the bounds. The clip takes that back, and where ε keeps it, images turn grey.
    """
    if r.plan is not None or "rederive" in {**manifest.sampling.options, **r.options}:
        return None
    method = manifest.sampling.method if r.method is None else r.method
    return _plan(manifest, r, rederive=True) if "rederive" in solvers.options_of(method) else None


def _check_begin(plan: Plan, r: Request) -> None:
    """Of noise, init and x, a plan begins from one."""
    if r.init is not None and r.x is not None:
        raise InputError("init and x were both given: init is noised, or inverted; x is where the plan begins as it is")
    if plan.start[0]:
        if r.init is None:
            raise InputError(f"plan {plan.name!r} begins from images: give them as init")
        if r.strength is not None:
            raise InputError(f"plan {plan.name!r} begins from images as they are: leave strength out")
    elif r.init is not None and r.strength is None:
        raise InputError(f"plan {plan.name!r} begins from noise: give strength, 0 to 1, to begin from init noised")
    if r.strength is not None:
        if r.init is None:
            raise InputError("strength says how far init is noised: give init")
        number = isinstance(r.strength, (int, float, np.number)) and not isinstance(r.strength, bool)
        if not number or not 0 < r.strength <= 1:
            raise InputError(f"strength = {r.strength} is outside (0, 1]: 0.6 runs the last 60 % of the steps")


def _edited(plan: Plan, manifest: Manifest, r: Request, masked: bool) -> Plan:
    """The plan, begun where the request begins and resampled as it asks."""
    if masked and not np.allclose(plan.levels[-1], (1.0, 0.0)):
        raise InputError(f"plan {plan.name!r} does not end with clean images, so known pixels could not come back")
    if r.strength is not None:
        plan = plan.begun(len(plan) - max(1, round(len(plan) * float(r.strength))))
    if r.x is not None:
        plan = replace(plan, start=(own_scale(manifest, plan), 0.0))
    if whole("resample", r.resample) != 1:
        if not masked:
            raise InputError(f"resample = {r.resample} is for masked samples: give known and mask")
        plan = editing.resampled(plan, r.resample, r.jump)
    return plan


def _count(r: Request, given: dict[str, NDArray[Any] | None]) -> int:
    lengths = {name: len(getattr(r, name)) for name in PER_SAMPLE if isinstance(getattr(r, name), list)}
    of_images = {f"{name} images": len(a) for name, a in given.items() if a is not None and a.ndim}
    n, several = r.n, [k for k in (lengths | of_images).values() if k != 1]
    if n is None:
        n = next(iter(several), 1)
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise InputError(f"n = {n!r}: ask for at least 1 sample")
    for name, length in (lengths | of_images).items():
        if length != n and (length != 1 or name == "seeds"):  # one of the others serves all
            raise InputError(f"{length} {name} for {n} samples: give one each")
    return int(n)


def seeds_of(r: Request, count: int) -> list[tuple[int, int]]:
    """(seed, index) of each sample."""
    for name, given in (("seed", r.seed), ("first", r.first)):
        whole(name, given)
    ends = ((r.seed, r.first), (r.seed, r.first + count - 1)) if r.seeds is None else [(s, r.first) for s in r.seeds]
    for s, index in ends:
        for name, value in (("seed", s), ("sample index", index)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise InputError(f"{name} {value!r} is not an integer")
        if not 0 <= s < 1 << 64:
            raise InputError(f"seed {s} is outside 0 … 2^64 − 1")
        if not 0 <= index < 1 << 32:
            raise InputError(f"sample index {index} is outside 0 … 2^32 − 1: lower first, or take another seed")
    return [(r.seed, r.first + i) for i in range(count)] if r.seeds is None else [(s, r.first) for s in r.seeds]


def _classes(bundle: Bundle, r: Request, count: int) -> tuple[list[int], list[int]]:
    """Each sample's label for the network, and its class for the classifier."""

    def each(values: Any) -> list[Any]:
        several = values if isinstance(values, list) else [values]
        return several * count if len(several) == 1 else several

    guided, labels, targets = judged(r), r.labels, r.targets
    if targets is not None and not guided:
        raise InputError("targets are what the classifier guides to: give its weight, classifier=, or labels instead")
    if guided and targets is None:
        if labels is None:
            raise InputError("a classifier guides to a class: give targets, or labels for it and the network both")
        targets, labels = labels, labels if bundle.labelled else None
    chosen = [bundle.label_of(label) for label in each(labels)]
    return chosen, [bundle.target_of(t) for t in each(targets)] if guided else [0] * count
