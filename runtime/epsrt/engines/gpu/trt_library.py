"""TensorRT 10.16, TensorRT 11 and TensorRT-RTX: one Python API under three names, and the few things that differ."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import Any

from epsrt.errors import EngineError

log = logging.getLogger("epsrt")


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

    def __str__(self) -> str:
        return f"{self.engine} {self.version}"


# engine -> module, measures, targets, compiles
_DIFFERENCES = {"tensorrt": ("tensorrt", True, False, False), "tensorrt-rtx": ("tensorrt_rtx", False, True, True)}


def library(engine: str) -> Library:
    """Import what `engine` needs. Raises EngineError where it is not installed."""
    name, *differences = _DIFFERENCES[engine]
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: the shared libraries beneath it
        raise EngineError(f'engine {engine} needs its library ({error}): pip install "epsrt[{engine}]"') from None
    return Library(engine, module, *differences)


def make_logger(trt: Any) -> Any:
    """A logger of the library's that passes messages to logging and keeps the errors, for sentences: see `told`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.errors_only = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

        def log(self, severity: Any, message: str) -> None:
            if severity in self.errors_only:
                self.errors.append(" ".join(message.split()))
            else:
                log.debug("%s", message)

        def told(self) -> str:
            """What went wrong, in the library's words, and forget it."""
            words = "; ".join(self.errors[-3:]) or "it gave no reason"
            self.errors.clear()
            return words

    return Logger()
