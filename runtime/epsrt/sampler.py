"""Sampler: a plan and an engine make samples."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Literal, Self, Unpack

import numpy as np
from numpy.typing import ArrayLike

from epsrt import solvers
from epsrt.autoencoding import Tiles
from epsrt.awaiting import Sampling, Streaming, awaited
from epsrt.bundle import Bundle
from epsrt.control import AnyOf, Control, Flag
from epsrt.engine import Engine
from epsrt.engines import open_engine
from epsrt.errors import EngineError, InputError, OutOfMemoryError, whole
from epsrt.graphs import Graphs
from epsrt.limits import Limits
from epsrt.manifest import Rung
from epsrt.parity.measure import told
from epsrt.pictures import Pictures
from epsrt.plan import Plan
from epsrt.pool import LanePool
from epsrt.prepare import Work, latents_of, prepare
from epsrt.request import Arguments, Request
from epsrt.solvers import Options
from epsrt.types import Float32, OnStep
from epsrt.verify import verify_step


class Sampler(Pictures):
    """Draws samples from a bundle on an engine. A context manager; threads may share it.

    >>> with Sampler.open("out/digits.epsrt") as sampler:
    ...     images = sampler.to_images(sampler.sample(10, steps=50, seed=1, labels=range(10)))

    It runs the smallest step graph that has what a call asks for, opened when first needed by `engine.on`. An engine
    that its caller opened stays open; Sampler.open owns the one that it opens.

    `limits` bound what one call may ask for. Calls that are in work when the sampler is closed run to their end.
    Whatever ends a call early, an error, a flag or a signal's exception, the next one makes the same samples as ever.
    """

    def __init__(self, engine: Engine, *, limits: Limits | None = None):
        self.engine, self.limits = engine, Limits.of(limits)
        self.bundle = engine.bundle
        self._graphs, self._pool = Graphs(engine), LanePool()

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
        require_signature: str | Path | None = None,
        limits: Limits | None = None,
    ) -> Self:
        """Open the bundle at `path` on the engine of that name; see Bundle.open and epsrt.open_engine."""
        limits = Limits.of(limits)  # before minutes go into an engine
        opened = open_engine(
            Bundle.open(path, require_signature=require_signature),
            engine,
            precision=precision,
            threads=threads,
            trust_engines=trust_engines,
            may_build=may_build,
        )
        try:
            sampler = cls(opened, limits=limits)
            sampler._graphs.own.append(opened)
        except BaseException:
            opened.close()
            raise
        return sampler

    def plan(self, method: str | None = None, steps: int | None = None, **options: Unpack[Options]) -> Plan:
        """The plan that `sample` would run: Bundle.plan."""
        self.limits.check_asked(steps, options)
        plan = self.bundle.plan(method, steps, **options)
        self.limits.check_rows(len(plan))
        return plan

    def sample(
        self,
        n: Request | int | None = None,
        *,
        batch: int | None = None,
        on_step: OnStep | None = None,
        every: int = 1,
        cancel: Flag | None = None,
        deadline: float | None = None,
        decode: bool | None = None,
        tile: int | None = None,
        overlap: int | None = None,
        **asked: Unpack[Arguments],
    ) -> Float32:
        """Draw samples, float32 [n, C, …] in the manifest's value range.

        n, asked  how many, and the keywords of epsrt.request.Arguments: method, steps, seed, labels, guidance, init, …
                  Or a Request, which holds both
        batch     lanes at once, at most (and by default) the engine's; a larger n is split
        on_step   called as on_step(done, total) after every `every` rows. When it returns False, sampling stops, and
                  what comes back is what there is: finished samples, and x0 estimates of those in work
        cancel    a threading.Event or the like: once it is set, sampling stops with Cancelled
        deadline  a time of time.monotonic(): once it has passed, sampling stops with DeadlineExceeded
        decode    of a bundle of latents: False returns those, in the network's units; True decodes them to pictures,
                  and raises BundleError where the bundle does not. None: decode where it does
        tile, overlap   decode in tiles: see `decode`

        Of latents, init and known may be pictures, told apart by their shape: they are encoded to the encoder's mean,
        and the mask is averaged over the pixels of each latent's. Known pixels are pasted over the decoded pictures.

        Flag and deadline are looked at between steps (of less than 10 ms, every 10 ms; on a GPU one step or 10 ms more
        is already in its queue) and between decoded batches, not while a graph is opened or compiled.

        Raises InputError on bad input, NotFiniteError on NaN.
        """
        control, at_once = Control(cancel, deadline), _batch(self.engine, batch)
        decodes, tiles = self._decodes(decode), Tiles.of(self.bundle, tile, overlap)
        request, kept = self._in_latents(Request.of(n, asked, self.limits))
        work = prepare(self.bundle, request, self.limits, at_once, self._pixels(decodes))
        with self._graphs.running(work.features) as engine:
            most = _batch(engine, batch)
            groups = [slice(i, i + most) for i in range(0, len(work.samples), most)]
            table, rows = work.plan.rows(engine.columns), len(work.plan)
            chunk = rows if on_step is None else whole("every", every, least=1)
            out = np.empty((len(work.samples), *work.shape), np.float32)
            control.total, filled = rows * len(groups), 0
            for group in groups:
                with self._pool.lanes(engine, work.samples[group], work.shape[1:]) as lanes:
                    going = True
                    for start in range(0, rows, chunk):
                        for steps in control.slices(start, min(start + chunk, rows), [lanes]):
                            lanes.advance(work.rows(engine.columns, table, steps, group))
                        if on_step is None:
                            continue
                        lanes.wait()  # or it would hear of steps that a GPU has yet to take
                        if _stops(on_step(control.done, control.total)):
                            going = False
                            break
                    finished = control.done % rows == 0
                    for i in range(lanes.batch):
                        out[filled + i] = lanes.read(i, "x" if finished else "x0")
                    filled += lanes.batch
                if not going:
                    break
            return self._shown(out[:filled], kept, tiles, most, control.look) if decodes else out[:filled]

    async def sample_async(
        self, n: Request | int | None = None, *, cancel: Flag | None = None, **asked: Unpack[Sampling]
    ) -> Float32:
        """`sample` in a thread of the event loop's default executor, where on_step is called too; arguments as there.

        Cancelling the task, by asyncio.timeout say, stops the call as `cancel` does. The task ends once the call has:
        no step runs any more, and its lanes are free.
        """
        stop = AnyOf(cancel)
        return await awaited(partial(self.sample, n, cancel=stop, **asked), stop)

    def stream(
        self,
        n: Request | int | None = None,
        *,
        batch: int | None = None,
        every: int = 1,
        cancel: Flag | None = None,
        deadline: float | None = None,
        decode: bool | None = False,
        **asked: Unpack[Arguments],
    ) -> Generator[Float32, None, None]:
        """Yield the x0 estimate, float32 [n, C, …], after every `every` rows; the last yield is the samples.

        Of a bundle of latents all are latents, or with `decode` pictures; `preview` makes some in no time.

        Arguments as in `sample`. All n are in work at once, in several lanes objects where n exceeds the batch. Closing
        the generator, or dropping it, frees them.
        """
        control = Control(cancel, deadline)
        decode, (request, kept) = self._decodes(decode), self._in_latents(Request.of(n, asked, self.limits))
        work = prepare(self.bundle, request, self.limits, more=self._pixels(decode))
        with self._graphs.running(work.features) as engine:  # refuses now, not at the first next()
            most = _batch(engine, batch)
        stream = self._stream(work, most, whole("every", every, least=1), control)
        return (self._shown(x, kept, None, most, control.look) for x in stream) if decode else stream

    def _stream(self, work: Work, most: int, every: int, control: Control) -> Generator[Float32, None, None]:
        with self._graphs.running(work.features) as engine, ExitStack() as stack:
            groups = [slice(i, i + most) for i in range(0, len(work.samples), most)]
            enter, size = stack.enter_context, work.shape[1:]
            running = [enter(self._pool.lanes(engine, work.samples[group], size)) for group in groups]
            table, rows = work.plan.rows(engine.columns), len(work.plan)
            control.total = rows * len(groups)
            for start in range(0, rows, every):
                for steps in control.slices(start, min(start + every, rows), running):
                    for lanes, group in zip(running, groups, strict=True):
                        lanes.advance(work.rows(engine.columns, table, steps, group))
                what: Literal["x", "x0"] = "x" if start + every >= rows else "x0"
                yield np.stack([lanes.read(i, what) for lanes in running for i in range(lanes.batch)])

    async def stream_async(
        self, n: Request | int | None = None, *, cancel: Flag | None = None, **asked: Unpack[Streaming]
    ) -> AsyncGenerator[Float32, None]:
        """`stream`, awaited as `sample_async` is. Close it (contextlib.aclosing) to leave it early."""
        stop = AnyOf(cancel)
        with closing(await awaited(partial(self.stream, n, cancel=stop, **asked), stop)) as stream:
            while (images := await awaited(partial(next, stream, None), stop)) is not None:
                yield images

    def invert(
        self,
        images: ArrayLike | Request,
        *,
        cancel: Flag | None = None,
        deadline: float | None = None,
        **asked: Unpack[Arguments],
    ) -> Float32:
        """The latents that a deterministic sampler turns back into images (DDIM, arXiv 2010.02502, section 4.3).

        images  float [n, C, …] in the value range, or a Request that has them as init; of a bundle of latents, those
                or pictures, which are encoded
        asked   labels and other arguments of `sample`; give the same to `sample(x=latents, …)`. The method is
                ddim-inversion, or ddim for its inverse; guidance is 1 unless given
        cancel, deadline    as in `sample`

        Returns float32 [n, C, H, W]. Raises InputError for a stochastic method: its noise cannot be undone.
        """
        if isinstance(images, Request):
            request = Request.of(images, asked)
        else:
            request = Request.of(None, asked, self.limits).but(init=images)
        if request.choice.plan is None:
            request = request.but(method=solvers.inverse_of(request.choice.method or "ddim-inversion"))
        if request.guidance.weight is None:
            request = request.but(guidance=1.0)
        return self.sample(request, cancel=cancel, deadline=deadline, decode=False)

    def latents(self, n: Request | int | None = None, **asked: Unpack[Arguments]) -> Float32:
        """The noise that samples begin from, float32 [n, C, H, W]: given as x, with the same plan, it makes what its
        seed makes.

        Arguments as in `sample`; those that say nothing of noise, plan or size change nothing.
        """
        return latents_of(self.bundle, Request.of(n, asked, self.limits), self.limits)

    def check(self) -> list[Rung]:
        """Whether files and engine are still what was opened, for health checks. Other threads may go on sampling.

        Every file of the bundle is hashed, which takes one or two seconds a gigabyte. The engine's own step graph runs
        the smallest rung of the golden file, in a lane of its own: some 25 evaluations of the network. The first check
        also compiles a model for one sample, on engines that compile (OpenVINO, TensorRT), where none is kept yet.

        Returns the rungs that it measured. Raises BundleError where a file was changed, EngineError where the engine
        fails or misses a rung.
        """
        with self._graphs.running(self.engine.graph.features):
            self.bundle.check()
            try:
                rung = verify_step(self.engine)
            except OutOfMemoryError:
                self._pool.drop()
                rung = verify_step(self.engine)
        if not rung.passed:
            name = f"{self.engine.name} on {self.bundle.path.name}"
            raise EngineError(f"{name} does not compute what it should: it misses {told(rung)}: open it again")
        return [rung]

    def close(self) -> None:
        """Release lanes and the engines that the sampler opened, those in work at their calls' end; refuse new calls.

        An engine that was given to the sampler stays open.
        """
        try:
            self._pool.close()
        finally:
            self._graphs.close()


def _batch(engine: Engine, batch: int | None) -> int:
    """How many samples are in lanes at once, at most."""
    if batch is not None and not 1 <= whole("batch", batch) <= engine.max_batch:
        raise InputError(f"batch = {batch} is outside 1 … {engine.max_batch}, {engine.batch_limit}")
    return batch or engine.max_batch


def _stops(answer: object) -> bool:
    """False, Python's or NumPy's."""
    return isinstance(answer, (bool, np.bool_)) and not answer
