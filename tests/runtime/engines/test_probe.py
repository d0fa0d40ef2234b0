"""The driver probe with a pretend driver, and the engines' states with pretend packages."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType

import pytest

from epsrt import InputError
from epsrt import engines as public
from epsrt.engines import nvidia, probe
from epsrt.engines.probe import Driver, Gpu
from helpers import run_python

SOURCE = Path(__file__).with_name("fake_driver.c")
ALL = {
    "tensorrt": "10.16.1.11", "tensorrt-cu13": "10.16.1.11", "tensorrt-rtx-cu13": "1.7.1.116",
    "onnxruntime-gpu": "1.31.1", "cuda-bindings": "13.5.0", "nvidia-cuda-nvrtc": "13.5.37", "filelock": "3.16.1",
    "openvino": "2026.4.1",
}  # fmt: skip
H200, L4 = Gpu(0, "NVIDIA H200", (9, 0), 140 << 30), Gpu(0, "NVIDIA L4", (8, 9), 23 << 30)
NO_DRIVER = nvidia._ask("/nowhere/libcuda.so.1")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """A pretend libcuda.so.1. It has no soname: a later dlopen("libcuda.so.1") of this process does not find it."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: the pretend driver cannot be compiled")
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", path, SOURCE], check=True)
    return path


