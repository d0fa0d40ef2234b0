"""kernels.cu, compiled to machine code by NVRTC. This needs no driver and no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from epsrt.engines.libraries import importing
from epsrt.errors import EngineError, one_line
from epsrt.raised import foreign

with importing("cuda.bindings.nvrtc", "NVRTC", 'pip install "epsrt[gpu]"'):
    from cuda.bindings import nvrtc

SOURCE = Path(__file__).with_name("kernels.cu")


def compile_kernels(arch: str) -> bytes:
    """kernels.cu as machine code for `arch`, e.g. "sm_90"; PTX of NVRTC's newest where `arch` is newer still.

    Needs NVRTC, no driver. Raises EngineError with the compiler's words.
    """
    try:
        known = sorted(_call(nvrtc.nvrtcGetSupportedArchs()))
    except RuntimeError as error:  # what cuda-bindings raises where the library is missing
        if foreign(error):
            raise
        reason = one_line(error)
        raise EngineError(f"NVRTC cannot be loaded ({reason}): pip install nvidia-cuda-nvrtc") from error
    native = int(arch.removeprefix("sm_")) in known
    target = arch if native else f"compute_{known[-1]}"
    program = _call(nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), SOURCE.name.encode(), 0, [], []))
    options = [f"--gpu-architecture={target}".encode(), b"--std=c++17"]
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _call(nvrtc.nvrtcGetProgramLogSize(program))
            _call(nvrtc.nvrtcGetProgramLog(program, log))
            raise EngineError(f"NVRTC does not compile {SOURCE.name} for {target}: {log.decode().strip()}")
        size, get = (
            (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN) if native else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        )
        code = b" " * _call(size(program))
        _call(get(program, code))
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _call(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise EngineError(f"NVRTC reports {status.name}: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return values[0] if values else None
