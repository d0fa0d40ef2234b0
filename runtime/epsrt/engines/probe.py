"""Which engines can run here: what each needs, and whether this machine has it.

Packages are asked for by their metadata; nothing is imported.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from epsrt.engines.nvidia import Driver, Gpu, arch, dots, driver, require_gpu
from epsrt.errors import InputError

__all__ = [
    "ENGINES", "Driver", "EngineInfo", "Gpu", "Need", "State", "available", "both_onnxruntimes", "driver", "info_of",
    "installed", "require_gpu", "state",
]  # fmt: skip

OLDEST = (7, 5)  # compute capability, of CUDA 13 and of TensorRT
X86 = ("x86_64", "AMD64")  # elsewhere nobody has measured that OpenVINO is the faster
RTX = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))


@dataclass(frozen=True)
class Need:
    """A library: one of `distributions`, at least `version`, with `module`; or else the shared library `file`."""

    distributions: tuple[str, ...]
    version: tuple[int, ...] = ()
    module: str = ""
    file: tuple[str, int] | None = None  # stem and major version
    by_module: bool = False  # the module alone will do: in a frozen program, and from those who package it otherwise
    requirement: str = ""  # what to install for it beside the engine's extra


@dataclass(frozen=True)
class EngineInfo:
    """An engine: its own library, what it needs beside, and epsrt's extra that installs them."""

    name: str
    device: Literal["cpu", "cuda"]
    extra: str
    library: Need
    also_needs: tuple[Need, ...] = ()
    capabilities: tuple[tuple[int, int], ...] = ()  # it runs on these alone; (): on OLDEST and all newer
    instead: str = ""  # the engine for GPUs that are newer than OLDEST and not among them
    builds_ahead: bool = False  # for GPUs that need not be there
    precisions: tuple[str, ...] = ("fp16", "fp32")  # that it can run in; by default the first that the bundle has


BINDINGS = Need(("cuda-bindings",), (13,), "cuda.bindings")
NVRTC = Need(("nvidia-cuda-nvrtc",), (13,), file=("nvrtc", 13))
FILELOCK = Need(("filelock",), (3, 12), "filelock")
TENSORRT = Need(("tensorrt", "tensorrt-cu13"), (10, 16), "tensorrt")
TENSORRT_10 = Need(("TensorRT 10",), file=("nvinfer", 10), requirement='"tensorrt>=10.16,<11"')
TENSORRT_RTX = Need(("tensorrt-rtx-cu13", "tensorrt-rtx"), (1, 5), "tensorrt_rtx")
ONNXRUNTIME_GPU = Need(("onnxruntime-gpu",), (1, 27), "onnxruntime")  # older ones are built for CUDA 12
OPENVINO = Need(("openvino",), (2025, 4), "openvino")
ONNXRUNTIME = Need(
    ("onnxruntime", "onnxruntime-gpu"), (1, 24), "onnxruntime", by_module=True
)  # takes weights in memory
ENGINES = (  # fastest first
    EngineInfo("tensorrt", "cuda", "tensorrt", TENSORRT, (BINDINGS, NVRTC, FILELOCK)),
    EngineInfo(
        "tensorrt-rtx",
        "cuda",
        "tensorrt-rtx",
        TENSORRT_RTX,
        (BINDINGS, NVRTC, FILELOCK),
        RTX,
        instead="tensorrt",
        builds_ahead=True,
    ),
    EngineInfo("onnxruntime-tensorrt", "cuda", "gpu", ONNXRUNTIME_GPU, (BINDINGS, NVRTC, TENSORRT_10)),
    EngineInfo("onnxruntime-cuda", "cuda", "gpu", ONNXRUNTIME_GPU, (BINDINGS, NVRTC)),
    EngineInfo("openvino", "cpu", "openvino", OPENVINO, (FILELOCK,), precisions=("bf16", "fp32", "int8")),
    EngineInfo("onnxruntime", "cpu", "cpu", ONNXRUNTIME, precisions=("fp32", "fp16", "int8")),
)


@dataclass(frozen=True)
class State:
    """Whether an engine runs here.

    library   its own, with the version; "" without
    reason    why it does not run: the GPU's fault first, then the libraries'
    command   what mends that, a command or a few words; "" where nothing does on this machine
    builds    whether it can build here for other GPUs
    """

    available: bool
    library: str
    reason: str
    command: str
    builds: bool = False


def info_of(name: str) -> EngineInfo:
    """An engine by its name. Raises InputError for an unknown one."""
    info = next((info for info in ENGINES if info.name == name), None)
    if info is None:
        raise InputError(f"engine {name!r} is unknown: use one of {', '.join(info.name for info in ENGINES)}")
    return info


def state(name: str) -> State:
    """What an engine has and lacks here. Raises InputError for an unknown name."""
    info = info_of(name)
    (gpu_fault, gpu_command), (fault, command) = _gpu_fault(info), _library_fault(info)
    if gpu_fault and gpu_command and command:
        command = f"{gpu_command}, then {command}"
    elif gpu_fault:  # one that nothing mends makes all installing vain
        command = gpu_command
    reason = "; ".join(filter(None, (gpu_fault, fault)))
    library, wrong = _check(info.library)
    return State(not reason, library, reason, command, info.builds_ahead and not wrong)


