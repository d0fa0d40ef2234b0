"""What a bench tells of a GPU without one: its peak, its power by a pretended NVML, and what of it is shared."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from epsrt import EngineError
from epsrt.bench import power
from epsrt.bench.peaks import peak_of
from epsrt.bench.report import Cost, Device, Figures, Of, Report, Row, Workload, read, with_ratios, write
from epsrt.bench.share import shared
from epsrt.engines import nvidia

H100 = nvidia.Driver((13, 0), (nvidia.Gpu(0, "NVIDIA H100 80GB HBM3", (9, 0), 80 << 30),))


def report(gpu: str = "NVIDIA H100 80GB HBM3", **changes: Any) -> Report:
    """An engine on the GPU: a step takes 2 ms there, and 4 ms to who waits; one on a CPU; and a rival on the GPU."""
    plain = Figures(250.0, 0.0, 5.0, 4.0, 4.4, (4.0,) * 7, 20, 1 << 26, (0.5,), Cost(10**12, 10**9))
    ours = msgspec.structs.replace(plain, device=Device(2.0, 2.2, 400.0))
    rows = [Row("tensorrt", "fp16", 8, "", ours), Row("onnxruntime", "fp16", 8, "", plain)]
    rows += [Row("torch", "fp16", 8, "", plain), Row("diffusers", "fp16", 8, "/home/me/x is missing")]
    base = Report(
        2,
        "2026-11-21T08:09:10+00:00",
        Of("mine.epsrt", "d" * 64, "epsrt_trainer.unet.UNet", 35_700_000),
        Workload("ddim", 20, None),
        (8,),
        "VmHWM",
        {"processor": "P", "cores": 2, "kernel": "6.1.0-of-me", "gpu": {"name": gpu}, "versions": {}},
        (),
        True,
        (),
        with_ratios(rows),
        ("torch", "diffusers"),
        "cuda",
        peak_of("cuda", gpu, ["fp16"]),
    )
    return msgspec.structs.replace(base, **changes)


def test_the_share_of_the_peak_is_by_the_gpus_own_clock() -> None:
    """10¹² FLOPs in 2 ms of 989·10¹² FLOP/s, 10⁹ bytes of 3.35·10¹² bytes/s. A rival has the host's clock alone."""
    made = report()
    ours, cpu, rival, failed = sorted(made.rows, key=lambda row: row.engine != "tensorrt")
    assert made.shares(ours) == (pytest.approx(500 / 989), pytest.approx(0.5 / 3.35))
    assert (cpu.engine, made.shares(cpu)) == ("onnxruntime", (None, None))
    assert (rival.engine, made.shares(rival)) == ("torch", (pytest.approx(250 / 989), pytest.approx(0.25 / 3.35)))
    assert made.shares(failed) == (None, None)


@pytest.mark.parametrize(
    ("gpu", "given", "shares", "source"),
    [
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", {}, (None, None), None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", {"gbs": 1000.0}, (None, 0.5), "bytes/s as given"),
        ("a new one", {"tflops": 1000.0}, (0.5, None), "FLOP/s as given"),
        ("a new one", {"tflops": 1000.0, "gbs": 5000.0}, (0.5, 0.1), "FLOP/s and bytes/s as given"),
        ("NVIDIA L4", {"tflops": 1000.0}, (0.5, 500 / 300), "FLOP/s as given, NVIDIA's L4 data sheet"),
        ("NVIDIA L4", {"tflops": 1.0, "gbs": 1.0}, (500.0, 500.0), "FLOP/s and bytes/s as given"),
    ],
)
def test_a_peak_is_what_somebody_says(gpu: str, given: dict[str, float], shares: Any, source: str | None) -> None:
    made = report(gpu, peak=peak_of("cuda", gpu, ["fp16"], **given))
    (ours,) = [row for row in made.rows if row.engine == "tensorrt"]
    assert made.shares(ours) == tuple(value and pytest.approx(value) for value in shares)
    assert (made.peak and made.peak.source) == source


def test_a_peak_of_a_cpu_is_given_or_none() -> None:
    assert peak_of("cpu", "NVIDIA L4", ["fp32"]) is None
    peak = peak_of("cpu", "", ["fp32", "bf16"], tflops=0.5)
    assert peak is not None
    assert (peak.tflops, peak.gbs) == ({"fp32": 0.5, "bf16": 0.5}, None)
    (cpu,) = [row for row in report().rows if row.engine == "onnxruntime"]
    made = report(peak=peak, rows=(msgspec.structs.replace(cpu, precision="fp32"),), device="cpu")
    assert made.shares(made.rows[0]) == (pytest.approx(500.0), None)


