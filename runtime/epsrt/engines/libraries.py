"""Import of the libraries beneath engines: any failure is an EngineError, and none of them tells its maker of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from epsrt.errors import EngineError, one_line
from epsrt.raised import handlers_own


def errors_of(bindings: ModuleType) -> tuple[type[Exception], ...]:
    """What a library's bindings raise: classes of their own, and those of Python that C++ exceptions become."""
    own = (v for v in vars(bindings).values() if isinstance(v, type) and issubclass(v, Exception))
    return (*own, RuntimeError, ValueError, IndexError, OverflowError, MemoryError)


@contextmanager
def importing(module: str, what: str, install: str) -> Iterator[None]:
    """The context of an import. `what` needs the module, and `install` is what installs it, for the sentence.

    Raises EngineError where the import fails in whatever way, so that another engine can be taken.
    """
    try:
        with _silent():
            yield
    except ImportError as error:
        if (own := handlers_own(error)) is not None:  # which a module that initialises itself makes an ImportError of
            raise own from None
        raise EngineError(f"{what} needs its library ({one_line(error)}): {install}") from error
    except Exception as error:
        if (own := handlers_own(error)) is not None:
            raise own from None
        raise EngineError(
            f"the library of {what} fails while it is imported ({type(error).__name__}: {one_line(error)}): mend what "
            f'python -c "import {module}" shows, or take another engine'
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Keep onnxruntime and OpenVINO from looking up hosts, writing into the home directory and starting threads.

    What somebody imported before, or said by onnxruntime's own variable, stays as he wanted it.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime reads it once, as it is imported
    if "openvino_telemetry" in sys.modules:
        yield
        return
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # OpenVINO goes on without it
    try:
        yield
    finally:
        sys.modules.pop("openvino_telemetry", None)
