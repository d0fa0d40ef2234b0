"""Engines "tensorrt" and "tensorrt-rtx": a step graph on the GPU, by engine files for exact batches."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from epsrt.bundle import Bundle
from epsrt.engine import Closing, Engine, check_batch
from epsrt.engines import nvidia
from epsrt.engines.cache.brought import Brought
from epsrt.engines.cache.entry import Entry
from epsrt.engines.cache.key import Options, batches
from epsrt.engines.dialects import DIALECTS, fault, own_dialect, say_plain
from epsrt.engines.gpu import cuda
from epsrt.engines.gpu.engine_files import Choice, EngineFiles, above, holding, profiles_of
from epsrt.engines.gpu.lanes import CHUNK, DeviceLanes
from epsrt.engines.gpu.parts import DeviceParts
from epsrt.engines.gpu.trt_library import library
from epsrt.engines.gpu.trt_loaded import Context
from epsrt.engines.gpu.trt_loaded_files import LoadedFiles, identity
from epsrt.engines.gpu.trt_part import PartFiles
from epsrt.engines.parts import Call, OpenPart, OpenParts
from epsrt.engines.proof import Kept, Proof
from epsrt.errors import EngineError, OutOfMemoryError
from epsrt.manifest import StepGraph
from epsrt.part import Part
from epsrt.types import OnProgress, Say, Shape, Size

log = logging.getLogger("epsrt")


class TensorRt(Closing):
    """See epsrt.engine.Engine.

    files        the engine files of the step graph in a dialect; each is loaded when lanes first need it
    plain        those of the plain graph, which take their place where the dialect is not available: the library cannot
                 build it, or an engine file misses a rung of epsrt.verify, which runs before its first use and is kept.
                 None: `files` are of the plain graph, and nothing is proven
    others       others(graph) opens another step graph of the bundle as this one was opened
    may_build    build an engine file for exactly the batch that is asked for, where none holds it; `say` gets the
                 reason, and `on_progress` is told how far it is

    Raises EngineError where the library does not start, where others can write the cache, and where there is no engine
    file and none may be built.
    """

    device = "cuda"
    most_kept = None

    def __init__(
        self,
        files: EngineFiles[StepGraph],
        plain: EngineFiles[StepGraph] | None,
        others: Callable[[StepGraph], Engine],
        may_build: bool,
        say: Say,
        on_progress: OnProgress | None,
    ):
        self.name, self.bundle, self.graph = files.library.engine, files.bundle, files.graph
        self.columns, self.chunk = self.graph.columns, CHUNK
        self.precision: str = self.graph.precision
        self.dialect = "cpu" if plain is None else DIALECTS[self.name]
        self._files, self._plain, self._others = files, plain, others
        self._may_build, self._say, self._on_progress = may_build, say, on_progress
        found = files.found() or (plain.found() if plain else [])
        if not may_build and not found:
            raise files.missing()
        self._limit(found)
        self._device = cuda.device()
        self._device.use()
        self._loaded, self._building = LoadedFiles(files.library), threading.RLock()
        self.brought, self._parts = Brought(self.bundle, files.trusted), OpenParts(self.bundle, self.graph.precision)
        self._proven: set[tuple[Path, str]] = set()  # engine files

    def lanes(self, batch: int, size: Size | None = None) -> DeviceLanes:
        """See epsrt.engine.Engine. The first lanes of a batch build its engine file, where none holds it and they may.

        Without may_build, below a profile's least batch, the lanes beyond it idle. Raises EngineError where there is no
        engine file for the batch, or it cannot be loaded or built, and OutOfMemoryError.
        """
        check_batch(batch, self)
        shape = self.bundle.image_shape(size)
        self._device.use()
        return self.lanes_on(self._chosen(batch), batch, shape)

    def lanes_on(self, choice: Choice, batch: int, shape: Shape) -> DeviceLanes:
        """Lanes on an engine file that was chosen for them."""
        loaded = self._loaded.get(self._files, choice.entry)
        make = lambda buffers, stream: Context(loaded, choice.profile, buffers, stream)  # noqa: E731
        made = DeviceLanes(self._device, self.bundle, self.graph, shape, batch, choice.width, make, self.chunk)
        loaded.keep_compiled()
        return made

    def part(self, name: str) -> OpenPart:
        """See epsrt.engine.Engine. The first run at a batch builds its engine file, where none holds it and it may."""
        return self._parts.get(name, self._open_part)

    def on(self, graph: StepGraph) -> Engine:
        """See epsrt.engine.Engine."""
        return self._others(graph)

    def kept(self, batch: int, size: Size | None = None) -> Kept:
        """The engine file that lanes of a batch run, and its proof where it is in the engine's own dialect."""
        self.lanes(batch, size).close()
        entry = self._chosen(batch).entry
        return Kept(entry, () if self._plain is None else (OneFile(self, entry).proof(),))

    def information(self, entry: Entry) -> str:
        """What the library says of the layers of an engine file, as JSON text."""
        return self._loaded.get(self._files, entry).information()

    def close(self) -> None:
        """Release the parts and the engine files. Lanes keep theirs until they are closed."""
        self._parts.close()
        self._loaded.clear()

    def _limit(self, found: list[Entry]) -> None:
        """Set max_batch, by the engine files that there are where none may be built."""
        if self._may_build:
            self.max_batch, self.batch_limit = self.bundle.manifest.max_batch, "the bundle's largest"
            return
        profiles = sorted({profile for entry in found for profile in profiles_of(entry)})
        self.max_batch = max(most for _, _, most in profiles)
        limit = f"the largest of its engine files, which are for {batches(tuple(profiles))}"
        self.batch_limit = f'{limit} (for another, run "{self._files.command("N")}")'

    def _chosen(self, batch: int) -> Choice:
        plain = self._plain  # first: what is chosen below is of its dialect, or of the plain graph after it
        choice = self._held(batch)
        if choice is not None and (plain is None or identity(choice.entry) in self._proven):
            return choice
        with self._building:  # another thread may have built or proven it meanwhile
            if self._plain is not None:
                choice, reason = self._proven_choice(batch)
                if choice is not None:
                    return choice
                self._speak_plainly(reason)
            choice = self._held(batch)
            if choice is None and not self._may_build:
                raise self._files.missing(batch)
            return choice or self._built(batch)

    def _held(self, batch: int) -> Choice | None:
        """An engine file that is there for a batch; without may_build also one whose least batch is larger."""
        return holding(self._there(), batch) or (None if self._may_build else above(self._there(), batch))

    def _proven_choice(self, batch: int) -> tuple[Choice | None, str]:
        """An engine file in the dialect that is proven here, or why there is none."""
        choice = self._held(batch)
        if choice is None and not self._may_build:
            return None, f"no engine file in it holds a batch of {batch}"
        try:
            choice = choice or self._built(batch)
        except OutOfMemoryError:
            raise
        except EngineError as error:
            return None, f"it cannot be built: {error}"
        if identity(choice.entry) not in self._proven:
            alone = OneFile(self, choice.entry)
            if reason := fault(alone.proof(), alone, self._on_progress):
                return None, reason
            self._proven.add(identity(choice.entry))
        return choice, ""

    def _speak_plainly(self, reason: str) -> None:
        """Take the plain graph's engine files from now on, where it has any or they may be built."""
        assert self._plain is not None
        found = self._plain.found()
        if not self._may_build and not found:
            fault = f"{self.name} has no engine file of {self.bundle.path.name} that it may run: {reason}"
            raise EngineError(f'{fault}; run "{self._plain.command()}"')
        say_plain(self.name, self._plain.graph, self.dialect, reason)
        self._files, self._plain = self._plain, None
        self.graph, self.dialect = self._files.graph, "cpu"
        self._limit(found)

    def _built(self, batch: int) -> Choice:
        return Choice(self._files.make(batch, self._say, self._on_progress), 0, batch)

    def _there(self) -> list[Entry]:
        """All engine files, those that are loaded first, which may be gone from the cache."""
        files = self._files
        loaded = self._loaded.entries()
        return [e for e in loaded if e.record and e.record.key.graph == files.graph.file] + files.found()

    def _open_part(self, name: str, part: Part) -> Call:
        of = self._files
        files = EngineFiles(of.library, self.bundle, part, of.gpu, of.trusted, part=name)
        build = partial(files.make, say=self._say, on_progress=self._on_progress) if self._may_build else None
        opened = PartFiles(files, build, partial(self._loaded.get, files))
        return DeviceParts(self._device, self.bundle, part, opened.open, opened.kept)


