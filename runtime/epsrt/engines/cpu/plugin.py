"""OpenVINO itself: its core, one a process, and its CPU plugin, which is loaded in a thread of its own.

The plugin gives the thread that loads it another stack for signals, and frees that stack when it is unloaded, by
whatever thread. A thread that lives on would be left without one: its next signal would end the process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

from epsrt.engines.libraries import errors_of, importing
from epsrt.errors import EngineError
from epsrt.forks import SPAWN, keep
from epsrt.raised import passed_over

with importing("openvino", "engine openvino", 'pip install "epsrt[openvino]"'):
    import openvino as ov
    from openvino import _pyopenvino as bindings
    from openvino import opset13

__all__ = ["ERRORS", "core", "has_bf16", "opset13", "ov", "processor", "unload"]

ERRORS = errors_of(bindings)
NAME = "FULL_DEVICE_NAME"

_lock = threading.Lock()
_loaded: list[bool] = []  # not empty: the plugin is


def core() -> Any:
    """OpenVINO's core, with the plugin. Raises EngineError in a fork of a process that has one."""
    process, made = _core()
    if os.getpid() != process:
        raise EngineError(f"a fork of a process that has used OpenVINO cannot use it: {SPAWN}, or take onnxruntime")
    if not _loaded:
        with _lock:
            if not _loaded:
                _aside(lambda: made.get_property("CPU", NAME))
                _loaded.append(True)
    return made


def unload() -> None:
    """Give back the plugin's threads. No engine may be open that could need it."""
    with _lock:
        if _loaded:
            with passed_over(RuntimeError):
                _core()[1].unload_plugin("CPU")
            _loaded.clear()


@cache
def _core() -> tuple[int, Any]:
    """It, and the process that it is of."""
    made = os.getpid(), ov.Core()
    keep(made)
    return made


@cache
def processor() -> str:
    return str(_aside(lambda: core().get_property("CPU", NAME))).strip()


@cache
def has_bf16() -> bool:
    """Whether the plugin computes in bf16 here, which takes AVX512-BF16 or AMX."""
    return "BF16" in _aside(lambda: core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def _aside(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()
