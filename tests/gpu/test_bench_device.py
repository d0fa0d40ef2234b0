"""epsrt bench's figures of a GPU, on the stand-in driver: its clock by CUDA events, its peak, its power."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NAME = "NVIDIA H100 80GB HBM3"
BENCH = """
from contextlib import ExitStack
from types import SimpleNamespace
import time
import msgspec
from epsrt.bench import isolated, power, run, timing
from epsrt.bench.report import Cost

isolated.run = lambda task: isolated.Found(0.5 if task.start else None, 1 << 20)  # another process has no stand-in
timing.ROUND_S = 0.0
built(bundle)

class NVMLError(Exception): pass

def pretended(name, milliwatts=lambda: 300_000):
    open_, shut = [], []
    nvml = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: open_.append(1), nvmlShutdown=lambda: shut.append(1),
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetName=lambda gpu: name,
        nvmlDeviceGetPowerUsage=lambda gpu: milliwatts(), open=open_, shut=shut,
    )
    sys.modules["pynvml"] = nvml
    power.SETTLE_S, power.SECONDS = 0.02, 0.05
    return nvml

def measured(batches=(1,), steps=12, rounds=2, **asked):
    asked = run.Asked(
        engines=("tensorrt",), precisions=("fp32",), batches=batches, steps=steps, seconds=None, rounds=rounds, **asked
    )
    with ExitStack() as stack:
        ready = run.opened(bundle, asked, stack, lambda what, fraction: None)
        *_, last = run.bench(bundle, asked, ready, count=lambda bundle, precision, batch: Cost(10**6 * batch, 10**3))
    return last

def shown(report):
    shares = [report.shares(row) for row in report.rows]
    print("REPORT" + json.dumps({**msgspec.to_builtins(report), "shares": shares}))
"""

Measured = Callable[..., dict[str, Any]]


@pytest.fixture
def measured(on_stand_in: Callable[..., str], bundle_path: Path) -> Measured:
    """measured(code) is the report that the code passes to `shown`."""

    def run(code: str, name: str = NAME) -> dict[str, Any]:
        out = on_stand_in(BENCH + code, bundle_path, name=name)
        (line,) = [line for line in out.splitlines() if line.startswith("REPORT")]
        return json.loads(line.removeprefix("REPORT"))  # type: ignore[no-any-return]

    return run


def test_steps_are_timed_by_events(measured: Measured) -> None:
    """Around each CudaGraph of a trajectory: 12 steps are 10 and 2. They span less than the host waits for."""
    made = measured("""
from epsrt.bench.device_clock import DeviceClock
seen, plain = [], DeviceClock.steps
def steps(self, rows, each):
    before = count("cuEventElapsedTime_v2")
    begin = time.perf_counter()
    seen.append((len(rows), each, plain(self, rows, each)))
    first, last = seen[-1][2]
    assert 0 < 10 * first + 2 * last < time.perf_counter() - begin
    assert count("cuEventElapsedTime_v2") - before == len(seen[-1][2])
    return seen[-1][2]
DeviceClock.steps = steps
sys.modules["pynvml"] = None
report = measured(batches=(1, 2))
assert [(rows, each, len(found)) for rows, each, found in seen] == [(12, False, 2)] * 4, seen
assert live() == 0
shown(report)
""")
    assert [row["batch"] for row in made["rows"]] == [1, 2]
    for row in made["rows"]:
        device = row["figures"]["device"]
        assert 0 < device["step_ms_p50"] <= device["step_ms_p95"]
        assert device["power_w"] is None
        assert device["power_unknown"] == 'nvidia-ml-py is missing: pip install nvidia-ml-py, or "epsrt[gpu]"'


def test_slow_steps_are_timed_one_by_one(measured: Measured) -> None:
    made = measured("""
from epsrt.bench.device_clock import DeviceClock
seen, plain = [], DeviceClock.steps
def steps(self, rows, each):
    seen.append(plain(self, rows, each))
    return seen[-1]
DeviceClock.steps = steps
sys.modules["pynvml"] = None
timing.SLOW_S = 0.0
report = measured()
assert [len(found) for found in seen] == [12, 12]
shown(report)
""")
    assert made["rows"][0]["figures"]["device"]


def test_shares_of_the_documented_peak(measured: Measured) -> None:
    made = measured('sys.modules["pynvml"] = None\nshown(measured(batches=(2,)))')
    assert made["machine"]["gpu"]["name"] == NAME
    assert made["peak"] == {
        "device": "cuda",
        "tflops": {"fp16": 989.0, "bf16": 989.0, "fp32": 67.0},
        "gbs": 3350.0,
        "source": "NVIDIA's H100 data sheet",
    }
    figures = made["rows"][0]["figures"]
    seconds = figures["device"]["step_ms_p50"] / 1e3
    assert figures["cost"] == {"flops": 2 * 10**6, "bytes": 10**3}
    assert made["shares"] == [[pytest.approx(2e6 / seconds / 67e12), pytest.approx(1e3 / seconds / 3.35e12)]]


def test_a_gpu_that_nobody_documents_has_no_share(measured: Measured) -> None:
    made = measured('sys.modules["pynvml"] = None\nshown(measured())', name="Stand-in GPU")
    assert (made["peak"], made["shares"]) == (None, [[None, None]])
    made = measured('sys.modules["pynvml"] = None\nshown(measured(peak_tflops=1e-3))', name="Stand-in GPU")
    assert (made["peak"]["tflops"], made["peak"]["source"]) == ({"fp32": 1e-3}, "FLOP/s as given")
    assert made["shares"][0][0] > 0
    assert made["shares"][0][1] is None


def test_power_while_steps_run(measured: Measured) -> None:
    made = measured(f"""
nvml = pretended({NAME!r})
report = measured(batches=(1, 2))
assert (nvml.open, nvml.shut) == ([1], [1])
shown(report)
""")
    assert [row["figures"]["device"]["power_w"] for row in made["rows"]] == [300.0, 300.0]
    assert {row["figures"]["device"]["power_unknown"] for row in made["rows"]} == {""}


def test_power_that_fails_is_said_in_its_row(measured: Measured) -> None:
    made = measured(f"""
left = [100_000, 200_000]
def milliwatts():
    if not left: raise NVMLError("GPU is lost")
    return left.pop()
nvml = pretended({NAME!r}, milliwatts)
shown(measured())
""")
    device = made["rows"][0]["figures"]["device"]
    assert device["power_w"] is None
    assert device["power_unknown"] == "NVML fails while steps run (GPU is lost)"
    assert device["step_ms_p50"] > 0
