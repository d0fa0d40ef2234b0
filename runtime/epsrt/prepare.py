"""Prepare: a Request, checked against a bundle, becomes Work: lanes' samples, and the rows that they run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsrt import editing, noise, solvers
from epsrt.bundle import Bundle
from epsrt.conditioning import conditioned, lengths_of, nbytes_of
from epsrt.engine import Sample
from epsrt.errors import InputError, is_whole, whole
from epsrt.guidance import columns_of, guided_apart, judged
from epsrt.images import array_of, images_of, mask_of
from epsrt.limits import Limits, bytes_of
from epsrt.plan import FEATURES, Plan
from epsrt.request import Request, Seeds
from epsrt.types import Float32, Float64, Shape


@dataclass(frozen=True, eq=False)
class Work:
    """A request that has been checked: samples of one shape, their plan, and the columns that differ by sample.

    `own` has float64 [steps, n] for each such column; `features` are what the step graph must have.
    """

    plan: Plan
    samples: list[Sample]
    shape: Shape
    features: tuple[str, ...]
    own: dict[str, Float64]

    def rows(self, columns: Sequence[str], table: Float32, steps: slice, samples: slice) -> Float32:
        """float32 [steps, batch, len(columns)] for some steps of some samples; `table` is plan.rows(columns)."""
        shared, batch = table[steps], len(self.samples[samples])
        rows = np.broadcast_to(shared[:, None], (len(shared), batch, len(columns)))
        if self.own:
            rows = rows.copy()
            for name, values in self.own.items():
                rows[:, :, columns.index(name)] = values[steps, samples]
        return rows


def prepare(
    bundle: Bundle, request: Request, limits: Limits | None = None, at_once: int | None = None, more: int = 0
) -> Work:
    """Check a request against a bundle and limits, for which `at_once` is how many samples are in lanes (None: all).

    `more` are bytes that a sample takes beside those counted here.

    Raises InputError, or BundleError where the bundle cannot do it.
    """
    m, begin, kept = bundle.manifest, request.begin, request.known
    limits = limits or Limits()
    plan = plan_of(bundle, request, limits)
    given = {
        name: None if value is None else array_of(name, value)
        for name, value in (("init", begin.init), ("x", begin.x), ("known", kept.images))
    }
    editing.check_begin(plan, begin)
    extent = next((a.shape[2:] for a in given.values() if a is not None and a.ndim == len(m.shape) + 1), None)
    shape = bundle.image_shape(extent if request.size is None and m.sizes is not None else request.size)
    count = count_of(request, given, bundle)
    seeded = request.seeds.seeds is not None
    limits.check_samples(count, seeded)
    masks = None if kept.mask is None else array_of("mask", kept.mask)
    images = [len(a) for a in given.values() if a is not None and a.ndim]
    images += [] if masks is None else [len(masks) if masks.ndim == len(m.shape) + 1 else 1]
    conditions = nbytes_of(request.conditions, request.null_conditions)
    beside = sum(np.dtype(c.dtype).itemsize * math.prod(c.of(shape)) * (1 + c.guided) for c in m.conditions or ())

    def check_bytes(rows: int) -> None:
        def need(n: int) -> int:
            return bytes_of(
                n,
                shape,
                given=sum(min(several, n) for several in images),
                lanes=n if at_once is None else min(n, at_once),
                masked=masks is not None,
                rows=rows,
                own=rows * n if n > 1 and guided_apart(request, m) else 0,
                conditions=conditions + more * n + beside * (n if at_once is None else min(n, at_once)),
            )

        limits.check_bytes(count, need, seeded)

    check_bytes(len(plan))
    within = None if m.clip is None or m.latents else m.value_range  # what is not clipped has no bounds, nor latents
    noised = begin.strength is not None or bool(plan.start[0] and plan.start[1])
    states = not noised and plan.level != (1.0, 0.0)  # what a plan begins from that are no images
    init = images_of("init", given["init"], count, shape, None if states else within)
    known = images_of("known", given["known"], count, shape, within)
    latents = images_of("x", given["x"], count, shape, None)
    mask = mask_of(masks, count, shape)
    if (known is None) != (mask is None):
        raise InputError("known and mask go together: mask is 1 where known is kept, 0 where it is redrawn")

    def edited(plan: Plan) -> Plan:
        return editing.edited(plan, begin, kept, bundle.own_scale, limits.most_rows)

    def rederived() -> Plan | None:
        other = _rederived(bundle, request, limits)
        return None if other is None else edited(other)

    plan = edited(plan)
    limits.check_rows(len(plan))
    check_bytes(len(plan))
    labels, targets = _classes(bundle, request, count)
    told = conditioned(bundle, labels, request.conditions, request.null_conditions, count, shape)
    asks = request.labels is not None or any(c.guided and c.name in told.given for c in m.takes)
    own = columns_of(m, plan, rederived, request.guidance, asks, told)
    first = latents if init is None else init
    stream = noise.FORWARD if noised else noise.START
    samples = [
        Sample(
            seed=s,
            index=i,
            start=plan.start,
            init=None if first is None else first[k],
            stream=stream,
            target=targets[k],
            known=None if known is None else known[k],
            mask=None if mask is None else mask[k],
            conditions=given_to,
            null_conditions=against,
        )
        for k, (s, i) in enumerate(seeds_of(request.seeds, count))
        for given_to, against in [told.of(k)]
    ]
    wanted = {*plan.features, *(f for f, names in FEATURES.items() if set(names) & set(own))}
    wanted |= set() if mask is None else {"mask"}
    return Work(plan, samples, shape, tuple(f for f in FEATURES if f in wanted), own)


def latents_of(bundle: Bundle, request: Request, limits: Limits) -> Float32:
    """The noise that a request's samples begin from: see Sampler.latents."""
    plan = plan_of(bundle, request, limits)
    if plan.start[0]:
        raise InputError(f"plan {plan.name!r} begins from images, not from noise: leave it out")
    for name, value in (("init", request.begin.init), ("x", request.begin.x)):
        if value is not None:
            raise InputError(f"latents are noise, and {name} is where samples begin instead: leave {name} out")
    count, shape = count_of(request, {}, bundle), bundle.image_shape(request.size)
    seeded = request.seeds.seeds is not None
    limits.check_samples(count, seeded)
    limits.check_bytes(count, lambda n: bytes_of(n, shape, rows=len(plan)), seeded)
    seed, index = zip(*seeds_of(request.seeds, count), strict=True)
    z = noise.normals(list(seed), list(index), noise.START, 0, int(np.prod(shape)))
    return np.float32(plan.start[1] / bundle.own_scale(plan)) * z.reshape(count, *shape)


