"""What an engine brings to the lanes of a GPU: something that gives one step to a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from epsrt.engines.gpu import cuda
from epsrt.engines.gpu.buffers import Buffers


class Runner(Protocol):
    """An engine's execution context, bound to the buffers of one lanes object."""

    capturable: bool  # whether its work may be recorded in a CudaGraph of ours

    def enqueue(self, now: int, rows: int) -> None:
        """Give one step to the stream. It reads x[now], m[now] and the rows at an address; it writes x[1 − now],
        m[1 − now] and x0.

        Raises EngineError when the engine refuses.
        """

    def settle(self) -> None:
        """Do what the calling thread's first run does and no capture allows. It may write x[1], m[1] and x0."""

    def without_capture(self) -> str:
        """Make ready for steps that the lanes cannot capture; how they run from now on, for a sentence.

        Raises EngineError where it cannot go on.
        """

    def close(self) -> None: ...


MakeRunner = Callable[[Buffers, cuda.Stream], Runner]
