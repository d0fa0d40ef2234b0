"""Compile the stand-in for the CUDA driver, our kernels in it: `LD_LIBRARY_PATH=<folder>` then finds it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
KERNEL = re.compile(
    r"""extern\s+"C"\s+__global__\s+
        (?:__launch_bounds__\s*\((?P<before>[^)]*)\)\s*)?
        void\s+
        (?:__launch_bounds__\s*\((?P<after>[^)]*)\)\s*)?
        (?P<name>\w+)\s*\(""",
    re.VERBOSE,
)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
COMPILE = ("g++", "-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-pthread", "-c")
# A misaligned float4 calls a handler (driver.cpp has it), as it is an error on a GPU and would go unseen here. The link
# does not name the sanitizer, so nothing of it is loaded. Without the TLS model, threadIdx is a function call.
KERNEL_FLAGS = ("-fsanitize=alignment", "-fno-sanitize-recover=alignment", "-ftls-model=initial-exec")


class NoCompiler(RuntimeError):
    """There is no g++: a test that needs the stand-in skips."""


def build(folder: Path, sources: Sequence[Path]) -> Path:
    """Compile driver.cpp and the kernels of `sources` (CUDA C) into folder/libcuda.so.1, and return its path.

    A kernel is written `extern "C" __global__ void name(...)`, a `__launch_bounds__(...)` before `void` or the name; no
    two have the same name.

    Raises:
        NoCompiler: g++ is not installed.
        ValueError: a source has no kernel, or one that is not written so.
        RuntimeError: g++ rejects a source; its message follows.
    """
    if shutil.which("g++") is None:
        raise NoCompiler("the stand-in for the CUDA driver needs g++")
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for i, source in enumerate(sources):
        wrapper = folder / f"source_{i}.cpp"
        wrapper.write_text(_wrapper(source, i))
        objects.append(wrapper.with_suffix(".o"))
        _run(*COMPILE, *KERNEL_FLAGS, "-I", HERE, wrapper, "-o", objects[-1])
    objects.append(folder / "driver.o")
    _run(*COMPILE, HERE / "driver.cpp", "-o", objects[-1])
    exports = folder / "exports.map"  # nothing of libstdc++: the library is loaded with RTLD_GLOBAL
    exports.write_text("{ global: cu*; stand_in_*; local: *; };")
    library = folder / "libcuda.so.1"
    options = ("-shared", "-pthread", "-Wl,-soname,libcuda.so.1", "-Wl,-z,defs", f"-Wl,--version-script={exports}")
    _run("g++", *options, *objects, "-ldl", "-o", library)
    return library


def environment(folder: Path, gpus: int = 1, **knobs: object) -> dict[str, str]:
    """The variables with which a new process finds the stand-in: environment(folder, memory=1 << 20, driver=12080).

    `knobs` are EPSRT_STAND_IN_*, in small letters: see driver.cpp.
    """
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH"))))
    variables = {"LD_LIBRARY_PATH": path, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}
    return variables | {f"EPSRT_STAND_IN_{k.upper()}": str(v) for k, v in {"gpus": gpus, **knobs}.items()}


def _wrapper(source: Path, i: int) -> str:
    code = COMMENT.sub(" ", source.read_text())
    found = [match.groupdict() for match in KERNEL.finditer(code)]
    if not found or len(found) != len(re.findall(r"\b__global__\b", code)):
        raise ValueError(f'{source}: {len(found)} kernels are written extern "C" __global__ void name(...), not all')
    enrolled = ""
    for kernel in found:
        name, bounds = kernel["name"], kernel["before"] or kernel["after"] or 1024
        enrolled += f'const bool {name}_enrolled = stand_in::enrol("{name}", stand_in_first({bounds}), &{name});\n'
    first = "template <class... More> constexpr int stand_in_first(int first, More...) { return first; }\n"
    # The namespace: __device__ functions of the same name in two sources are two functions.
    return f'#include "emulate.h"\nnamespace source_{i} {{\n#include "{source.resolve()}"\n{first}{enrolled}}}\n'


def _run(*command: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