@pytest.fixture
def ask(library, monkeypatch):
    """ask(FAKE_GPUS="…") is what the pretend driver says in that environment."""
    for name in [name for name in os.environ if name.startswith("FAKE_") or name == "CUDA_VISIBLE_DEVICES"]:
        monkeypatch.delenv(name)

    def ask(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return nvidia._ask(str(library))

    return ask


class TestDriver:
    def test_gpus(self, ask):
        found = ask(FAKE_GPUS="NVIDIA H200:90;NVIDIA L4:89;NVIDIA RTX PRO 6000:120", FAKE_VERSION="13040")
        assert (found.version, found.problem, found.fault, found.command) == ((13, 4), "", "", "")
        assert [gpu.arch for gpu in found.gpus] == ["sm_90", "sm_89", "sm_120"]
        assert found.gpus[1] == Gpu(1, "NVIDIA L4", (8, 9), (140 << 30) - 1)

    @pytest.mark.parametrize(
        ("environment", "problem", "command"),
        [
            (
                {"FAKE_VERSION": "12040", "FAKE_FAIL": "cuInit=803"},
                "NVIDIA's driver supports CUDA 12.4, and 13.0 is needed; install NVIDIA's driver 580 or newer",
                "install NVIDIA's driver 580 or newer (nvidia.com/drivers)",
            ),
            ({}, "this machine has no NVIDIA GPU; use engine onnxruntime, or a machine with one", ""),
            (
                {"CUDA_VISIBLE_DEVICES": "", "FAKE_GPUS": "NVIDIA L4:89"},
                'CUDA_VISIBLE_DEVICES is "", which leaves no GPU; unset it, or give it numbers from nvidia-smi -L',
                "unset CUDA_VISIBLE_DEVICES",
            ),
            (
                {"CUDA_VISIBLE_DEVICES": "-1", "FAKE_GPUS": "NVIDIA L4:89", "FAKE_ZERO": "1"},
                'CUDA_VISIBLE_DEVICES is "-1", which leaves no GPU; unset it, or give it numbers from nvidia-smi -L',
                "unset CUDA_VISIBLE_DEVICES",
            ),
            (
                {"FAKE_FAIL": "cuInit=803"},
                "NVIDIA's driver fails: cuInit returns 803 (system has unsupported display driver / cuda driver "
                "combination); try nvidia-smi, reboot after a driver's update, and in a container update NVIDIA's "
                "container toolkit",
                nvidia.OTHERWISE,
            ),
            (
                {"FAKE_FAIL": "cuInit=999"},
                f"NVIDIA's driver fails: cuInit returns 999 (an unknown error); {nvidia.OTHERWISE}",
                nvidia.OTHERWISE,
            ),
            (
                {"FAKE_FAIL": "cuInit=802"},
                "NVIDIA's driver fails: cuInit returns 802 (an unknown error); start NVIDIA's fabric manager: "
                "systemctl start nvidia-fabricmanager",
                nvidia.WAYS_OUT[802],
            ),
            (
                {"FAKE_FAIL": "cuDriverGetVersion=34"},
                "NVIDIA's driver fails: cuDriverGetVersion returns 34 (an unknown error); this libcuda.so.1 is the "
                "CUDA toolkit's stub, take its folder out of LD_LIBRARY_PATH",
                nvidia.WAYS_OUT[34],
            ),
            (
                {"FAKE_GPUS": "NVIDIA L4:89", "FAKE_FAIL": "cuDeviceTotalMem_v2=101"},
                "NVIDIA's driver fails: cuDeviceTotalMem_v2 returns 101 (an unknown error); " + nvidia.OTHERWISE,
                nvidia.OTHERWISE,
            ),
        ],
    )
    def test_problems(self, ask, environment, problem, command):
        found = ask(**environment)
        assert (found.problem, found.command, found.gpus) == (problem, command, ())
        assert problem.startswith(f"{found.fault}; ")

    def test_no_library(self):
        assert NO_DRIVER.version is None
        assert NO_DRIVER.problem == (
            "no NVIDIA driver: libcuda.so.1 was not found; install NVIDIA's driver 580 or newer (a container: start it "
            "with its GPUs)"
        )
        assert NO_DRIVER.command == "install NVIDIA's driver 580 or newer (nvidia.com/drivers)"

    def test_a_library_that_cannot_be_loaded(self, tmp_path):
        (tmp_path / "libcuda.so.1").write_bytes(b"")
        found = nvidia._ask(str(tmp_path / "libcuda.so.1"))
        assert found.problem.startswith("NVIDIA's driver cannot be loaded (")
        assert "file too short" in found.problem
        assert found.problem.endswith("; install NVIDIA's driver 580 or newer over it")

    @pytest.mark.parametrize("missing", [None, "cuGetErrorString"])
    def test_another_library_by_that_name(self, tmp_path, ask, missing):
        source = tmp_path / "other.c"
        source.write_text("int cuDriverGetVersion(int *v) { *v = 13000; return 5; }" if missing else "int x;")
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
        found = nvidia._ask(str(tmp_path / "libcuda.so.1"))
        assert found.problem.startswith("libcuda.so.1 is not NVIDIA's driver (")
        assert f"undefined symbol: {missing or 'cuDriverGetVersion'}" in found.problem

    def test_a_library_that_lacks_another(self, tmp_path, ask):
        for name, source, link in (("libinner.so", "int y;", ()), ("libcuda.so.1", "int x;", ("-L", ".", "-linner"))):
            (tmp_path / "a.c").write_text(source)
            command = ["gcc", "-shared", "-fPIC", "-Wl,--no-as-needed", "-o", name, "a.c", *link]
            subprocess.run(command, cwd=tmp_path, check=True)
        (tmp_path / "libinner.so").unlink()
        found = nvidia._ask(str(tmp_path / "libcuda.so.1"))
        assert "cannot be loaded (libinner.so: cannot open shared object file" in found.problem

    def test_driver_finds_it_where_the_loader_does_and_asks_once(self, library):
        code = """
import os, sys
from epsrt.engines import probe
from epsrt.errors import EngineError
print(probe.require_gpu(), probe.require_gpu().arch)
os.environ["FAKE_FAIL"] = "cuInit=999"
print(probe.driver().problem == "")
probe.driver.cache_clear()
try:
    probe.require_gpu()
except EngineError as error:
    print(error)
print({"tensorrt", "tensorrt_rtx", "onnxruntime", "cuda.bindings", "torch"} & set(sys.modules))
"""
        environment = {"LD_LIBRARY_PATH": str(library.parent), "CUDA_VISIBLE_DEVICES": "0"}
        environment |= {"FAKE_GPUS": "NVIDIA H200:90", "FAKE_FAIL": ""}
        lines = run_python(code, env=environment).stdout.splitlines()
        assert lines[0] == f"Gpu(index=0, name='NVIDIA H200', capability=(9, 0), memory={140 << 30}) sm_90"
        assert lines[1] == "True"
        assert "cuInit returns 999" in lines[2]
        assert lines[3] == "set()"

    def test_importing_epsrt_asks_nobody(self):
        done = run_python("import sys, epsrt; print([n for n in sys.modules if 'probe' in n or 'nvidia' in n])")
        assert done.stdout.strip() == "[]"


@pytest.fixture
def machine(monkeypatch):
    """machine(packages, driver) pretends; packages are distribution: version, and each has its module."""

    def pretend(packages, driver=None, lost=(), files=()):
        def version(name):
            if name not in packages:
                raise PackageNotFoundError(name)
            return packages[name]

        monkeypatch.setattr("importlib.metadata.version", version)
        monkeypatch.setattr(probe, "_file_of", lambda name, path: Path("site-packages", path))
        monkeypatch.setattr(probe, "_has_module", lambda name: name not in lost)
        monkeypatch.setattr(probe, "_has_file", lambda stem, major: (stem, major) in files)
        monkeypatch.setattr(probe, "driver", lambda: driver or Driver((13, 0), (H200,)))

    return pretend


def without(*names, **more):
    return {name: version for name, version in (ALL | more).items() if name not in names}


class TestState:
    def test_the_table_has_every_engine_in_the_order_of_auto(self):
        assert tuple(info.name for info in probe.ENGINES) == public.ENGINES
        with pytest.raises(InputError, match="engine 'warp' is unknown: use one of tensorrt, tensorrt-rtx"):
            probe.state("warp")

    def test_all_is_there(self, machine):
        machine(ALL, Driver((13, 0), (L4,)), files=[("nvinfer", 10)])
        assert list(probe.available()) == [info.name for info in probe.ENGINES]
        states = {info.name: probe.state(info.name) for info in probe.ENGINES}
        assert {(s.available, s.reason, s.command) for s in states.values()} == {(True, "", "")}
        assert states["tensorrt"].library == "tensorrt 10.16.1.11"
        assert states["onnxruntime"].library == "onnxruntime-gpu 1.31.1"
        assert [name for name, s in states.items() if s.builds] == ["tensorrt-rtx"]

    def test_tensorrt_by_the_name_of_its_cuda(self, machine):
        machine({**without("tensorrt"), "tensorrt-cu13": "11.4.0.106"})
        assert probe.state("tensorrt").library == "tensorrt-cu13 11.4.0.106"
        assert probe.state("tensorrt").available

    @pytest.mark.parametrize(
        ("name", "packages", "reason", "command"),
        [
            ("tensorrt", {}, "tensorrt, cuda-bindings, nvidia-cuda-nvrtc and filelock are not installed", "tensorrt"),
            ("tensorrt", without("cuda-bindings"), "cuda-bindings is not installed", "tensorrt"),
            ("tensorrt", ALL | {"tensorrt": "10.9.0.34"}, "tensorrt 10.9.0.34 is older than 10.16", "tensorrt"),
            ("tensorrt", ALL | {"cuda-bindings": "12.9.4"}, "cuda-bindings 12.9.4 is older than 13", "tensorrt"),
            (
                "tensorrt",
                ALL | {"tensorrt": "10.15", "filelock": "3.2"},
                "tensorrt 10.15 is older than 10.16; filelock 3.2 is older than 3.12",
                "tensorrt",
            ),
            (
                "onnxruntime-cuda",
                ALL | {"onnxruntime-gpu": "1.26.0"},
                "onnxruntime-gpu 1.26.0 is older than 1.27",
                "gpu",
            ),
            ("onnxruntime", {}, "onnxruntime is not installed", "cpu"),
            ("onnxruntime", {"onnxruntime": "1.16.3"}, "onnxruntime 1.16.3 is older than 1.24", "cpu"),
        ],
    )
    def test_libraries(self, machine, name, packages, reason, command):
        machine(packages, lost=["onnxruntime"] if not packages else [])
        found = probe.state(name)
        assert (found.available, found.reason, found.command) == (False, reason, f'pip install "epsrt[{command}]"')
        assert name not in probe.available()

    def test_a_version_that_just_serves(self, machine):
        machine(ALL | {"tensorrt": "10.16", "cuda-bindings": "13.0.0b1"})
        assert probe.state("tensorrt").available

    def test_nvrtc_of_the_toolkit_serves_too(self, machine):
        machine(without("nvidia-cuda-nvrtc"), files=[("nvrtc", 13)])
        assert probe.state("tensorrt").available

    def test_onnxruntimes_tensorrt_needs_tensorrt_10(self, machine):
        machine(ALL | {"tensorrt": "11.4.0.106"})
        found = probe.state("onnxruntime-tensorrt")
        assert found.reason == "TensorRT 10 is not installed"
        assert found.command == 'pip install "epsrt[gpu]" "tensorrt>=10.16,<11"'
        assert found.library == "onnxruntime-gpu 1.31.1"

    @pytest.mark.parametrize(
        ("name", "extra"), [("onnxruntime", "cpu"), ("onnxruntime-cuda", "gpu"), ("onnxruntime-tensorrt", "gpu")]
    )
    def test_both_onnxruntimes(self, machine, name, extra):
        machine(ALL | {"onnxruntime": "1.31.0"})
        found = probe.state(name)
        assert (
            found.reason == "onnxruntime 1.31.0 and onnxruntime-gpu 1.31.1 are both installed and overwrite each other"
        )
        assert found.command == f'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "epsrt[{extra}]"'
        assert list(probe.available()) == ["tensorrt", "openvino"]
        assert probe.both_onnxruntimes().startswith(f"{found.reason}: pip uninstall -y")

    @pytest.mark.parametrize("apart", [True, False])
    def test_onnxruntimes_in_folders_apart_do_not_meet(self, tmp_path, monkeypatch, apart):
        """As where one folder is on PYTHONPATH: each of the two has its own files."""
        for name, folder in (("onnxruntime", "a"), ("onnxruntime-gpu", "b" if apart else "a")):
            facts = tmp_path / folder / f"{name.replace('-', '_')}-1.31.1.dist-info"
            facts.mkdir(parents=True)
            (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.31.1\n")
        monkeypatch.setattr(sys, "path", [str(tmp_path / "a"), str(tmp_path / "b")])
        assert probe.installed("onnxruntime") == probe.installed("onnxruntime-gpu") == "1.31.1"
        assert ("overwrite each other" in probe.both_onnxruntimes()) is not apart

    def test_onnxruntime_goes_before_onnxruntime_gpu_comes(self, machine):
        machine({**without("onnxruntime-gpu"), "onnxruntime": "1.31.1"})
        assert probe.both_onnxruntimes() == ""
        assert probe.state("onnxruntime").available
        assert probe.state("onnxruntime-cuda").command == 'pip uninstall -y onnxruntime && pip install "epsrt[gpu]"'

    def test_a_package_whose_files_another_took_along(self, machine):
        machine({"onnxruntime": "1.31.1"}, lost=["onnxruntime"])
        found = probe.state("onnxruntime")
        assert found.reason == "onnxruntime 1.31.1 has lost its files"
        assert found.command == 'pip uninstall -y onnxruntime && pip install "epsrt[cpu]"'
        assert list(probe.available()) == []

    def test_onnxruntime_without_its_metadata(self, machine):
        """In a frozen program, or under another distribution's name."""
        machine({})
        assert probe.state("onnxruntime") == probe.State(True, "onnxruntime", "", "")

    def test_rtx_on_a_gpu_that_it_does_not_support(self, machine):
        machine(ALL)
        found = probe.state("tensorrt-rtx")
        assert found.reason == (
            "GPU 0, NVIDIA H200, is sm_90 and tensorrt-rtx runs on sm_75, sm_80, sm_86, sm_89, sm_120, sm_121 alone: "
            "take engine tensorrt"
        )
        assert (found.available, found.command, found.builds) == (False, "", True)
        machine(ALL | {"tensorrt-rtx-cu13": "1.4.0.76"})
        assert not probe.state("tensorrt-rtx").builds

    def test_a_gpu_that_is_too_old(self, machine):
        machine(ALL, Driver((13, 0), (Gpu(0, "Tesla V100", (7, 0), 16 << 30), L4)))
        for name in ("tensorrt", "onnxruntime-cuda"):
            assert probe.state(name).reason == f"GPU 0, Tesla V100, is sm_70 and {name} runs on sm_75 and newer"
        assert probe.state("tensorrt-rtx").reason.endswith("sm_120, sm_121")  # tensorrt would not do either
        assert list(probe.available()) == ["openvino", "onnxruntime"]

    def test_driver_and_library_are_both_reported(self, machine):
        machine({"onnxruntime": "1.31.1"}, NO_DRIVER)
        found = probe.state("tensorrt")
        assert found.reason == (
            "no NVIDIA driver: libcuda.so.1 was not found; tensorrt, cuda-bindings, nvidia-cuda-nvrtc and filelock are "
            "not installed"
        )
        assert found.command == (
            'install NVIDIA\'s driver 580 or newer (nvidia.com/drivers), then pip install "epsrt[tensorrt]"'
        )
        assert list(probe.available()) == ["onnxruntime"]

    def test_without_a_gpu_nothing_is_to_be_installed(self, machine):
        machine({"onnxruntime": "1.31.1"}, nvidia._no_gpu((13, 0)))
        found = probe.state("tensorrt")
        assert found.reason.startswith("this machine has no NVIDIA GPU; tensorrt, ")
        assert found.command == ""

    @pytest.mark.parametrize(
        ("packages", "gpu", "first"),
        [
            (ALL, H200, "tensorrt"),
            (without("tensorrt", "tensorrt-cu13"), L4, "tensorrt-rtx"),
            (without("tensorrt", "tensorrt-cu13"), H200, "onnxruntime-cuda"),
            (without("cuda-bindings"), H200, "openvino"),
            (without("cuda-bindings", "openvino"), H200, "onnxruntime"),
        ],
    )
    def test_auto(self, machine, packages, gpu, first):
        machine(packages, Driver((13, 0), (gpu,)))
        assert next(probe.available()) == first

    def test_the_driver_is_not_asked_for_libraries_that_are_missing(self, machine, monkeypatch):
        machine({"onnxruntime": "1.31.1"})
        monkeypatch.setattr(probe, "driver", lambda: pytest.fail("asked"))
        assert list(probe.available()) == ["onnxruntime"]


class TestFinding:
    def test_modules(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "hollow").mkdir()  # as an uninstalled package leaves its folder
        assert probe._has_module("epsrt.engines")
        assert probe._has_module("")
        for name in ("hollow", "no_such_module", "no_such.module"):
            assert not probe._has_module(name)
        monkeypatch.setitem(sys.modules, "made_by_hand", ModuleType("made_by_hand"))
        assert probe._has_module("made_by_hand")

    @pytest.mark.parametrize(
        ("name", "below"), [("LD_LIBRARY_PATH", ""), ("CUDA_HOME", "lib64"), ("CONDA_PREFIX", "lib")]
    )
    def test_files_in_folders_of_the_environment(self, tmp_path, monkeypatch, name, below):
        monkeypatch.setenv(name, str(tmp_path))
        assert not probe._has_file("nothing", 10)
        (tmp_path / below).mkdir(exist_ok=True)
        (tmp_path / below / "libnothing.so.10").touch()
        assert probe._has_file("nothing", 10)
        assert not probe._has_file("nothing", 11)

    def test_files_in_tensorrts_package(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "tensorrt_libs").mkdir()
        (tmp_path / "tensorrt_libs" / "__init__.py").touch()
        (tmp_path / "tensorrt_libs" / "libnvinfer.so.10").touch()
        assert probe._has_file("nvinfer", 10)

    def test_files_that_the_loader_knows(self):
        assert probe._has_file("c", 6)
        assert not probe._has_file("c", 7)
