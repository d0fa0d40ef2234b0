"""Engines "tensorrt" and "tensorrt-rtx": a step graph on the GPU, by engine files for exact batches."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from epsrt.bundle import Bundle
from epsrt.engine import Closing, Engine, check_batch
from epsrt.engines import nvidia
from epsrt.engines.cache.entry import Entry
from epsrt.engines.cache.key import batches, profile_words
from epsrt.engines.gpu import cuda
from epsrt.engines.gpu.engine_files import Choice, EngineFiles, above, holding, profiles_of
from epsrt.engines.gpu.lanes import CHUNK, DeviceLanes
from epsrt.engines.gpu.trt_library import library
from epsrt.engines.gpu.trt_loaded import Compiled, Context, LoadedEngineFile
from epsrt.errors import OutOfMemoryError
from epsrt.manifest import StepGraph
from epsrt.types import OnProgress, Say, Size

log = logging.getLogger("epsrt")

KEPT_FILES = 3  # engine files that stay loaded when no lanes use them: each has the weights in the GPU's memory


class TensorRt(Closing):
    """See epsrt.engine.Engine.

    files        the step graph's engine files; each is loaded when lanes first need it
    others       others(graph) opens another step graph of the bundle as this one was opened
    may_build    build an engine file for exactly the batch that is asked for, where none holds it; `say` gets the
                 reason, and `on_progress` is told how far it is

    Raises EngineError where the library does not start, where others can write the cache, and where there is no engine
    file and none may be built.
    """

    device = "cuda"

    def __init__(
        self,
        files: EngineFiles,
        others: Callable[[StepGraph], Engine],
        may_build: bool,
        say: Say,
        on_progress: OnProgress | None,
    ):
        self.name, self.bundle, self.graph = files.library.engine, files.bundle, files.graph
        self.columns, self.chunk = self.graph.columns, CHUNK
        self.precision: str = self.graph.precision
        self._files, self._others = files, others
        self._may_build, self._say, self._on_progress = may_build, say, on_progress
        found = files.found()
        if may_build:
            self.max_batch, self.batch_limit = self.bundle.manifest.max_batch, "the bundle's largest"
        elif found:
            profiles = sorted({profile for entry in found for profile in profiles_of(entry)})
            self.max_batch = max(most for _, _, most in profiles)
            limit = f"the largest of its engine files, which are for {batches(tuple(profiles))}"
            self.batch_limit = f'{limit} (for another, run "{files.command("N")}")'
        else:
            raise files.missing()
        self._device = cuda.device()
        self._device.use()
        self._runtime = files.library.runtime()
        self._loaded: OrderedDict[tuple[Path, str], tuple[Entry, LoadedEngineFile]] = OrderedDict()
        self._loading, self._building = threading.Lock(), threading.Lock()

    def lanes(self, batch: int, size: Size | None = None) -> DeviceLanes:
        """See epsrt.engine.Engine. The first lanes of a batch build its engine file, where none holds it and they may.

        Without may_build, below a profile's least batch, the lanes beyond it idle. Raises EngineError where there is no
        engine file for the batch, or it cannot be loaded or built, and OutOfMemoryError.
        """
        check_batch(batch, self)
        shape = self.bundle.image_shape(size)
        self._device.use()
        choice = self._chosen(batch)
        loaded = self._load(choice.entry)
        make = lambda buffers, stream: Context(loaded, choice.profile, buffers, stream)  # noqa: E731
        made = DeviceLanes(self._device, self.bundle, self.graph, shape, batch, choice.width, make, self.chunk)
        loaded.keep_compiled()
        return made

    def on(self, graph: StepGraph) -> Engine:
        """See epsrt.engine.Engine."""
        return self._others(graph)

    def information(self, entry: Entry) -> str:
        """What the library says of the layers of an engine file, as JSON text."""
        return self._load(entry).information()

    def close(self) -> None:
        """Release the engine files. Lanes keep theirs until they are closed."""
        with self._loading:
            self._loaded.clear()

    def _chosen(self, batch: int) -> Choice:
        if choice := holding(self._there(), batch):
            return choice
        if self._may_build:
            with self._building:  # another thread may have built it meanwhile
                return holding(self._there(), batch) or self._built(batch)
        if choice := above(self._there(), batch):
            return choice
        raise self._files.missing(batch)

    def _built(self, batch: int) -> Choice:
        return Choice(self._files.make(batch, self._say, self._on_progress), 0, batch)

    def _there(self) -> list[Entry]:
        """All engine files, those that are loaded first, which may be gone from the cache."""
        with self._loading:
            loaded = [entry for entry, _ in reversed(self._loaded.values())]
        return loaded + self._files.found()

    def _load(self, entry: Entry) -> LoadedEngineFile:
        """An engine file in memory, where it stays while it is one of those used last."""
        assert entry.record is not None  # or it had no profiles
        key = entry.path, entry.record.sha256
        with self._loading:
            if key not in self._loaded:
                self._loaded[key] = entry, self._read(entry)
            self._loaded.move_to_end(key)
            while len(self._loaded) > KEPT_FILES:
                self._loaded.popitem(last=False)
            return self._loaded[key][1]

    def _read(self, entry: Entry) -> LoadedEngineFile:
        try:
            return self._deserialized(entry)
        except OutOfMemoryError:
            if not self._loaded:
                raise
        self._loaded.clear()  # whatever no lanes use makes room
        return self._deserialized(entry)

    def _deserialized(self, entry: Entry) -> LoadedEngineFile:
        files, gpu = self._files, self._files.gpu
        assert entry.record is not None
        options, compiled = entry.record.key.options, None
        if files.library.compiles:
            name = f"{entry.path.stem}-{gpu.name}-{gpu.arch}.compiled".replace(" ", "-")
            compiled = Compiled(files.cache.blob(name) or b"", lambda data: files.cache.keep_blob(name, data))
        return LoadedEngineFile(
            files.library,
            self._runtime,
            self.bundle,
            self.graph,
            files.cache.load(entry),
            stripped=options.get("stripped") is True,
            version_compatible=options.get("version_compatible") is True,
            compiled=compiled,
            command=f"{files.command(*map(profile_words, profiles_of(entry)))} --again",
        )


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
    may_build=False nothing is built at all. Engine files that came with the bundle are loaded only with
    `trust_engines`; without it EngineError says why, unless the cache has one.
    """

    def others(graph: StepGraph) -> Engine:
        return open_tensorrt(
            engine, bundle, graph, trust_engines=trust_engines, may_build=may_build, say=say, on_progress=on_progress
        )

    gpu = nvidia.require_gpu()  # first: without a driver the libraries crash or return nothing
    files = EngineFiles(library(engine), bundle, graph, gpu, trust_engines)
    return TensorRt(files, others, may_build, say, on_progress)