def available() -> Iterator[str]:
    """The engines that can run here, fastest first. An engine without its libraries does not ask the driver."""
    order = ENGINES if platform.machine() in X86 else sorted(ENGINES, key=lambda info: info.name == "openvino")
    for info in order:
        if any(_check(need)[1] for need in (info.library, *info.also_needs)) or _both(info) or _gpu_fault(info)[0]:
            continue
        yield info.name


def installed(distribution: str) -> str:
    """The version of an installed distribution; "" without. Asked once while Python's path stays as it is."""
    return _asked(metadata.version, distribution, *sys.path)


@cache  # not only for speed: importlib.metadata drops what a signal's handler raises while it looks about
def _asked(version_of: Callable[[str], str], distribution: str, *path: str) -> str:
    try:
        return version_of(distribution) or ""
    except metadata.PackageNotFoundError:
        return ""


def both_onnxruntimes() -> str:
    """A sentence for those who installed both packages, one over the other's files; "" for all others.

    In folders apart both are whole, and Python imports the one that comes first on its path.
    """
    names = ("onnxruntime", "onnxruntime-gpu")
    found = [f"{name} {version}" for name in names if (version := installed(name))]
    if len(found) < 2 or len({_file_of(name, "onnxruntime/__init__.py") for name in names}) == 2:
        return ""
    return (
        f"{' and '.join(found)} are both installed and overwrite each other: "
        'pip uninstall -y onnxruntime onnxruntime-gpu, then pip install "epsrt[cpu]" or "epsrt[gpu]"'
    )


def _file_of(distribution: str, path: str) -> Path:
    """Where a file of an installed distribution lies, or would lie."""
    return Path(str(metadata.distribution(distribution).locate_file(path))).resolve()


def _both(info: EngineInfo) -> str:
    return both_onnxruntimes() if info.library.module == "onnxruntime" else ""


def _gpu_fault(info: EngineInfo) -> tuple[str, str]:
    """What keeps the engine from GPU 0, and what mends it."""
    if info.device == "cpu":
        return "", ""
    if driver().problem:
        return driver().fault, driver().command
    gpu = driver().gpus[0]
    if gpu.capability in info.capabilities or (not info.capabilities and gpu.capability >= OLDEST):
        return "", ""
    runs_on = ", ".join(map(arch, info.capabilities)) or f"{arch(OLDEST)} and newer"
    fault = f"GPU 0, {gpu.name}, is {gpu.arch} and {info.name} runs on {runs_on}"
    if info.instead and gpu.capability >= OLDEST:
        fault += f" alone: take engine {info.instead}"
    return fault, ""


def _library_fault(info: EngineInfo) -> tuple[str, str]:
    """What is wrong with the libraries that the engine needs, and the command against it."""
    install = f'pip install "epsrt[{info.extra}]"'
    if both := _both(info):
        return both.partition(":")[0], f"pip uninstall -y onnxruntime onnxruntime-gpu && {install}"
    checks = [(need, *_check(need)) for need in (info.library, *info.also_needs)]
    missing = [need for need, library, _ in checks if not library]
    faults = [fault for _, library, fault in checks if library and fault]
    if missing:
        *others, last = (need.distributions[0] for need in missing)
        faults.insert(0, f"{', '.join(others)} and {last} are not installed" if others else f"{last} is not installed")
    if not faults:
        return "", ""
    uninstall = [library.split()[0] for need, library, _ in checks if library and not _has_module(need.module)]
    if info.library is ONNXRUNTIME_GPU and installed("onnxruntime"):
        uninstall.append("onnxruntime")
    if uninstall:
        install = f"pip uninstall -y {' '.join(uninstall)} && {install}"
    return "; ".join(faults), " ".join([install, *(need.requirement for need in missing if need.requirement)])


def _check(need: Need) -> tuple[str, str]:
    """The library that was found, e.g. "onnxruntime 1.31.1" or without its version, and what is wrong with it or ""."""
    for name in need.distributions:
        if not (version := installed(name)):
            continue
        if need.version > tuple(int(n) for n in re.findall(r"\d+", version)[: len(need.version)]):
            return f"{name} {version}", f"{name} {version} is older than {dots(need.version)}"
        if not _has_module(need.module):  # so it is when onnxruntime-gpu lay over onnxruntime, and one is uninstalled
            return f"{name} {version}", f"{name} {version} has lost its files"
        return f"{name} {version}", ""
    if (need.by_module and _has_module(need.module)) or (need.file and _has_file(*need.file)):
        return need.distributions[0], ""
    return "", "missing"


def _has_module(name: str) -> bool:
    """Whether a module is imported already or its file is there; true for "". It imports a dotted name's parents."""
    try:
        return not name or ((found := find_spec(name)) is not None and found.origin is not None)
    except ImportError:
        return False
    except ValueError:  # imported, and made by hand
        return True


def _has_file(stem: str, major: int) -> bool:
    """Whether lib{stem}.so.{major} is in TensorRT's package or where the loader or cuda-bindings look."""
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    for root in filter(None, map(os.environ.get, ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"))):
        folders += [f"{root}/lib64", f"{root}/lib"]
    if _has_module("tensorrt_libs") and (package := find_spec("tensorrt_libs")):
        folders += package.submodule_search_locations or []
    names = (f"lib{stem}.so.{major}", f"{stem}_{major}.dll")
    if any(Path(folder, name).is_file() for folder in folders if folder for name in names):
        return True
    from ctypes.util import find_library  # runs ldconfig

    return (find_library(stem) or "").endswith(f".so.{major}")
