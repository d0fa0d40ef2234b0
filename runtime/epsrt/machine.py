"""The machine that a figure was measured on, in words and numbers: what a reader needs to place it."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from epsrt.engines import nvidia
from epsrt.engines.probe import installed
from epsrt.raised import foreign
from epsrt.version import __version__

PACKAGES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-cu13", "tensorrt-rtx-cu13",
    "tensorrt-rtx", "cuda-bindings", "nvidia-cudnn-cu13",
)  # fmt: skip
# what CPU engines choose their kernels by, and which of /proc/cpuinfo's flags say so
INSTRUCTIONS = {
    "avx2": ("avx2",), "avx512": ("avx512f",), "vnni": ("avx512_vnni", "avx_vnni"), "avx512_bf16": ("avx512_bf16",),
    "amx": ("amx_tile",),
}  # fmt: skip
CPUINFO, CGROUP = Path("/proc/cpuinfo"), Path("/sys/fs/cgroup")
TOPOLOGY = Path("/sys/devices/system/cpu")


def describe(packages: Iterable[str] = PACKAGES, with_gpu: bool = True) -> dict[str, Any]:
    """Processor, cores, memory, system, the versions of those of `packages` that are installed, and the GPU.

    cores       that this process may run on
    cpu_quota   how many of them at a time, only where a container's share is less
    memory_mib  the machine's, or a container's limit; None where the system does not tell
    avx2, avx512, vnni, avx512_bf16, amx    whether the processor has them; None where the system does not tell
    gpu         CUDA's device 0, only where there is one and it was asked for: gpu()
    """
    cpu, flags = _processor()
    return {
        "processor": cpu,
        "cores": cores(),
        **_quota(),
        "memory_mib": _memory(),
        **{name: None if flags is None else not flags.isdisjoint(any_of) for name, any_of in INSTRUCTIONS.items()},
        "system": f"{platform.system()} {platform.machine()}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {"epsrt": __version__} | {p: version for p in packages if (version := installed(p))},
        **(gpu() if with_gpu else {}),
    }


def instructions() -> tuple[str, ...]:
    """The names of INSTRUCTIONS that the processor has; () where the system does not tell."""
    flags = _processor()[1] or set()
    return tuple(name for name, any_of in INSTRUCTIONS.items() if not flags.isdisjoint(any_of))


def has_bf16() -> bool:
    """Whether the processor computes in bf16, with AVX512-BF16 or AMX; False where the system does not tell."""
    return bool((_processor()[1] or set()) & {"avx512_bf16", "amx_bf16"})


def cores() -> int:
    """How many this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_cores() -> int:
    """How many cores this process may run on, hyper-threads of one core counted once; at most a container's share."""
    try:
        cpus = os.sched_getaffinity(0)
        found = len({(TOPOLOGY / f"cpu{n}/topology/thread_siblings_list").read_text() for n in cpus})
    except (AttributeError, OSError) as error:  # not Linux, or a sandbox without /sys
        if foreign(error):
            raise
        found = cores()
    return min(found, math.ceil(_quota().get("cpu_quota", found)))


def gpu() -> dict[str, Any]:
    """{"gpu": …} for CUDA's device 0; empty without one."""
    driver = nvidia.driver()
    if driver.problem or driver.version is None:
        return {}
    first = driver.gpus[0]
    found = {
        "name": first.name,
        "capability": first.arch,
        "memory_mib": first.memory >> 20,
        "cuda": nvidia.dots(driver.version),
    }
    return {"gpu": found | nvidia_smi("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")}


def nvidia_smi(*fields: str) -> dict[str, Any]:
    """What nvidia-smi says of the first GPU: MHz, °C and W as numbers; empty where it is missing or has no answer."""
    command = ["nvidia-smi", "-i", first_visible(), f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        values = [value.strip() for value in done.stdout.strip().splitlines()[0].split(",")]
        return {f: _number(v) for f, v in zip(fields, values, strict=True) if not v.startswith("[")}
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        if foreign(error, "subprocess"):
            raise
        return {}


def first_visible() -> str:
    """The number or UUID of CUDA's device 0 as NVIDIA's tools have it."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"


def _processor() -> tuple[str, set[str] | None]:
    """Its name and flags; None for flags where the system lists none."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError as error:
        if foreign(error):
            raise
        return platform.processor() or platform.machine(), None
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, set(fields["flags"].split()) if "flags" in fields else None  # arm64 lists others, as "Features"


def _quota() -> dict[str, float]:
    limit, _, period = _cgroup("cpu.max").partition(" ")
    share = round(int(limit) / int(period), 2) if limit.isdecimal() and period.isdecimal() and int(period) else 0.0
    return {"cpu_quota": share} if 0 < share < cores() else {}


def _memory() -> int | None:
    """MiB"""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError) as error:  # Windows, and names that a system does not know
        if foreign(error):
            raise
        return None
    limit = _cgroup("memory.max")
    return (min(whole, int(limit)) if limit.isdecimal() else whole) >> 20


def _cgroup(name: str) -> str:
    """A limit of this process's cgroup, as a container sees it (version 2); "" without one."""
    try:
        return (CGROUP / name).read_text().strip()
    except OSError as error:
        if foreign(error):
            raise
        return ""


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
