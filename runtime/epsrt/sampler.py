"""Sampler: a plan and an engine make samples."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from epsrt import solvers
from epsrt import spacing as spacings
from epsrt.bundle import Bundle, Manifest
from epsrt.engines import Engine, Lanes, Sample, open_engine
from epsrt.engines.protocol import Closing, Size, image_shape
from epsrt.errors import EpsrtError, OutOfMemoryError
from epsrt.plan import Plan

Samples = NDArray[np.float32]
OnStep = Callable[[int, int], object]

KEPT_LANES = 8  # of all batches and sizes, between calls
REQUEST_BYTES = 512  # a request's own, about
MOST_BYTES = 64 << 30


class Sampler(Closing):
    """Draws samples from a bundle on an engine. A context manager; threads may share it.

    >>> with Sampler.open("out/digits.epsrt") as sampler:
    ...     images = sampler.to_images(sampler.sample(10, steps=50, seed=1, labels=range(10)))
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.bundle = engine.bundle
        self._free: dict[tuple[int, Size], list[Lanes]] = {}  # those used last come last
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def open(
        cls, path: str | Path, engine: str = "auto", *, precision: str | None = None, threads: int | None = None,
        trust_engines: bool = False, may_build: bool = True,
    ) -> Self:  # fmt: skip
        """Open the bundle at `path` on the engine of that name; see epsrt.open_engine."""
        return cls(
            open_engine(
                Bundle.open(path), engine, precision=precision, threads=threads, trust_engines=trust_engines,
                may_build=may_build,
            )
        )  # fmt: skip

    def plan(self, method: str | None = None, steps: int | None = None, **options: Any) -> Plan:
        """The plan that `sample` would run: plan_of its bundle's manifest."""
        return plan_of(self.bundle.manifest, method, steps, **options)

    def sample(
        self,
        n: int | None = None,
        *,
        method: str | None = None,
        steps: int | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        first: int = 0,
        labels: int | Sequence[int] | None = None,
        init: ArrayLike | None = None,
        plan: Plan | None = None,
        size: tuple[int, int] | None = None,
        batch: int | None = None,
        on_step: OnStep | None = None,
        every: int = 1,
        **options: Any,
    ) -> Samples:
        """Draw n samples, float32 [n, C, H, W] in the manifest's value range.

        method, steps   the sampler and its steps, by default the bundle's (ddim, 50); `options` as in
                        epsrt.solvers.make: its own (eta, …), clip, spacing and the spacing's, timesteps. `plan`
                        overrides them all.
        seed, first     sample i is (seed, first + i), the same in any batch, after any restart
        seeds           one seed a sample instead, each with index `first`
        labels          class of each sample, or one for all; None is the null label of a conditional network
        init            images, [n, C, H, W] in the value range, for plans that begin from them: ddim-inversion
        size            height and width, of a bundle with sizes; by default init's, else the bundle's own. Noise goes
                        by an element's place in the flat [C, H, W]: another size is another picture, not a crop
        batch           lanes at once, at most (and by default) the engine's; a larger n is split
        on_step         called as on_step(done, total) after every `every` rows; when it returns False, sampling stops
                        and what comes back is what there is: finished samples, and x0 estimates of those in work

        n may be left out where seeds, labels or init imply it. Raises EpsrtError on bad input, NotFiniteError on NaN.
        """
        plan = self._plan(plan, method, steps, options)
        images, shape = self._images(init, plan, size)
        requests = self._requests(n, seed, seeds, first, labels, images, shape, plan)
        most, rows = self._batch(batch, len(requests)), plan.rows(self.engine.columns)
        groups = [requests[i : i + most] for i in range(0, len(requests), most)]
        chunk = len(rows) if on_step is None else _at_least_one("every", every)
        out = np.empty((len(requests), *shape), np.float32)
        total, done, filled = len(rows) * len(groups), 0, 0
        for group in groups:
            with self._lanes(len(group), shape[1:]) as lanes:
                _write(lanes, group)
                going = True
                for start in range(0, len(rows), chunk):
                    _advance(lanes, rows[start : start + chunk])
                    done += len(rows[start : start + chunk])
                    if on_step is None:
                        continue
                    lanes.wait()  # or it would hear of steps that a GPU has yet to take
                    if on_step(done, total) is False:
                        going = False
                        break
                whole = done % len(rows) == 0
                for i in range(len(group)):
                    out[filled + i] = lanes.read(i, "x" if whole else "x0")
            filled += len(group)
            if not going:
                break
        return out[:filled]

    def stream(
        self,
        n: int | None = None,
        *,
        method: str | None = None,
        steps: int | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        first: int = 0,
        labels: int | Sequence[int] | None = None,
        init: ArrayLike | None = None,
        plan: Plan | None = None,
        size: tuple[int, int] | None = None,
        batch: int | None = None,
        every: int = 1,
        **options: Any,
    ) -> Iterator[Samples]:
        """Yield the x0 estimate, float32 [n, C, H, W], after every `every` rows; the last yield is the samples.

        Arguments as in `sample`. All n are in work at once, in several lanes objects where n exceeds the batch.
        """
        plan = self._plan(plan, method, steps, options)
        images, shape = self._images(init, plan, size)
        requests = self._requests(n, seed, seeds, first, labels, images, shape, plan)
        most, rows = self._batch(batch, len(requests)), plan.rows(self.engine.columns)
        _at_least_one("every", every)
        return self._stream(requests, shape, most, rows, every)

    def _stream(
        self, requests: list[Sample], shape: tuple[int, int, int], most: int, rows: Samples, every: int
    ) -> Iterator[Samples]:
        with ExitStack() as stack:
            groups: list[Lanes] = []
            for i in range(0, len(requests), most):
                group = requests[i : i + most]
                groups.append(stack.enter_context(self._lanes(len(group), shape[1:])))
                _write(groups[-1], group)
            for start in range(0, len(rows), every):
                for lanes in groups:
                    _advance(lanes, rows[start : start + every])
                what = "x" if start + every >= len(rows) else "x0"
                yield np.stack([lanes.read(i, what) for lanes in groups for i in range(lanes.batch)])  # type: ignore[arg-type]

    def to_images(self, samples: Samples) -> NDArray[np.uint8]:
        """uint8 [n, H, W, C] from float32 [n, C, H, W] in the manifest's value range."""
        return to_images(samples, self.bundle.manifest.value_range)

    def close(self) -> None:
        """Release lanes and engine."""
        self._closed = True
        self._drop_free()
        self.engine.close()

    def _drop_free(self) -> None:
        with self._lock:
            for free in self._free.values():
                for lanes in free:
                    lanes.close()
            self._free.clear()

    @contextmanager
    def _lanes(self, batch: int, size: Size) -> Iterator[Lanes]:
        """Lanes of this batch and size, kept for the next caller: on a GPU they are dear to make."""
        with self._lock:
            free = self._free.get((batch, size))
            lanes = free.pop() if free else None
        try:
            lanes = lanes or self.engine.lanes(batch, size)
        except OutOfMemoryError:
            self._drop_free()  # others' memory, kept for nobody yet
            lanes = self.engine.lanes(batch, size)
        try:
            yield lanes
        except BaseException:
            lanes.close()  # its state is anyone's guess
            raise
        with self._lock:
            surplus = lanes if self._closed else self._keep((batch, size), lanes)
        if surplus is not None:
            surplus.close()

    def _keep(self, key: tuple[int, Size], lanes: Lanes) -> Lanes | None:
        """Put lanes by, and return those that make room for them: the ones that were not used for longest."""
        self._free[key] = [*self._free.pop(key, []), lanes]
        if sum(map(len, self._free.values())) <= KEPT_LANES:
            return None
        oldest = next(k for k, kept in self._free.items() if kept)
        return self._free[oldest].pop(0)

    def _plan(self, plan: Plan | None, method: str | None, steps: int | None, options: dict[str, Any]) -> Plan:
        if plan is None:
            return self.plan(method, steps, **options)
        if options or steps is not None:
            raise EpsrtError(
                f"{next(iter(options), 'steps')} was given beside a plan, which has settled it: give one of them"
            )
        return plan

    def _batch(self, batch: int | None, n: int) -> int:
        most = self.engine.max_batch
        if batch is not None and not 1 <= batch <= most:
            raise EpsrtError(f"batch = {batch} is outside 1 … {most}, {self.engine.batch_limit}")
        return min(batch or most, n)

    def _requests(
        self,
        n: int | None,
        seed: int,
        seeds: Sequence[int] | None,
        first: int,
        labels: int | Sequence[int] | None,
        images: Samples | None,
        shape: tuple[int, int, int],
        plan: Plan,
    ) -> list[Sample]:
        lists = {"seeds": seeds, "labels": None if np.ndim(labels) == 0 else labels, "init images": images}  # type: ignore[arg-type]
        given = {name: len(values) for name, values in lists.items() if values is not None}  # type: ignore[arg-type]
        if n is None:
            n = next(iter(given.values()), 1)
        for name, length in given.items():
            if length != n:
                raise EpsrtError(f"{length} {name} for {n} samples: give one each")
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
            raise EpsrtError(f"n = {n!r}: ask for at least 1 sample")
        need = n * (4 * math.prod(shape) + REQUEST_BYTES)
        if need > MOST_BYTES:
            raise EpsrtError(f"n = {n} samples at once take {need >> 30} GiB: draw them in several runs, with first=")
        for s, index in ((seed, first), (seed, first + n - 1)) if seeds is None else [(s, first) for s in seeds]:
            for name, value in (("seed", s), ("sample index", index)):
                if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                    raise EpsrtError(f"{name} {value!r} is not an integer")
            if not 0 <= s < 1 << 64:
                raise EpsrtError(f"seed {s} is outside 0 … 2^64 − 1")
            if not 0 <= index < 1 << 32:
                raise EpsrtError(f"sample index {index} is outside 0 … 2^32 − 1: lower first, or take another seed")
        pairs = [(seed, first + i) for i in range(n)] if seeds is None else [(s, first) for s in seeds]
        each = [labels] * n if np.ndim(labels) == 0 else labels  # type: ignore[arg-type]
        label_of = self.bundle.label_of
        return [
            Sample(seed=s, index=i, start=plan.start, init=image, label=label_of(label))  # type: ignore[arg-type]
            for (s, i), label, image in zip(pairs, each, [None] * n if images is None else images, strict=True)  # type: ignore[arg-type]
        ]

    def _images(
        self, init: ArrayLike | None, plan: Plan, size: Size | None
    ) -> tuple[Samples | None, tuple[int, int, int]]:
        """What to begin from, if anything, and the images' C, H, W."""
        if init is None:
            if plan.start[0]:
                raise EpsrtError(f"plan {plan.name!r} begins from images: give them as init")
            return None, image_shape(self.bundle, size)
        if not plan.start[0]:
            raise EpsrtError(f"plan {plan.name!r} begins from noise alone: leave init out")
        images = np.asarray(init)
        if size is None and self.bundle.manifest.sizes is not None and images.ndim == 4:
            size = images.shape[2:]
        shape = image_shape(self.bundle, size)
        if images.ndim != 4 or images.shape[1:] != shape or images.dtype.kind != "f":
            want = ", ".join(map(str, shape))
            raise EpsrtError(f"init is {images.dtype} {list(images.shape)}, not float [n, {want}]")
        with np.errstate(over="ignore"):
            images = np.ascontiguousarray(images, np.float32)
        bad = np.flatnonzero(~np.isfinite(images).all((1, 2, 3)))
        if len(bad):
            raise EpsrtError(f"init image {bad[0]} holds NaN or infinity")
        return images, shape


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
        counted = spacings.respaced(by.spacing)  # says itself how many steps there are
        spacing = by.spacing if not counted or (owners and steps is None) else "trailing"
        steps = by.steps if owners and steps is None else steps
        known |= {"spacing": spacing}
        known |= {name: value for name, value in by.options.items() if name in spacings.SPACINGS.get(spacing, ())}
    return solvers.make(method, manifest.schedule, steps=steps, **{**known, **options})


def to_images(samples: Samples, value_range: tuple[float, float] = (-1.0, 1.0)) -> NDArray[np.uint8]:
    """uint8 [n, H, W, C] from float [n, C, H, W]; `value_range` maps to 0 … 255, what lies outside is clipped."""
    low, high = value_range
    if np.ndim(samples) != 4:
        raise EpsrtError(f"to_images takes [n, C, H, W], not {list(np.shape(samples))}")
    scaled = (np.asarray(samples, np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    return np.ascontiguousarray(scaled.round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def _write(lanes: Lanes, requests: list[Sample]) -> None:
    for i, request in enumerate(requests):
        lanes.write(i, request)


def _advance(lanes: Lanes, rows: Samples) -> None:
    lanes.advance(np.broadcast_to(rows[:, None], (len(rows), lanes.batch, rows.shape[1])))


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise EpsrtError(f"{name} = {value}: give at least 1")
    return value