class OneFile(Closing):
    """See epsrt.engine.Engine: a TensorRt on one of its engine files alone, to be proven. It builds nothing."""

    batch_limit = "the largest of the engine file's profiles"
    device = "cuda"

    def __init__(self, engine: TensorRt, entry: Entry):
        self.name, self.bundle, self.graph, self.dialect = engine.name, engine.bundle, engine.graph, engine.dialect
        self.precision, self.columns = engine.precision, engine.columns
        self.max_batch = max(most for _, _, most in profiles_of(entry))
        self._engine, self._entry = engine, entry

    def lanes(self, batch: int, size: Size | None = None) -> DeviceLanes:
        """See epsrt.engine.Engine; the lanes beyond a batch idle where the engine file has none so small."""
        check_batch(batch, self)
        choice = holding([self._entry], batch) or above([self._entry], batch)
        assert choice is not None
        return self._engine.lanes_on(choice, batch, self.bundle.image_shape(size))

    def on(self, graph: StepGraph) -> Engine:
        """See epsrt.engine.Engine."""
        return self._engine.on(graph)

    def part(self, name: str) -> OpenPart:
        """See epsrt.engine.Engine."""
        return self._engine.part(name)

    def proof(self) -> Proof:
        """Of what the engine file is worth on this GPU."""
        assert self._entry.record is not None
        gpu, key = nvidia.require_gpu(), self._entry.record.key
        options: Options = {**key.options, "proof": self._entry.record.sha256}  # another build has other kernels
        key = msgspec.structs.replace(key, gpu=gpu.name, capabilities=(gpu.arch,), options=options)
        return Proof(key, f"{self.name} in dialect {self.dialect}", self._engine.brought)

    def close(self) -> None:
        """Nothing to release: the engine keeps its files."""


