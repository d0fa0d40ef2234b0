"""epsrt doctor: what it prints in 80 columns, and its JSON."""

import dataclasses
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from epsrt import Bundle, BundleError, __version__
from epsrt.engines import nvidia, probe
from epsrt.engines.probe import Driver, Gpu
from epsrt_command.commands import doctor
from helpers import run_python

L4 = Driver((13, 0), (Gpu(0, "NVIDIA L4", (8, 9), 23 << 30), Gpu(1, "NVIDIA H200", (9, 0), 140 << 30)))
NO_DRIVER = nvidia._ask("/nowhere/libcuda.so.1")
RTX = {
    "epsrt": __version__, "onnxruntime": "1.31.1", "tensorrt-rtx-cu13": "1.7.1.116", "cuda-bindings": "13.5.0",
    "nvidia-cuda-nvrtc": "13.5.37", "filelock": "3.16.1",
}  # fmt: skip


@pytest.fixture
def run(monkeypatch):
    """run("out/digits.epsrt", "--json") is what the command prints."""
    app = typer.Typer(rich_markup_mode="rich")
    app.command(epilog=doctor.EXAMPLES)(doctor.doctor)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception:
            raise result.exception
        return result.stdout

    return run


@pytest.fixture
def machine(monkeypatch):
    def pretend(packages, driver):
        def find(name):
            if name not in packages:
                raise PackageNotFoundError(name)
            return packages[name]

        monkeypatch.setattr("importlib.metadata.version", find)
        monkeypatch.setattr(probe, "_file_of", lambda name, path: Path("site-packages", path))
        monkeypatch.setattr(probe, "_has_module", lambda name: True)
        monkeypatch.setattr(probe, "_has_file", lambda stem, major: False)
        monkeypatch.setattr(probe, "driver", lambda: driver)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return pretend


def test_here(run):
    """Whatever this machine is."""
    text, report = run(), json.loads(run("--json"))
    assert list(report) == ["machine", "engines", "packages", "bundle", "auto"]
    assert report["machine"]["cores"] == os.cpu_count()
    assert report["machine"]["processor"]
    assert platform.python_version() in report["machine"]["system"]
    assert [e["engine"] for e in report["engines"]] == [info.name for info in probe.ENGINES]
    assert report["packages"]["numpy"] == version("numpy")
    assert report["bundle"] is None
    assert text.endswith(f"auto takes {report['auto']}\n")
    for engine in report["engines"]:
        assert engine["available"] == (engine["reason"] == "")
        assert engine["engine"] in text


def test_auto_is_what_auto_takes_on_other_processors(run, machine, monkeypatch):
    machine({**RTX, "openvino": "2026.4.1"}, NO_DRIVER)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert json.loads(run("--json"))["auto"] == "onnxruntime"


def test_a_machine_without_a_driver(run, machine):
    machine(RTX, NO_DRIVER)
    report = json.loads(run("--json"))
    assert report["machine"]["cuda"] is None
    assert report["machine"]["gpus"] == []
    assert report["machine"]["problem"] == NO_DRIVER.problem
    assert report["machine"]["CUDA_VISIBLE_DEVICES"] is None
    assert report["auto"] == "onnxruntime"
    assert report["engines"][0] == {
        "engine": "tensorrt",
        "device": "cuda",
        "available": False,
        "library": "",
        "reason": "no NVIDIA driver: libcuda.so.1 was not found; tensorrt is not installed",
        "command": 'install NVIDIA\'s driver 580 or newer (nvidia.com/drivers), then pip install "epsrt[tensorrt]"',
        "builds": False,
        "precision": None,
    }
    assert report["engines"][-1]["library"] == "onnxruntime 1.31.1"
    lines = run().splitlines()
    table, advice = lines[: lines.index("auto takes onnxruntime") - 7], lines[-8:]
    assert max(map(len, table)) <= 80
    assert sum("libcuda.so.1 was not found" in line for line in lines) == 1
    assert advice == [
        "for the GPU engines: install NVIDIA's driver 580 or newer (nvidia.com/drivers)",
        'for tensorrt: pip install "epsrt[tensorrt]"',
        "tensorrt-rtx builds ahead of time here: epsrt build BUNDLE --engine tensorrt-rtx --target sm89",
        'for onnxruntime-tensorrt: pip uninstall -y onnxruntime && pip install "epsrt[gpu]" "tensorrt>=10.16,<11"',
        'for onnxruntime-cuda: pip uninstall -y onnxruntime && pip install "epsrt[gpu]"',
        'for openvino: pip install "epsrt[openvino]"',
        "",
        "auto takes onnxruntime",
    ]


