"""The protocols of engines and of their lanes, and what both engines and their callers need."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, NoReturn, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from epsrt import noise
from epsrt.bundle import Bundle
from epsrt.condition import Condition
from epsrt.errors import EngineError, InputError, one_of, whole
from epsrt.forks import Unforkable
from epsrt.manifest import Manifest, StepGraph
from epsrt.part import Part
from epsrt.state import State
from epsrt.types import Arrays, Float32, Shape, Size


class Closing(Unforkable, ABC):
    """A context manager that closes itself. It is of one process: pickling or copying it raises InputError."""

    @abstractmethod
    def close(self) -> None: ...

    def __reduce__(self) -> NoReturn:
        bundle = getattr(self, "bundle", None)
        how = f", with epsrt.Sampler.open({str(bundle.path)!r})" if isinstance(bundle, Bundle) else ""
        raise InputError(
            f"a {type(self).__name__} is of the process that opened it, and cannot be pickled or copied: open another "
            f"where it is needed{how}"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Sample:
    """What a lane begins with: x = start[0]·init + start[1]·z, where z is drawn from (seed, index, stream); m = 0.

    init         float32 [C, …], or None for zeros
    stream       the noise stream of z: noise.START, or noise.FORWARD where init is noised
    target       the classifier's class, for step graphs that have a classifier
    known, mask  float32 [C, …] both, for step graphs with a mask: x follows known where mask is 1. None: nowhere
    conditions   what the network takes besides, by name, each of the shape and dtype that Manifest.takes says; a label
                 is the network's own number, as Bundle.label_of gives it. Without one it is its null, or zeros
    null_conditions   what guided ones are guided against, by their own names; without one it is the null, or zeros
    """

    seed: int = 0
    index: int = 0
    start: tuple[float, float] = (0.0, 1.0)
    init: Float32 | None = None
    stream: int = noise.START
    target: int = 0
    known: Float32 | None = None
    mask: Float32 | None = None
    conditions: Mapping[str, ArrayLike] = field(default_factory=dict)
    null_conditions: Mapping[str, ArrayLike] = field(default_factory=dict)

    def inputs(self, m: Manifest, graph: StepGraph, shape: Shape) -> Arrays:
        """Its conditions as a step graph's inputs, by the inputs' names, beside samples of a shape."""
        found: Arrays = {}
        for c in m.takes:
            found[c.name] = _input(c, self.conditions, shape)
        for c in m.nulls(graph.features):
            found[c.null_name] = _input(c, self.null_conditions, shape)
        return found


def _input(c: Condition, given: Mapping[str, ArrayLike], shape: Shape) -> NDArray[Any]:
    if c.name in given:
        return np.asarray(given[c.name])
    filled = c.filled(shape)
    return np.zeros(c.of(shape), c.dtype) if filled is None else filled


class Peek(Protocol):
    """Images on their way to the host; see Lanes.peek. It is for the lanes' thread, and outlives them."""

    def done(self) -> bool:
        """Whether result() has nothing to wait for."""

    def result(self) -> Float32:
        """The images, float32 [len(indices), C, …]. It waits for them, and not for what was advanced after them."""