# power


class FakeError(Exception):
    pass


class Nvml(types.ModuleType):
    """As much of pynvml as a Meter asks: one GPU, whose power in mW `readings` gives one after another."""

    NVMLError = FakeError

    def __init__(self, readings: Callable[[], int] = lambda: 400_000, name: str = "NVIDIA H100 80GB HBM3") -> None:
        super().__init__("pynvml")
        self.readings, self.name, self.open, self.asked = readings, name, 0, list[object]()

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self.asked.append(index)
        return "gpu"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        return "gpu"

    def nvmlDeviceGetName(self, gpu: str) -> str:
        return self.name

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        return self.readings()


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Nvml]:
    monkeypatch.setattr(nvidia, "driver", lambda: H100)
    monkeypatch.setattr(power, "SETTLE_S", 0.05)
    monkeypatch.setattr(power, "SECONDS", 0.1)
    monkeypatch.setattr(power, "EVERY_S", 0.005)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def made(*arguments: Any, **named: Any) -> Nvml:
        nvml = Nvml(*arguments, **named)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return nvml

    return made


def test_power_is_the_mean_while_steps_run(pretend: Callable[..., Nvml]) -> None:
    """What was read while the steps settle does not count, nor what was read before."""
    readings = iter([90_000])  # at the start, idle
    worked: list[int] = []
    nvml = pretend(lambda: next(readings, 300_000 if len(worked) > 1 else 0))
    with power.Meter() as meter:
        assert nvml.open == 1
        assert meter.mean(lambda: worked.append(1)) == 300.0
    assert nvml.open == 0
    assert nvml.asked == [0]
    assert len(worked) > 10


def test_the_gpu_is_cudas(pretend: Callable[..., Nvml], monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = pretend()
    for visible, asked in (("2,0", 2), ("GPU-1234", "GPU-1234")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        power.Meter().close()
        assert nvml.asked[-1] == asked
    pretend(name="NVIDIA L4")
    with pytest.raises(EngineError, match="NVML's GPU GPU-1234 is NVIDIA L4, CUDA's is NVIDIA H100.*PCI_BUS_ID"):
        power.Meter()


def test_a_gpu_without_power_is_a_sentence(pretend: Callable[..., Nvml]) -> None:
    def unsupported() -> int:
        raise FakeError("Not Supported")

    nvml = pretend(unsupported)
    with pytest.raises(EngineError, match=r"NVML does not tell this GPU's power \(Not Supported\)"):
        power.Meter()
    assert nvml.open == 0


def test_nvml_that_fails_later_is_a_sentence(pretend: Callable[..., Nvml]) -> None:
    readings = iter([1000, 1000])

    def lost() -> int:
        try:
            return next(readings)
        except StopIteration:
            raise FakeError("GPU is lost") from None

    pretend(lost)
    with power.Meter() as meter, pytest.raises(EngineError, match=r"NVML fails while steps run \(GPU is lost\)"):
        meter.mean(lambda: None)


def test_nvml_that_does_not_start_is_a_sentence(pretend: Callable[..., Nvml], monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = pretend()

    def missing() -> None:
        raise FakeError("NVML Shared Library Not Found")

    monkeypatch.setattr(nvml, "nvmlInit", missing)
    with pytest.raises(EngineError, match=r"NVML does not start \(NVML Shared Library Not Found\): install"):
        power.Meter()
    assert nvml.open == 0


def test_without_the_package_it_says_what_to_install(
    pretend: Callable[..., Nvml], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(EngineError, match="nvidia-ml-py is missing: pip install nvidia-ml-py"):
        power.Meter()


# what others may see


def test_what_is_shared_names_nobody(tmp_path: Path) -> None:
    unknown = Device(2.0, 2.2, None, "NVML said /home/me")
    (row, *rows) = report().rows
    assert row.figures is not None
    mute = msgspec.structs.replace(row, figures=msgspec.structs.replace(row.figures, device=unknown))
    made = shared(report(rows=(mute, *rows), uncounted="/home/me/step.onnx cannot be counted"))
    write(tmp_path / "shared.json", made)
    text = (tmp_path / "shared.json").read_text()
    assert not [word for word in ("/home", "mine", "of-me", "08:09", "missing:") if word in text]
    again = read(tmp_path / "shared.json")
    assert again == made
    assert (again.bundle.name, again.bundle.parameters, again.date) == ("UNet", 35_700_000, "2026-11-21")
    assert {row.engine for row in again.rows} == {"tensorrt", "onnxruntime", "torch"}
    assert again.complete
