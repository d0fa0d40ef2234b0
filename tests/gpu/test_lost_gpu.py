"""A GPU that fails in the middle of its work: an error in a sentence, nothing left behind, and the next call works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SAMPLING = """
name = sys.argv[2]
if name.startswith("onnxruntime"):
    import fake_onnxruntime
    sys.modules["onnxruntime"] = fake_onnxruntime
LAUNCH_FAILED, OUT_OF_MEMORY = 719, 2
sampler = Sampler(open_engine(bundle, name, precision="fp32"))

def sample(): return sampler.sample(2, method="ddpm", steps=25)
def left(): return [live(), *(driver.stand_in_live(k) for k in (b"streams", b"events", b"graphs", b"execs", b"host"))]
def fail(function, times, code): driver.stand_in_fail(function.encode(), times, code)

want = sample()
sampler._pool.drop()
before = left()
"""

Run = Callable[..., str]


@pytest.fixture(params=["tensorrt", "tensorrt-rtx", "onnxruntime-cuda"])
def run(request: pytest.FixtureRequest, on_stand_in: Run, small_bundle_path: Path) -> Run:
    """run(code): after SAMPLING, for each engine."""
    return lambda code: on_stand_in(SAMPLING + code, small_bundle_path, request.param)


def test_a_call_that_fails_once(run: Run) -> None:
    """Whichever: in the middle of kept lanes' work, at its end, and again while the lanes are closed."""
    run(
        """
def check(function, times, code):
    calls = count(function)
    fail(function, times, code)
    sentence = refused(sample)
    fail(function, 0, 0)
    assert count(function) > calls and left() == before, (function, times, code, left(), before)
    assert "\\n" not in sentence and ("the GPU's driver reports CUDA_ERROR" in sentence or "onnxruntime" in sentence)
    assert (sample() == want).all()

sample()
for function in ("cuMemcpyHtoDAsync_v2", "cuLaunchKernel", "cuMemcpyDtoDAsync_v2", "cuGraphLaunch",
                 "cuMemcpyDtoHAsync_v2", "cuStreamSynchronize", "cuEventSynchronize"):
    for code in (LAUNCH_FAILED, OUT_OF_MEMORY):
        check(function, 1, code)
check("cuStreamSynchronize", 2, LAUNCH_FAILED)
"""
    )


def test_a_gpu_that_is_away_for_a_while(run: Run) -> None:
    run(
        """
CALLS = ("cuMemcpyHtoDAsync_v2 cuLaunchKernel cuMemcpyDtoDAsync_v2 cuGraphLaunch cuMemcpyDtoHAsync_v2 cuMemAlloc_v2 "
         "cuStreamSynchronize cuEventSynchronize cuStreamCreate cuEventCreate cuMemHostAlloc cuMemsetD8Async").split()
sample()
for function in CALLS: fail(function, 1 << 30, LAUNCH_FAILED)
for _ in range(3):  # kept lanes, then new ones
    assert "launch failure" in refused(sample) or "CUDA failure 719" in refused(sample)
for function in CALLS: fail(function, 0, 0)
assert left() == before
assert (sample() == want).all()
"""
    )