class Lanes(Protocol):
    """An engine's batch, its state on the device. It is a context manager for one thread, and owns its stream."""

    batch: int
    shape: Shape  # of one sample

    def write(self, index: int, sample: Sample, state: State | None = None) -> None:
        """Begin a sample in lane `index`, or go on with it from a state. The other lanes are not touched.

        A state takes the place of the sample's start and init; all else is the sample's. x0 is 0 until a step has run.

        Raises InputError for a sample or a state that the lanes do not take.
        """

    def save(self, index: int) -> State:
        """What the sample in a lane is between two rows. The lane keeps it. It waits for the device.

        Written into any lanes that make the same bits, in this process or another, it goes on as it would have here.

        Raises NotFiniteError as `read` does.
        """

    def move(self, source: Lanes, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy samples with all that they are, without the host, from lanes of `source`: pairs of (there, here).

        It is asynchronous, and what was advanced before runs first. The lanes of `source` keep what they hold.

        Raises InputError for lanes of another engine, step graph or size, for a lane that two samples would have, and,
        within one lanes object, for a lane that is left and entered.
        """

    def peek(self, indices: Sequence[int], what: Literal["x", "x0"] = "x0") -> Peek:
        """Copies of some lanes' estimates of x0, or of their x, for previews. Steps go on meanwhile.

        They are of the rows that were advanced before. What is not finite comes as it is: `read` names it. A device
        makes one download at a time: a second peek waits for the first.
        """

    def advance(self, rows: Float32) -> None:
        """Run steps: rows float32 [steps, batch, len(engine.columns)]. It is asynchronous: nothing returns to the host.

        The caller may reuse `rows` as soon as this returns.
        """

    def wait(self, ahead: int = 0) -> None:
        """Return once all steps have run, but for those of the last `ahead` calls of advance, 0 or 1.

        Call wait() before telling a user how far it is, or asking whether to go on. With ahead = 1 a device goes on.
        """

    def read(self, index: int, what: Literal["x", "x0"] = "x") -> Float32:
        """A copy of a lane's x or of its estimate of x0, float32 [C, …]; zeros where no step has estimated x0 yet.

        It waits for the device.

        Raises NotFiniteError that names the lane, its sample and the step since which it holds NaN or infinity.
        """

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class RunningPart(Protocol):
    """A part of a bundle on an engine's device: see epsrt.part. Threads may share it, until its engine is closed."""

    name: str
    bundle: Bundle
    part: Part
    precision: str

    def run(self, **arrays: NDArray[Any]) -> Arrays:
        """Its outputs by name, for its inputs by name: [batch, …] each, in the host's memory, as its ports say.

        Raises InputError for arrays that it does not take, NaN among them, and NotFiniteError where an output is not
        finite.
        """


class Engine(Protocol):
    """A bundle's step graph on one device. It is a context manager; threads may share it, each with own lanes."""

    name: str
    device: str  # "cpu" or "cuda": which limits of the parity ladder hold
    bundle: Bundle
    graph: StepGraph  # the step graph that it runs, in the engine's dialect
    precision: str
    columns: tuple[str, ...]
    max_batch: int
    batch_limit: str  # what set max_batch, e.g. "the bundle's largest"

    def lanes(self, batch: int, size: Size | None = None) -> Lanes:
        """Lanes for `batch` samples of some extents, height and width say; by default those of the manifest's shape.

        Raises InputError for a batch or a size that the engine does not take.
        """

    def on(self, graph: StepGraph) -> Engine:
        """Another step graph of the bundle, opened in the same way on the same device. Its caller closes it too."""

    def part(self, name: str) -> RunningPart:
        """A part of the bundle, in the engine's precision where it has it, else in FP32. The engine closes it.

        Raises InputError for a name that is no part's, BundleError where the bundle has no such part.
        """

    def close(self) -> None:
        """Release what the engine holds. Lanes keep what they need until they are closed themselves."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def check_batch(batch: int, engine: Engine) -> None:
    """Raise InputError unless the engine has lanes for `batch` samples, EngineError in a fork of its process."""
    if isinstance(engine, Closing):
        engine.check_process()
    if not 1 <= whole("batch", batch) <= engine.max_batch:
        raise InputError(f"a batch of {batch} is outside 1 … {engine.max_batch}, {engine.batch_limit}")


def check_threads(threads: int | None) -> None:
    """Raise InputError unless threads is None, for all cores, or a whole number of them.

    More threads than cores would only wait for each other.
    """
    cores = os.cpu_count() or 1
    if threads is not None and not 1 <= whole("threads", threads) <= cores:
        raise InputError(f"threads = {threads} is outside 1 … {cores}, this machine's cores: leave it out for all")


def check_lane(index: int, batch: int) -> None:
    """Raise InputError unless lane `index` is one of `batch`."""
    if not 0 <= whole("lane", index) < batch:
        raise InputError(f"lane {index} is outside 0 … {batch - 1}")


def check_lanes(indices: Iterable[int], batch: int) -> list[int]:
    """The indices as a list. Raises InputError unless they are lanes of `batch`, none of them twice."""
    found = list(indices)
    for i, index in enumerate(found):
        check_lane(index, batch)
        if index in found[:i]:
            raise InputError(f"lane {index} is asked for twice: name each lane once")
    return found


def check_whole(whole: bool) -> None:
    """Raise EngineError unless all that lanes were given to advance has been advanced."""
    if not whole:
        raise EngineError("an earlier advance of these lanes failed: what they hold is lost, make new lanes")


def check_sample(sample: Sample, shape: Shape, graph: StepGraph, m: Manifest) -> None:
    """Raise InputError unless a sample's images are of `shape`, and the graph takes them and its conditions."""
    for name in ("init", "known", "mask"):
        image = getattr(sample, name)
        if image is not None and image.shape != shape:
            raise InputError(f"{name} has shape {list(image.shape)}, the network wants {list(shape)}")
    if (sample.known is None) != (sample.mask is None):
        raise InputError("known and mask go together: give both, or neither")
    if sample.mask is not None and "mask" not in graph.features:
        raise InputError(f"{graph.file} takes no mask: open the engine with features=['mask']")
    known = {c.name: c for c in m.takes}
    for what, values in (("condition", sample.conditions), ("null_condition", sample.null_conditions)):
        for name, value in values.items():
            if name not in known:
                way = one_of(name, known) if known else "leave it out"
                raise InputError(f"{graph.file} takes no condition {name!r}: {way}")
            want = known[name].of(shape)
            if np.shape(value) != want:
                raise InputError(f"{what} {name} has shape {list(np.shape(value))}, the network wants {list(want)}")


def check_rows(rows: Float32, batch: int, columns: int) -> None:
    """Raise InputError unless rows are float32 [steps, batch, columns]."""
    if rows.ndim != 3 or rows.shape[1:] != (batch, columns) or rows.dtype != np.float32:
        want = ["steps", batch, columns]
        raise InputError(f"rows must be float32 {want}, not {rows.dtype} {list(rows.shape)}")


def not_finite(lane: int, sample: Sample, step: int, t: float) -> str:
    """The sentence of NotFiniteError about a lane that is not finite since its step number `step`, from 1."""
    return (
        f"lane {lane} (seed {sample.seed}, index {sample.index}) is not finite since its step {step} (t = {t:g}): "
        "the network gave NaN or infinity there, or was given it"
    )