def open_tensorrt(
    engine: str,
    bundle: Bundle,
    graph: StepGraph,
    *,
    trust_engines: bool = False,
    may_build: bool = True,
    say: Say = log.warning,
    on_progress: OnProgress | None = None,
) -> TensorRt:
    """Engine "tensorrt" or "tensorrt-rtx" of a graph, on the engine files that fit this machine.

    Nothing is built before lanes of a batch are asked for that no engine file holds; `say` then gets the reason. With
    may_build=False nothing is built at all. An engine file in the engine's dialect is proven before its first use: see
    TensorRt. Engine files that came with the bundle are loaded only with
    `trust_engines`; without it EngineError says why, unless the cache has one.
    """

    def others(graph: StepGraph) -> Engine:
        return open_tensorrt(
            engine, bundle, graph, trust_engines=trust_engines, may_build=may_build, say=say, on_progress=on_progress
        )

    gpu = nvidia.require_gpu()  # first: without a driver the libraries crash or return nothing
    lib, dialect = library(engine), own_dialect(engine, bundle, graph)
    files = EngineFiles(lib, bundle, graph.in_dialect(dialect), gpu, trust_engines)
    plain = None
    if dialect != "cpu":
        plain = EngineFiles(lib, bundle, graph.in_dialect("cpu"), gpu, trust_engines, plain=True)
    return TensorRt(files, plain, others, may_build, say, on_progress)