def plan_of(bundle: Bundle, request: Request, limits: Limits, **fitting: Any) -> Plan:
    """The plan that a request chooses, before it is edited; `fitting` are options where it says nothing of them."""
    plan = _plan_of(bundle, request, limits, **fitting)
    limits.check_rows(len(plan))
    return plan


def _plan_of(bundle: Bundle, request: Request, limits: Limits, **fitting: Any) -> Plan:
    choice = request.choice
    plan, options = choice.plan, dict(choice.options or {})
    if plan is None:
        limits.check_asked(choice.steps, options)
        if request.begin.x is not None:
            fitting["clip"] = None  # a clipped step does not undo an inverted one
        return bundle.plan(choice.method, choice.steps, **{**fitting, **options})
    if not isinstance(plan, Plan):
        raise InputError(f"plan = {plan!r} is no Plan: give one, or method and steps")
    if options or choice.steps is not None or choice.method is not None:
        first = next(iter(options), "steps" if choice.steps is not None else "method")
        raise InputError(f"{first} was given beside a plan, which has settled it: give one of them")
    return plan


def _rederived(bundle: Bundle, request: Request, limits: Limits) -> Plan | None:
    """DDIM's plan for guided samples, unless somebody says of ε what it is to be; None for other methods.

    Guidance drives x0 beyond the bounds. The clip takes that back, and where ε keeps it, images turn grey.
    """
    by, choice = bundle.manifest.sampling, request.choice
    if choice.plan is not None or "rederive" in {**by.options, **(choice.options or {})}:
        return None
    method = by.method if choice.method is None else choice.method
    return plan_of(bundle, request, limits, rederive=True) if "rederive" in solvers.options_of(method) else None


def count_of(request: Request, given: dict[str, NDArray[Any] | None], bundle: Bundle) -> int:
    """How many samples: n, or what is given one a sample; `given` are images by name."""
    r = request
    each = {
        "seeds": r.seeds.seeds,
        "labels": r.labels,
        "targets": r.guidance.targets,
        "guidance": r.guidance.weight,
        "classifier": r.guidance.classifier,
        "guidance_rescale": r.guidance.rescale,
    }
    lengths = {name: len(value) for name, value in each.items() if isinstance(value, list)}
    of_images = {f"{name} images": len(a) for name, a in given.items() if a is not None and a.ndim}
    of_images |= lengths_of(r.conditions, r.null_conditions, bundle)
    n, several = r.n, [k for k in (lengths | of_images).values() if k != 1]
    if n is None:
        n = next(iter(several), 1)
    if not is_whole(n) or n < 1:
        raise InputError(f"n = {n!r}: ask for at least 1 sample")
    for name, length in (lengths | of_images).items():
        if length != n and (length != 1 or name == "seeds"):  # one of the others serves all
            raise InputError(f"{length} {name} for {n} samples: give one each")
    return int(n)


def seeds_of(asked: Seeds, count: int) -> list[tuple[int, int]]:
    """(seed, index) of each sample."""
    for name, given in (("seed", asked.seed), ("first", asked.first)):
        whole(name, given)
    several = asked.seeds
    if several is None:
        ends = [(asked.seed, asked.first), (asked.seed, asked.first + count - 1)]
    else:
        ends = [(s, asked.first) for s in several]
    for s, index in ends:
        for name, value in (("seed", s), ("sample index", index)):
            if not is_whole(value):
                raise InputError(f"{name} {value!r} is not an integer")
        if not 0 <= s < 1 << 64:
            raise InputError(f"seed {s} is outside 0 … 2^64 − 1")
        if not 0 <= index < 1 << 32:
            raise InputError(f"sample index {index} is outside 0 … 2^32 − 1: lower first, or take another seed")
    return [(asked.seed, asked.first + i) for i in range(count)] if several is None else ends


def _classes(bundle: Bundle, request: Request, count: int) -> tuple[list[int], list[int]]:
    """Each sample's label for the network, and its class for the classifier."""

    def each(values: Any) -> list[Any]:
        several = values if isinstance(values, list) else [values]
        return several * count if len(several) == 1 else several

    guided = judged(request.guidance)
    labels: Any = request.labels
    targets: Any = request.guidance.targets
    if targets is not None and not guided:
        raise InputError("targets are what the classifier guides to: give its weight, classifier=, or labels instead")
    if guided and targets is None:
        if labels is None:
            raise InputError("a classifier guides to a class: give targets, or labels for it and the network both")
        targets, labels = labels, labels if bundle.labelled else None
    chosen = [bundle.label_of(label) for label in each(labels)]
    return chosen, [bundle.target_of(t) for t in each(targets)] if guided else [0] * count
