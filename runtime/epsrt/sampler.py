"""Sampler: a plan and an engine make samples."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from epsrt import noise, solvers
from epsrt.bundle import Bundle
from epsrt.engine import Closing, Size, image_shape
from epsrt.engines import Engine, Lanes, open_engine
from epsrt.errors import InputError, OutOfMemoryError, whole
from epsrt.images import from_images, to_images
from epsrt.plan import Plan
from epsrt.prepare import Request, Work, checked_plan, noise_of, own_scale, plan_of, prepare

Samples = NDArray[np.float32]
OnStep = Callable[[int, int], object]

KEPT_LANES = 8  # of all graphs, batches and sizes, between calls
_FIELDS = {f.name for f in fields(Request)} - {"options"}


class Sampler(Closing):
    """Draws samples from a bundle on an engine. A context manager; threads may share it.

    >>> with Sampler.open("out/digits.epsrt") as sampler:
    ...     images = sampler.to_images(sampler.sample(10, steps=50, seed=1, labels=range(10)))

    It runs the smallest step graph that has what a call asks for, opened when first needed by `engine.on`, and owns
    the engine.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.bundle = engine.bundle
        self._engines: dict[str, Engine] = {engine.graph.file: engine}
        self._free: dict[tuple[str, int, Size], list[Lanes]] = {}  # those used last come last
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._closed = False

    @classmethod
    def open(
        cls,
        path: str | Path,
        engine: str = "auto",
        *,
        precision: str | None = None,
        threads: int | None = None,
        trust_engines: bool = False,
        may_build: bool = True,
    ) -> Self:
        """Open the bundle at `path` on the engine of that name; see epsrt.open_engine."""
        return cls(
            open_engine(
                Bundle.open(path),
                engine,
                precision=precision,
                threads=threads,
                trust_engines=trust_engines,
                may_build=may_build,
            )
        )

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
        guidance: float | Sequence[float] | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        classifier: float | Sequence[float] = 0.0,
        targets: int | Sequence[int] | None = None,
        init: ArrayLike | None = None,
        strength: float | None = None,
        x: ArrayLike | None = None,
        known: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        resample: int = 1,
        jump: int = 10,
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
                        overrides them all, and says itself of what DDIM's ε is made
        seed, first     sample i is (seed, first + i), the same in any batch, after any restart
        seeds           one seed a sample instead, each with index `first`
        labels          class of each sample, or one for all; None is the null label of a conditional network

        guidance        weight w of classifier-free guidance, u + w·(c − u), one for all or one a sample: 1 is none, 0
                        ignores the label; by default the bundle's (arXiv 2207.12598). It takes one engine call a step,
                        at twice the batch. Of guided samples, here and by a classifier, ddim derives ε anew from the
                        clipped x0 (rederive) unless told otherwise
        guidance_rescale    φ in [0, 1], towards the deviation of c (arXiv 2305.08891, section 3.4)
        guidance_interval   (low, high): guided where low ≤ t ≤ high alone, in timesteps (arXiv 2404.07724)
        classifier      weight of a classifier's gradient, one for all or one a sample (arXiv 2105.05233), of a bundle
                        exported with one; it guides to `targets`, by default the labels

        init, strength  images to begin from (img2img): noised to where the last `strength` of the steps begins, in
                        (0, 1]. Without strength for plans that begin from images: ddim-inversion
        x               latents to begin from as they are, as `invert` and `latents` return them. x0 is not clipped
                        then, unless `clip` or `plan` says so: a clipped step does not undo an inverted one
        known, mask     images whose pixels are kept where mask is 1 and redrawn where it is 0; mask is bool or float
                        [H, W] or [n, 1, H, W]. Where mask is 1 they come back exactly. Of bundles exported masked
        resample, jump  RePaint's resampling: each `jump` steps are run `resample` times (arXiv 2201.09865)

        size            height and width, of a bundle with sizes; by default those of init, x or known, else the
                        bundle's own. Noise goes by an element's place in the flat [C, H, W]: another size is another
                        picture, not a crop
        batch           lanes at once, at most (and by default) the engine's; a larger n is split
        on_step         called as on_step(done, total) after every `every` rows; when it returns False, sampling stops
                        and what comes back is what there is: finished samples, and x0 estimates of those in work

        Images are float [n, C, H, W] in the value range, or [1, C, H, W] for all. n may be left out where something
        else says how many. Raises InputError on bad input, NotFiniteError on NaN.
        """
        work = prepare(
            self.bundle,
            Request(
                n=n,
                method=method,
                steps=steps,
                plan=plan,
                seed=seed,
                seeds=seeds,
                first=first,
                labels=labels,
                guidance=guidance,
                guidance_rescale=guidance_rescale,
                guidance_interval=guidance_interval,
                classifier=classifier,
                targets=targets,
                init=init,
                strength=strength,
                x=x,
                known=known,
                mask=mask,
                resample=resample,
                jump=jump,
                size=size,
                options=options,
            ),
        )
        engine = self._engine(work.features)
        most = self._batch(engine, batch, len(work.samples))
        groups = [slice(i, i + most) for i in range(0, len(work.samples), most)]
        table, rows = work.plan.rows(engine.columns), len(work.plan)
        chunk = rows if on_step is None else _at_least_one("every", every)
        out = np.empty((len(work.samples), *work.shape), np.float32)
        total, done, filled = rows * len(groups), 0, 0
        for group in groups:
            with self._lanes(engine, work, group) as lanes:
                going = True
                for start in range(0, rows, chunk):
                    steps_now = slice(start, min(start + chunk, rows))
                    lanes.advance(work.rows(engine.columns, table, steps_now, group))
                    done += steps_now.stop - start
                    if on_step is None:
                        continue
                    lanes.wait()  # or it would hear of steps that a GPU has yet to take
                    if _stops(on_step(done, total)):
                        going = False
                        break
                whole = done % rows == 0
                for i in range(lanes.batch):
                    out[filled + i] = lanes.read(i, "x" if whole else "x0")
                filled += lanes.batch
            if not going:
                break
        return out[:filled]

    def stream(
        self, n: int | None = None, *, batch: int | None = None, every: int = 1, **arguments: Any
    ) -> Iterator[Samples]:
        """Yield the x0 estimate, float32 [n, C, H, W], after every `every` rows; the last yield is the samples.

        Arguments as in `sample`. All n are in work at once, in several lanes objects where n exceeds the batch.
        """
        known = {name: value for name, value in arguments.items() if name in _FIELDS}
        options = {name: value for name, value in arguments.items() if name not in _FIELDS}
        work = prepare(self.bundle, Request(n=n, options=options, **known))
        engine = self._engine(work.features)
        most = self._batch(engine, batch, len(work.samples))
        return self._stream(engine, work, most, _at_least_one("every", every))

    def _stream(self, engine: Engine, work: Work, most: int, every: int) -> Iterator[Samples]:
        with ExitStack() as stack:
            groups = [slice(i, i + most) for i in range(0, len(work.samples), most)]
            running = [stack.enter_context(self._lanes(engine, work, group)) for group in groups]
            table = work.plan.rows(engine.columns)
            for start in range(0, len(work.plan), every):
                for lanes, group in zip(running, groups, strict=True):
                    lanes.advance(work.rows(engine.columns, table, slice(start, start + every), group))
                what = "x" if start + every >= len(work.plan) else "x0"
                yield np.stack([lanes.read(i, what) for lanes in running for i in range(lanes.batch)])  # type: ignore[arg-type]

    def invert(
        self, images: ArrayLike, steps: int | None = None, *, method: str = "ddim-inversion", **more: Any
    ) -> Samples:
        """The latents that a deterministic sampler turns back into `images` (DDIM, arXiv 2010.02502, section 4.3).

        images  float [n, C, H, W] in the value range
        `more` are labels and other arguments of `sample`; give the same to `sample(x=latents, steps=steps)`. Returns
        float32 [n, C, H, W]. Raises InputError for a stochastic method: its noise cannot be undone.
        """
        more.setdefault("guidance", 1.0)
        return self.sample(method=solvers.inverse_of(method), steps=steps, init=images, **more)

    def latents(
        self,
        n: int | None = None,
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        first: int = 0,
        size: tuple[int, int] | None = None,
        plan: Plan | None = None,
    ) -> Samples:
        """The noise that samples begin from, float32 [n, C, H, W]: given as x, with the same plan, it makes what its
        seed makes.

        Arguments as in `sample`; `plan` where it is not the default's.
        """
        plan = checked_plan(plan) or self.plan()
        if plan.start[0]:
            raise InputError(f"plan {plan.name!r} begins from images, not from noise: leave it out")
        pairs = noise_of(Request(n=n, seed=seed, seeds=seeds, first=first))
        count, shape = len(pairs), image_shape(self.bundle, size)
        scale = np.float32(plan.start[1] / own_scale(self.bundle.manifest, plan))
        seed_of, index = zip(*pairs, strict=True)
        z = noise.normals(list(seed_of), list(index), noise.START, 0, int(np.prod(shape)))
        return scale * z.reshape(count, *shape)

    def to_images(self, samples: Samples) -> NDArray[np.uint8]:
        """uint8 [n, H, W, C] from float32 [n, C, H, W] in the manifest's value range."""
        return to_images(samples, self.bundle.manifest.value_range)

    def from_images(self, images: NDArray[np.uint8]) -> Samples:
        """float32 [n, C, H, W] in the manifest's value range from uint8 [n, H, W, C]."""
        return from_images(images, self.bundle.manifest.value_range)

    def close(self) -> None:
        """Release lanes and engines."""
        with self._opening:
            self._closed = True
        self._drop_free()
        with self._opening:
            for engine in self._engines.values():
                engine.close()

    def _engine(self, features: tuple[str, ...]) -> Engine:
        """The engine of the smallest step graph that has the features."""
        graph = self.bundle.graph(self.engine.graph.precision, features)
        with self._opening:
            if self._closed:
                raise InputError(f"the sampler of {self.bundle.path.name} is closed: open it again")
            if graph.file not in self._engines:
                self._engines[graph.file] = self.engine.on(graph)
            return self._engines[graph.file]

    def _drop_free(self) -> None:
        with self._lock:
            for free in self._free.values():
                for lanes in free:
                    lanes.close()
            self._free.clear()

    @contextmanager
    def _lanes(self, engine: Engine, work: Work, group: slice) -> Iterator[Lanes]:
        """Lanes with a group of samples in them, kept for the next caller: on a GPU they are dear to make."""
        samples, size = work.samples[group], work.shape[1:]
        key = engine.graph.file, len(samples), size
        with self._lock:
            free = self._free.get(key)
            lanes = free.pop() if free else None
        try:
            lanes = lanes or engine.lanes(len(samples), size)
        except OutOfMemoryError:
            self._drop_free()  # others' memory, kept for nobody yet
            lanes = engine.lanes(len(samples), size)
        try:
            for i, sample in enumerate(samples):
                lanes.write(i, sample)
            yield lanes
        except BaseException:
            lanes.close()  # its state is anyone's guess
            raise
        with self._lock:
            surplus = lanes if self._closed else self._keep(key, lanes)
        if surplus is not None:
            surplus.close()

    def _keep(self, key: tuple[str, int, Size], lanes: Lanes) -> Lanes | None:
        """Put lanes by, and return those that make room for them: the ones that were not used for longest."""
        self._free[key] = [*self._free.pop(key, []), lanes]
        if sum(map(len, self._free.values())) <= KEPT_LANES:
            return None
        oldest = next(k for k, kept in self._free.items() if kept)
        return self._free[oldest].pop(0)

    def _batch(self, engine: Engine, batch: int | None, n: int) -> int:
        most = engine.max_batch
        if batch is not None and not 1 <= whole("batch", batch) <= most:
            raise InputError(f"batch = {batch} is outside 1 … {most}, {engine.batch_limit}")
        return min(batch or most, n)


def _stops(answer: object) -> bool:
    """False, Python's or NumPy's."""
    return isinstance(answer, (bool, np.bool_)) and not answer


def _at_least_one(name: str, value: int) -> int:
    value = whole(name, value)
    if value < 1:
        raise InputError(f"{name} = {value}: give at least 1")
    return value
