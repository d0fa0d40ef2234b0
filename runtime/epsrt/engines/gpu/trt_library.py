"""TensorRT 10.16, TensorRT 11 and TensorRT-RTX: one Python API under three names, and the few things that differ."""

from __future__ import annotations

import functools
import importlib
import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from epsrt.engines.libraries import importing
from epsrt.errors import EngineError

log = logging.getLogger("epsrt")

MEMORY = re.compile(
    "out ?of ?memory|could not be allocated|cannot allocate", re.I
)  # how TensorRT says that it lacks some


@dataclass(frozen=True)
class Library:
    """One of them: `module` is its API. The flags are all that the rest of epsrt asks about the difference."""

    engine: str  # "tensorrt" or "tensorrt-rtx"
    module: Any
    measures: bool  # times kernels as it builds: that takes the GPU itself, and a timing cache
    targets: bool  # builds for compute capabilities that are named, without a GPU: one file serves all GPUs of one
    compiles: bool  # compiles kernels when a context first runs, and can keep them

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def logger(self) -> Any:
        """The library's only logger in this process, as it keeps the first; see `_logger`."""
        return _logger(self.module)

    def builder(self) -> Any:
        """A new Builder. Raises EngineError where the library does not start."""
        return self._started(self.module.Builder)

    def runtime(self) -> Any:
        """A new Runtime. Raises EngineError where the library does not start."""
        return self._started(self.module.Runtime)

    def capability(self, target: str) -> Any:
        """The library's own name of a compute capability, "sm_89" or "sm89", that it builds for and runs on.

        Raises EngineError where it has none.
        """
        known = self.module.ComputeCapability
        name = target.upper().replace("_", "")
        names = [n for n in dir(known) if n.startswith("SM")]
        if name not in names:
            have = ", ".join(n.lower() for n in sorted(names, key=lambda n: int(n[2:])))
            raise EngineError(
                f"{self} has no target {target}: use one of {have}, or engine tensorrt, which builds on the GPU itself"
            )
        return getattr(known, name)

    def _started(self, make: Callable[[Any], Any]) -> Any:
        with self.logger.hearing() as heard:
            try:
                return make(self.logger)
            except TypeError as error:  # what its bindings raise for a null pointer: no driver, or too old a one
                raise EngineError(f"{self} does not start ({heard or error})") from error

    def __str__(self) -> str:
        return f"{self.engine} {self.version}"


# engine -> module, measures, targets, compiles
_DIFFERENCES = {"tensorrt": ("tensorrt", True, False, False), "tensorrt-rtx": ("tensorrt_rtx", False, True, True)}


def library(engine: str) -> Library:
    """Import what `engine` needs. Raises EngineError where it is not installed."""
    name, *differences = _DIFFERENCES[engine]
    with importing(name, f"engine {engine}", f'pip install "epsrt[{engine}]"'):
        module = importlib.import_module(name)
    return Library(engine, module, *differences)


class Heard:
    """The errors that a library has told since one thread began to listen: str() is the last of them, in its words."""

    def __init__(self) -> None:
        self.thread, self.errors = threading.get_ident(), list[str]()

    def __bool__(self) -> bool:
        return bool(self.errors)

    def __str__(self) -> str:
        return "; ".join(self.errors[-3:]) or "it gave no reason"

    @property
    def lacks_memory(self) -> bool:
        """Whether the library says that memory does not suffice."""
        return MEMORY.search(str(self)) is not None


@functools.cache
def _logger(trt: Any) -> Any:
    """A logger that passes messages to logging, and the errors to whoever hears them.

    `with logger.hearing() as heard:` hears what the library tells the calling thread, and what it tells threads of its
    own: those may work for any call, so all that are under way hear them.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._hearings: list[Heard] = []
            self._lock = threading.RLock()  # Python may free one of the library's objects at any place, which may log
            self._errors = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

        @contextmanager
        def hearing(self) -> Iterator[Heard]:
            heard = Heard()
            with self._lock:
                self._hearings.append(heard)
            try:
                yield heard
            finally:
                with self._lock:
                    self._hearings.remove(heard)

        def log(self, severity: Any, message: str) -> None:
            log.debug("%s", message)
            if severity not in self._errors:
                return
            with self._lock:
                own = [heard for heard in self._hearings if heard.thread == threading.get_ident()]
                for heard in own[-1:] or self._hearings:
                    heard.errors.append(" ".join(message.split()))

    return Logger()
