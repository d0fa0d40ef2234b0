"""A part on TensorRT: an engine file for exactly its batch, or whose profile holds it, in a context for one size."""

from __future__ import annotations

from collections.abc import Callable

from epsrt.engines.cache.entry import Entry
from epsrt.engines.gpu.engine_files import Choice, EngineFiles, holding
from epsrt.engines.gpu.parts import PartBuffers
from epsrt.engines.gpu.trt_loaded import LoadedEngineFile
from epsrt.engines.proof import Kept
from epsrt.part import Part
from epsrt.types import Arrays


class PartFiles:
    """The engine files of a part: `build` makes one for a batch, where that is allowed, and `load` loads one."""

    def __init__(
        self, files: EngineFiles[Part], build: Callable[[int], Entry] | None, load: Callable[[Entry], LoadedEngineFile]
    ):
        self._files, self._build, self._load = files, build, load

    def open(self, buffers: PartBuffers) -> PartContext:
        """What runs the part on buffers. Raises EngineError where no engine file holds their batch."""
        choice = self._chosen(next(iter(buffers.signature.inputs.values())).extents[0])
        loaded = self._load(choice.entry)
        context = PartContext(loaded, choice.profile, buffers)
        loaded.keep_compiled()
        return context

    def kept(self, given: Arrays) -> Kept:
        """The engine file that runs arrays."""
        return Kept(self._chosen(len(next(iter(given.values())))).entry, ())

    def _chosen(self, batch: int) -> Choice:
        if (choice := holding(self._files.found(), batch)) is not None:
            return choice
        if self._build is None:
            raise self._files.missing(batch)
        return Choice(self._build(batch), 0, batch)


class PartContext:
    """parts.Runner: an execution context on a part's buffers. It keeps its engine file loaded."""

    def __init__(self, loaded: LoadedEngineFile, profile: int, buffers: PartBuffers):
        self._loaded: LoadedEngineFile | None = loaded
        self._handle = buffers.stream.handle
        shapes = {name: tensor.extents for name, tensor in buffers.signature.inputs.items()}
        self._context, self._memory = loaded.context(profile, buffers.stream, shapes)
        with loaded.library.logger.hearing() as heard:
            for name, address in buffers.addresses.items():
                if not self._context.set_tensor_address(name, address):
                    self.close()
                    raise loaded.failure(f"refuses the address of {name} of {loaded.name}", heard)

    def enqueue(self) -> None:
        """See parts.Runner."""
        loaded = self._loaded
        assert loaded is not None  # it is not closed
        with loaded.library.logger.hearing() as heard:
            if not self._context.execute_async_v3(self._handle):
                raise loaded.failure(f"refuses to run a part of {loaded.name}", heard)

    def close(self) -> None:
        """Release the context and its memory."""
        self._context = self._loaded = None
        self._memory.close()
