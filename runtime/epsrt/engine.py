"""What an engine is to its callers, and what both engines and callers need."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from epsrt import noise
from epsrt.bundle import Bundle
from epsrt.errors import EngineError
from epsrt.manifest import StepGraph

Rows = NDArray[np.float32]
Images = NDArray[np.float32]
Size = tuple[int, ...]  # height and width, in pixels


class Closing(ABC):
    """A context manager that closes itself."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Sample:
    """What a lane begins with: x = start[0]·init + start[1]·z, z drawn from (seed, index, stream), m = 0.

    init         float32 [C, H, W], or None for zeros
    label        the network's own number, as Bundle.label_of gives it
    stream       of z: noise.START, or noise.FORWARD where init is noised
    target       the classifier's class, for step graphs that have one
    known, mask  float32 [C, H, W] both, for step graphs with a mask: where mask is 1, x follows known; None: nowhere
    """

    seed: int = 0
    index: int = 0
    start: tuple[float, float] = (0.0, 1.0)
    init: Images | None = None
    label: int = 0
    stream: int = noise.START
    target: int = 0
    known: Images | None = None
    mask: Images | None = None


class Lanes(Protocol):
    """An engine's batch; the state lives on the device. A context manager, for one thread, that owns its stream."""

    batch: int
    shape: tuple[int, int, int]  # C, H, W of its images

    def write(self, index: int, sample: Sample) -> None:
        """Begin a sample in lane `index`; the other lanes are not touched."""

    def advance(self, rows: Rows) -> None:
        """Run steps: rows float32 [steps, batch, len(engine.columns)]. Asynchronous; nothing returns to the host.

        `rows` may be reused by the caller as soon as this returns.
        """

    def wait(self) -> None:
        """Return once all that was advanced has run: before telling a user how far it is, or asking to go on."""

    def read(self, index: int, what: Literal["x", "x0"] = "x") -> Images:
        """A copy of a lane's x or x0 estimate, float32 [C, H, W]. Synchronises.

        Raises NotFiniteError that names the lane, its sample and the step since which it holds NaN or infinity.
        """

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Engine(Protocol):
    """A bundle's step graph on one device. Safe to share between threads; each thread takes its own lanes."""

    name: str
    device: str  # "cpu" or "cuda": which limits of the parity ladder hold
    bundle: Bundle
    graph: StepGraph  # the step graph that it runs
    precision: str
    columns: tuple[str, ...]
    max_batch: int
    batch_limit: str  # what set max_batch, e.g. "the bundle's largest"

    def lanes(self, batch: int, size: Size | None = None) -> Lanes:
        """Lanes for `batch` images of a height and width, those of the manifest's shape where none are given.

        Raises EngineError for a batch or a size that the engine does not take.
        """

    def on(self, graph: StepGraph) -> Engine:
        """Another step graph of the bundle, in the same way on the same device; to be closed by itself."""

    def close(self) -> None: ...


def check_batch(batch: int, engine: Engine) -> None:
    """Raise EngineError unless the engine has lanes for `batch` samples."""
    if not 1 <= batch <= engine.max_batch:
        raise EngineError(f"a batch of {batch} is outside 1 … {engine.max_batch}, {engine.batch_limit}")


def check_threads(threads: int | None) -> None:
    """Raise EngineError for more threads than cores, which would only wait for each other; None is all cores."""
    cores = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= cores:
        raise EngineError(f"threads = {threads} is outside 1 … {cores}, this machine's cores: leave it out for all")


def image_shape(bundle: Bundle, size: Size | None) -> tuple[int, int, int]:
    """C, H, W of a bundle's images of a size; None: its own.

    Raises EngineError for one that the bundle's step graphs do not take.
    """
    channels, *own = bundle.manifest.shape
    sizes = bundle.manifest.sizes
    try:
        size = tuple(own if size is None else size)
    except TypeError:
        raise EngineError(f"size = {size!r} is not (height, width), two whole numbers of pixels") from None
    if len(size) != 2 or not all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in size):
        raise EngineError(f"size = {size} is not (height, width), two whole numbers of pixels")
    height, width = map(int, size)
    if [height, width] == own:
        return channels, height, width
    what = f"a size of {height} × {width}"
    if sizes is None:
        raise EngineError(
            f"{what} is not {own[0]} × {own[1]}, the one that {bundle.path.name} has: export it with sizes for others"
        )
    if not all(sizes.multiple <= n <= sizes.largest and n % sizes.multiple == 0 for n in (height, width)):
        raise EngineError(
            f"{what} is none of {bundle.path.name}: height and width are multiples of {sizes.multiple} up to "
            f"{sizes.largest}"
        )
    return channels, height, width


def check_lane(index: int, batch: int) -> None:
    """Raise EngineError unless lane `index` is one of `batch`."""
    if not 0 <= index < batch:
        raise EngineError(f"lane {index} is outside 0 … {batch - 1}")


def check_sample(sample: Sample, shape: tuple[int, ...], graph: StepGraph) -> None:
    """Raise EngineError unless a sample's images, where it has any, are of `shape`, and the graph takes them."""
    for name in ("init", "known", "mask"):
        image = getattr(sample, name)
        if image is not None and image.shape != shape:
            raise EngineError(f"{name} has shape {list(image.shape)}, the network wants {list(shape)}")
    if (sample.known is None) != (sample.mask is None):
        raise EngineError("known and mask go together: give both, or neither")
    if sample.mask is not None and "mask" not in graph.features:
        raise EngineError(f"{graph.file} takes no mask: open the engine with features=['mask']")


def check_rows(rows: Rows, batch: int, columns: int) -> None:
    """Raise EngineError unless rows are float32 [steps, batch, columns]."""
    if rows.ndim != 3 or rows.shape[1:] != (batch, columns) or rows.dtype != np.float32:
        want = ["steps", batch, columns]
        raise EngineError(f"rows must be float32 {want}, not {rows.dtype} {list(rows.shape)}")


def not_finite(lane: int, sample: Sample, step: int, t: float) -> str:
    """What NotFiniteError says of a lane whose state is NaN or infinite since its step number `step`, from 1."""
    return (
        f"lane {lane} (seed {sample.seed}, index {sample.index}) is not finite since its step {step} (t = {t:g}): "
        "the network gave NaN or infinity there, or was given it"
    )