def test_a_machine_with_gpus(run, machine, monkeypatch):
    machine(RTX, L4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    machine_report = json.loads(run("--json"))["machine"]
    assert machine_report["cuda"] == "13.0"
    assert machine_report["gpus"][1] == {"index": 1, "name": "NVIDIA H200", "arch": "sm_90", "memory": 140 << 30}
    text = run()
    for words in ("supports CUDA 13.0", "NVIDIA L4, sm_89, 23.0 GiB", '"1,0"', "tensorrt-rtx-cu13  1.7.1.116"):
        assert words in text
    assert text.endswith("\nauto takes tensorrt-rtx\n")


def test_a_gpu_that_tensorrt_rtx_does_not_run_on(run, machine):
    """It still builds for others, ahead of time."""
    machine(RTX | {"tensorrt": "11.4.0.106"}, Driver((13, 0), (Gpu(0, "NVIDIA H100", (9, 0), 80 << 30),)))
    text = " ".join(run().split())
    assert (
        "tensorrt-rtx unavailable tensorrt-rtx-cu13 1.7.1.116 GPU 0, NVIDIA H100, is sm_90 and tensorrt-rtx runs on "
        "sm_75, sm_80, sm_86, sm_89, sm_120, sm_121 alone: take engine tensorrt" in text
    )
    assert "tensorrt-rtx builds ahead of time here" in text
    assert text.endswith("auto takes tensorrt")


def test_no_engine_at_all(run, machine):
    machine(RTX | {"onnxruntime-gpu": "1.31.1"}, NO_DRIVER)
    text = run()
    assert json.loads(run("--json"))["auto"] is None
    assert 'for onnxruntime: pip uninstall -y onnxruntime onnxruntime-gpu && pip install "epsrt[cpu]"\n' in text
    assert text.endswith("\nauto finds no engine that runs here\n")


class TestBundle:
    def test_of_both_precisions(self, run, machine, bundle_path, monkeypatch):
        machine(RTX, L4)
        monkeypatch.setattr("epsrt.machine.has_bf16", lambda: True)
        report = json.loads(run(bundle_path, "--json"))
        assert report["bundle"] == {
            "path": str(bundle_path),
            "digest": Bundle.open(bundle_path).manifest.digest,
            "graphs": {"fp32": "step-fp32.onnx", "fp16": "step-fp16.onnx"},
        }
        assert [e["precision"] for e in report["engines"]] == ["fp16"] * 4 + ["bf16", "fp32"]
        text = run(bundle_path)
        assert "in bf16 where its golden file proves it, else in fp32" in " ".join(text.split())
        assert text.endswith(f"auto takes tensorrt-rtx and fp16 for {bundle_path}\n")
        assert f"epsrt build {bundle_path} --engine tensorrt-rtx" in text

    def test_of_fp32_alone(self, run, machine, small_bundle_path):
        machine(RTX, L4)
        text = " ".join(run(small_bundle_path).split())
        assert "tensorrt-rtx fp32 step-fp32.onnx: the bundle has no fp16 graph, which would be faster" in text
        assert text.endswith(f"auto takes tensorrt-rtx and fp32 for {small_bundle_path}")

    def test_of_fp16_alone(self, run, machine, bundle_path, monkeypatch):
        machine(RTX, NO_DRIVER)
        bundle = Bundle.open(bundle_path)
        half = tuple(graph for graph in bundle.manifest.graphs if graph.precision == "fp16")
        bundle = dataclasses.replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, graphs=half))
        monkeypatch.setattr(Bundle, "open", lambda path: bundle)
        report = json.loads(run(bundle_path, "--json"))
        assert [e["precision"] for e in report["engines"]] == ["fp16"] * 4 + [None, "fp16"]
        assert report["auto"] == "onnxruntime"
        text = " ".join(run(bundle_path).split())
        assert "openvino nothing none: the bundle has no fp32 graph" in text
        assert "onnxruntime fp16 step-fp16.onnx: the bundle has no fp32 graph, which would be faster" in text

    def test_that_is_none(self, run, tmp_path):
        with pytest.raises(BundleError, match="does not exist"):
            run(tmp_path / "none.epsrt")


def test_help_has_examples(run):
    assert "epsrt doctor out/digits.epsrt" in run("--help")


def test_it_imports_no_engines_library():
    code = """
import sys
from epsrt_command.commands import doctor
doctor.examine()
print({"onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "cuda.bindings", "torch"} & set(sys.modules))
"""
    assert run_python(code).stdout == "set()\n"
