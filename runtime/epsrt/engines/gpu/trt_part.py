"""A part on TensorRT: an engine file for exactly its batch, or whose profile holds it, in a context for one size."""

from __future__ import annotations

from epsrt.engines.gpu.parts import PartBuffers
from epsrt.engines.gpu.trt_loaded import LoadedEngineFile


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
