"""NVIDIA's driver and its GPUs. Asking takes milliseconds: it imports no GPU library and makes no context."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from epsrt.errors import EngineError
from epsrt.raised import foreign

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
CUDA = (13, 0)  # what the packages of our extras are built for
GET_DRIVER = "install NVIDIA's driver 580 or newer"  # 580 is CUDA 13.0's
FROM = f"{GET_DRIVER} (nvidia.com/drivers)"
NO_DEVICE = 100  # a CUresult, as the keys here
WAYS_OUT = {
    3: "a fork of a process that has used CUDA cannot use it, start processes with spawn",
    34: f"this {LIBRARY} is the CUDA toolkit's stub, take its folder out of LD_LIBRARY_PATH",
    802: "start NVIDIA's fabric manager: systemctl start nvidia-fabricmanager",
}
OTHERWISE = "try nvidia-smi, reboot after a driver's update, and in a container update NVIDIA's container toolkit"


def arch(capability: tuple[int, int]) -> str:
    """(9, 0) as sm_90."""
    return "sm_{}{}".format(*capability)


def dots(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@dataclass(frozen=True)
class Gpu:
    """A GPU, by the number that CUDA gives it in this process; `memory` is in bytes."""

    index: int
    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def arch(self) -> str:
        return arch(self.capability)


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver. `version` is the newest CUDA that it supports, None where there is no driver.

    `problem` is "" where GPU 0 can be used, else one sentence: `fault`, and the way out. `command` is the way out
    alone, "" where nothing that one does on this machine helps.
    """

    version: tuple[int, int] | None
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""
    fault: str = ""
    command: str = ""


@functools.cache
def driver() -> Driver:
    """What the driver says, asked once a process (driver.cache_clear() forgets). Never raises."""
    return _ask(LIBRARY)


def require_gpu() -> Gpu:
    """The GPU that is CUDA's device 0. Raises EngineError where it cannot be used."""
    if driver().problem:
        raise EngineError(driver().problem)
    return driver().gpus[0]


class _CallError(Exception):
    """(function, CUresult, its words)"""


def _ask(library: str) -> Driver:
    """What a driver library says, given by its path or by a name that the loader knows."""
    version = None
    try:
        cuda = ctypes.CDLL(library)
        major, minor = divmod(_number(cuda, "cuDriverGetVersion") // 10, 100)
        version = (major, minor)
        if version < CUDA:  # asked before cuInit, which an old driver may fail
            fault = f"NVIDIA's driver supports CUDA {dots(version)}, and {dots(CUDA)} is needed"
            return _unusable(version, fault, GET_DRIVER, FROM)
        _call(cuda, "cuInit", 0)
        gpus = tuple(_gpu(cuda, index) for index in range(_number(cuda, "cuDeviceGetCount")))
        return Driver(version, gpus) if gpus else _no_gpu(version)
    except _CallError as error:
        function, status, words = error.args
        if status == NO_DEVICE:
            return _no_gpu(version)
        fault = f"NVIDIA's driver fails: {function} returns {status} ({words})"
        return _unusable(version, fault, WAYS_OUT.get(status, OTHERWISE))
    except AttributeError as error:
        return _unusable(version, f"{LIBRARY} is not NVIDIA's driver ({error})", GET_DRIVER)
    except OSError as error:
        if foreign(error):
            raise
        # the loader's words name the file that is missing: this one, or one that it needs
        if not re.search(rf"{re.escape(library)}\b.*no such file", str(error), re.I) and sys.platform != "win32":
            return _unusable(None, f"NVIDIA's driver cannot be loaded ({error})", f"{GET_DRIVER} over it")
        way_out = f"{GET_DRIVER} (a container: start it with its GPUs)"
        return _unusable(None, f"no NVIDIA driver: {LIBRARY} was not found", way_out, FROM)


def _unusable(version: tuple[int, int] | None, fault: str, way_out: str, command: str | None = None) -> Driver:
    return Driver(version, (), f"{fault}; {way_out}", fault, way_out if command is None else command)


def _no_gpu(version: tuple[int, int] | None) -> Driver:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return _unusable(version, "this machine has no NVIDIA GPU", "use engine onnxruntime, or a machine with one", "")
    fault = f'CUDA_VISIBLE_DEVICES is "{visible}", which leaves no GPU'
    return _unusable(version, fault, "unset it, or give it numbers from nvidia-smi -L", "unset CUDA_VISIBLE_DEVICES")


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, name, memory = _number(cuda, "cuDeviceGet", index), ctypes.create_string_buffer(256), ctypes.c_size_t()
    _call(cuda, "cuDeviceGetName", name, len(name), device)
    _call(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    major, minor = (_number(cuda, "cuDeviceGetAttribute", attribute, device) for attribute in (75, 76))
    return Gpu(index, name.value.decode(errors="replace"), (major, minor), memory.value)


def _number(cuda: ctypes.CDLL, function: str, *arguments: int) -> int:
    number = ctypes.c_int()
    _call(cuda, function, ctypes.byref(number), *arguments)
    return number.value


def _call(cuda: ctypes.CDLL, function: str, *arguments: Any) -> None:
    if status := getattr(cuda, function)(*arguments):
        text = ctypes.c_char_p()
        known = cuda.cuGetErrorString(status, ctypes.byref(text)) == 0 and text.value
        raise _CallError(function, status, known.decode(errors="replace") if known else "an unknown error")
