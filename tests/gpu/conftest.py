"""Fixtures: epsrt's GPU code in a new process, on the stand-in driver, or on a real GPU where the machine has one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from epsrt.engines import nvidia
from gpu.stand_in.build import NoCompiler, build, environment
from helpers import run_python

KERNELS = Path(nvidia.__file__).parent / "gpu" / "kernels.cu"
WORDS = """
extern "C" __global__ void words(const uint32* counters, const uint64* keys, uint32* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const uint32* c = counters + 4 * i;
    Four made = philox(c[0], c[1], c[2], c[3], keys[i]);
    for (int k = 0; k < 4; ++k) out[4 * i + k] = made.r[k];
}
"""

# `bundle` has plain graphs alone, `spoken` all dialects. `trt` is the pretended TensorRT, for both engines; `count` and
# `launches` ask the stand-in.
PRELUDE = f"""
import ctypes, json, logging, os, sys, threading
from pathlib import Path
import msgspec
import numpy as np
sys.path.insert(0, {str(Path(__file__).parent)!r})
import fake_tensorrt as trt
sys.modules["tensorrt"] = sys.modules["tensorrt_rtx"] = trt
import epsrt
from epsrt import Bundle, EngineError, NotFiniteError, Sample, Sampler, idle_row, noise, open_engine
from epsrt.verify import verify
from epsrt.engines.gpu import cuda, engine_files
from epsrt.engines.cache.store import EngineCache
from epsrt.engines.gpu.trt_build import BuildOptions
from epsrt.engines.gpu.trt_library import library

driver = ctypes.CDLL("libcuda.so.1")
for name in ("stand_in_launches", "stand_in_count", "stand_in_live", "stand_in_live_bytes"):
    getattr(driver, name).restype = ctypes.c_longlong

def count(call): return driver.stand_in_count(call.encode())
def launches(kernel): return driver.stand_in_launches(kernel.encode())
def live(): return driver.stand_in_live_bytes()

def refused(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except epsrt.EpsrtError as error:
        return str(error)
    raise AssertionError("this was not refused")

def built(bundle, precision="fp32", engine="tensorrt", features=(), dialect="cpu", **options):
    lib, graph = library(engine), bundle.graph(precision, features).in_dialect(dialect)
    return engine_files.make_engine_file(lib, bundle, graph, BuildOptions(**options), say=lambda s: None)

def said(function, *arguments, **options):  # what it returned, and what it logged
    class Keep(logging.Handler):
        def emit(self, record): sentences.append(record.getMessage())
    sentences, keep = [], Keep()
    logging.getLogger("epsrt").addHandler(keep)
    try:
        return function(*arguments, **options), sentences
    finally:
        logging.getLogger("epsrt").removeHandler(keep)

def close(a, b):  # the network magnifies what the noises differ by, 4e-6 at most
    assert a.shape == b.shape and np.abs(a - b).max() < 1e-4, np.abs(a - b).max()

def plain(bundle):  # without dialects: nothing is proven before its first use
    graphs = tuple(g.in_dialect("cpu") for g in bundle.manifest.graphs)
    return Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, graphs=graphs))

spoken = Bundle.open(sys.argv[1]) if len(sys.argv) > 1 else None  # in all dialects
bundle = spoken and plain(spoken)
"""


@pytest.fixture(scope="session")
def stand_in(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The folder of a stand-in driver that knows our kernels, and one more: `words`, the bare Philox."""
    pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")

    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        source = folder / "kernels.cu"
        source.write_text(KERNELS.read_text() + WORDS)
        build(folder, [source])

    try:
        return once("driver", make)
    except NoCompiler as error:
        pytest.skip(str(error))


@pytest.fixture
def on_stand_in(stand_in: Path, tmp_path: Path) -> Callable[..., str]:
    """on_stand_in(code, *arguments, **knobs) runs code after PRELUDE in a new process; what it printed."""

    def run(code: str, *arguments: object, **knobs: object) -> str:
        env = environment(stand_in, **knobs) | {"EPSRT_CACHE": str(tmp_path / "cache")}
        done = run_python(PRELUDE + code, *arguments, env=env)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout + done.stderr

    return run
