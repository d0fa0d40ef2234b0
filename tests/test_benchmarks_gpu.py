"""benchmarks/gpu*.py: what is kept, when they stop, their arithmetic, and all of it once on the stand-in driver."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from epsrt import Bundle, Sampler
from epsrt.bench import isolated
from epsrt.parity.measure import worst_psnr
from gpu.stand_in.build import NoCompiler, build, environment  # here: later, benchmarks/gpu.py would hide it
from nets import tiny

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "runtime/epsrt/engines/gpu/kernels.cu"]
MINUTES = 1.0


@pytest.fixture(autouse=True, scope="module")
def benchmarks() -> Iterator[None]:
    """benchmarks/ on the path, as for its scripts."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


# A case: what it is told to do, and a result that counts its runs.
CASES = """
import os, pathlib, signal, sys, time
def case(key):
    with open("runs", "a") as file: file.write(key["do"] + " ")
    print("the last words")
    if key["do"] == "die": os.kill(os.getpid(), signal.SIGSEGV)
    if key["do"] == "exit": sys.exit(3)
    if key["do"] == "fail": raise ValueError("no")
    if key["do"] == "sleep":
        try: time.sleep(60)
        except KeyboardInterrupt: pathlib.Path("cleaned").touch(); raise
    if key["do"] == "linger":
        import atexit
        atexit.register(time.sleep, 60)
    return {"value": key["rounds"]}

def timing(key):
    from epsrt.bench import isolated
    time.sleep(0.2)
    isolated.say("timing")
    time.sleep(0.3)
    return {}
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module CASES."""
    folder = tmp_path_factory.mktemp("cases")
    (folder / "made_up_cases.py").write_text(CASES)
    sys.path.insert(0, str(folder))
    import made_up_cases

    yield made_up_cases
    sys.path.remove(str(folder))


@pytest.fixture
def part(cases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """part(**options) is a Part with one case; `runs()` are those that ran."""
    import gpu_cases

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_cases, "machine", lambda: {"gpu": {"name": "one"}, "cores": 2})
    monkeypatch.setattr(gpu_cases, "LEAST", 0.5)
    known = {"x": cases.case}
    return lambda minutes=MINUTES, **more: gpu_cases.Part("test", known, tmp_path, minutes, 7, **more)


def runs() -> list[str]:
    return Path("runs").read_text().split() if Path("runs").exists() else []


def test_a_row_is_measured_once(part) -> None:
    first = part()
    row = first.case("x", "digest", {"given": 1}, do="work", batch=1)
    assert (row["value"], row["what"], row["batch"], row["digest"], "given" in row) == (7, "x", 1, "digest", False)
    again = part()
    assert again.case("x", "digest", do="work", batch=1) == row
    assert runs() == ["work"]
    again.case("x", "digest", do="work", batch=2)
    again.case("x", "another", do="work", batch=1)  # of the same network exported anew: it takes the old one's place
    assert len(runs()) == 3
    kept = json.loads(Path("gpu-test.json").read_text())
    assert [(r["batch"], r["digest"]) for r in kept["rows"]] == [(1, "another"), (2, "digest")]
    assert (kept["benchmark"], kept["machine"]["cores"]) == ("gpu-test", 2)
    part(fresh=True).case("x", "another", do="work", batch=1)
    assert len(runs()) == 4


def test_a_failure_is_a_row(part) -> None:
    for do, want in (
        ("fail", "ValueError: no"),
        ("die", "its process ended with SIGSEGV: the last words"),
        ("exit", "status 3"),
    ):
        row = part().case("x", do=do)
        assert want in row["error"]
        assert part().case("x", do=do) == row
    assert runs() == ["fail", "die", "exit"]
    last = part(retry=True)
    last.case("x", do="fail")
    assert runs() == ["fail", "die", "exit", "fail"]
    assert "x: ValueError: no" in last.summary()


def test_another_machines_rows_are_put_aside(part, monkeypatch, capsys) -> None:
    import gpu_cases

    part().case("x", do="work")
    monkeypatch.setattr(gpu_cases, "machine", lambda: {"gpu": {"name": "two"}, "cores": 2})
    other = part()
    assert "gpu name: one, now two" in capsys.readouterr().out
    assert other.rows == []
    assert json.loads(Path("gpu-test-before.json").read_text())["rows"][0]["do"] == "work"


def test_a_damaged_file_is_told_and_left_behind(part, capsys) -> None:
    Path("gpu-test.json").write_text("{")
    assert part().rows == []
    assert "starting over" in capsys.readouterr().out


def test_what_the_budget_does_not_reach_is_left(part, monkeypatch) -> None:
    import gpu_cases

    monkeypatch.setattr(gpu_cases, "MARGIN", 0.0)
    spent = part(minutes=0.0)
    assert spent.case("x", do="work", batch=8) is None
    assert "left for another run (1): x 8" in spent.summary()
    begin = time.monotonic()
    short = part(minutes=3 / 60)  # enough for its Python to start on a busy machine
    assert short.case("x", do="sleep") is None
    assert time.monotonic() - begin < 30
    assert "takes more than" in short.summary()
    assert Path("cleaned").exists()  # it was asked to end before it was made to
    assert part().rows == []


def test_a_result_counts_though_its_process_stays(part, monkeypatch) -> None:
    monkeypatch.setattr(isolated, "LINGER_S", 0.2)
    begin = time.monotonic()
    assert part().case("x", do="linger")["value"] == 7
    assert time.monotonic() - begin < 10


def test_memory_is_watched_until_the_case_times(cases, tmp_path, monkeypatch) -> None:
    import gpu_cases

    monkeypatch.chdir(tmp_path)
    free = iter([100 << 20, *[90 << 20, 40 << 20, 70 << 20] * 4, *[60 << 20] * 1000])
    seen: list[int] = []

    def told() -> int:
        seen.append(next(free))
        return seen[-1]

    assert gpu_cases.run_case(cases.timing, {}, 20, told) == {"peak_mib": 60}
    before = len(seen)
    assert before > 4
    assert gpu_cases.run_case(cases.timing, {}, 20, None) == {}


def test_arithmetic() -> None:
    from gpu_cases import align, difference
    from gpu_speed import rate
    from gpu_timing import median_ratio, rounds, spread

    assert spread([3.0, 1.0, 2.0]) == {"p50": 2.0, "p95": 2.9, "n": 3}
    assert median_ratio([100, 303, 100], [1, 3, 2], 50) == 2.0
    assert rate(2 * 8192**3, 1.0) == pytest.approx(1099.5, abs=0.1)  # TFLOP/s
    calls: list[str] = []
    kept = rounds({"a": lambda: calls.append("a") or 1, "b": lambda: calls.append("b") or 2}, 3)
    assert kept == {"a": [1, 1, 1], "b": [2, 2, 2]}
    assert calls[-6:] == ["a", "b", "b", "a", "a", "b"]
    assert len(calls) >= 10  # two to warm up, at least
    assert len(rounds({"a": lambda: 1}, 20, least=4, seconds=0)["a"]) == 4
    assert align("a|n|last", [["xx", "1", "y"], ["z", "22", "q"]], 1) == ["a    n  last", "xx   1  y", "z   22  q"]
    assert difference({"a": 1, "v": {"t": 1}}, {"a": 1, "v": {"t": 2, "u": 3}}) == "v t: 1, now 2; v u: None, now 3"


def test_nvidia_smi(tmp_path, monkeypatch) -> None:
    from epsrt import machine

    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.nvidia_smi("clocks.sm") == {}
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\necho "1980, [N/A], 580.159.03"\n')
    script.chmod(0o755)
    assert machine.nvidia_smi("clocks.sm", "power.draw", "driver_version") == {
        "clocks.sm": 1980.0,
        "driver_version": "580.159.03",
    }
    assert machine.nvidia_smi("clocks.sm") == {}  # another number of answers


def test_the_plain_loop_is_our_ddim(small_bundle_path) -> None:
    """The rivals draw the very samples that we draw, so that a race is of like with like."""
    gpu_torch = pytest.importorskip("gpu_torch")
    import torch

    bundle = Bundle.open(small_bundle_path)
    with Sampler.open(small_bundle_path, "onnxruntime") as sampler:
        want = sampler.sample(3, steps=20, seed=gpu_torch.SEED)
    x_T = gpu_torch.start(3, bundle.manifest.shape)
    for channels_last in (False, True):
        draw = gpu_torch.eager(
            tiny(seed=3), bundle.manifest.schedule, x_T, channels_last=channels_last, device="cpu", dtype=torch.float32
        )
        assert worst_psnr(draw(20), want, bundle.manifest.value_range) >= 90


FAKE_ONNXRUNTIME = """
import sys
sys.path.append({fake!r})
import fake_onnxruntime
sys.modules["onnxruntime"] = fake_onnxruntime
fake_onnxruntime.OPTIONS[fake_onnxruntime.CUDA].add("fuse_conv_bias")
"""


@pytest.fixture(scope="module")
def on_gpu(small_bundle_path, tmp_path_factory) -> Callable[..., str]:
    """on_gpu(arguments …) runs Python on the stand-in, with a pretended TensorRT, in a folder: what it printed."""
    pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")
    folder = tmp_path_factory.mktemp("gpu")
    try:
        library = build(folder / "driver", SOURCES)
    except NoCompiler as error:
        pytest.skip(str(error))
    shutil.copytree(small_bundle_path, folder / "out/bench/small-256-fp32.epsrt")
    package, facts = folder / "packages/tensorrt", folder / "packages/tensorrt-11.4.0.dist-info"
    package.mkdir(parents=True)
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt\nVersion: 11.4.0\n")
    fake = ROOT / "tests/gpu"
    (package / "__init__.py").write_text(
        f"import sys\nsys.path.append({str(fake)!r})\nimport fake_tensorrt\nsys.modules[__name__] = fake_tensorrt\n"
    )
    (package.parent / "torch.py").write_text('raise ImportError("no torch in this test")\n')  # a second each
    sources = [str(ROOT / source) for source in ("runtime", "export", "trainer", "command", "benchmarks")]
    env = environment(library.parent, capability="9.0", name="NVIDIA Pretended") | {
        "PYTHONPATH": os.pathsep.join([str(package.parent), *sources]),
        "EPSRT_CACHE": str(folder / "cache"),
    }

    fakes = folder / "fakes"  # for those who ask for them by their name on the path
    fakes.mkdir()
    (fakes / "sitecustomize.py").write_text(FAKE_ONNXRUNTIME.format(fake=str(fake)))

    def run(*arguments: object, pretend_onnxruntime: bool = False) -> str:
        path = os.pathsep.join([*([str(fakes)] if pretend_onnxruntime else []), env["PYTHONPATH"]])
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=folder,
            env={**os.environ, **env, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def on_part(on_gpu, tmp_path_factory) -> Callable[[str], tuple[str, dict[str, Any]]]:
    """on_part(name) runs a part of the benchmarks: what it printed, and its file."""
    results = tmp_path_factory.mktemp("results")

    def run(part: str) -> tuple[str, dict[str, Any]]:
        options = ("--networks", "small", "--batches", "2,99", "--rounds", "1", "--results", results)
        said = on_gpu(ROOT / "benchmarks/gpu.py", part, *options)
        return said, json.loads((results / f"gpu-{part}.json").read_text())

    return run


def test_parity_on_the_stand_in(on_part) -> None:
    said, kept = on_part("parity")
    rows = {(r["what"], r["engine"]): r for r in kept["rows"]}
    assert rows["verify", "tensorrt"]["passed"], said
    assert {r["name"] for r in rows["verify", "tensorrt"]["rungs"]} >= {"network", "step", "ddim-50", "batch"}
    assert rows["verify", "onnxruntime"]["from"] == "the export"
    assert "is not installed" in rows["engine", "onnxruntime-cuda"]["error"]
    assert "error" in rows["engine", "tensorrt-rtx"]  # not for sm_90, or not installed
    assert kept["machine"]["gpu"]["name"] == "NVIDIA Pretended"
    assert "left" not in said
    again, after = on_part("parity")
    assert "…" not in again  # nothing is measured twice
    assert after["rows"] == kept["rows"]


def test_speed_on_the_stand_in(on_part) -> None:
    said, kept = on_part("speed")
    rows = {r["what"]: r for r in kept["rows"]}
    assert "error" not in rows["step"], said
    assert (rows["step"]["batch"], rows["step"]["graphs"], rows["step"]["chunk"]) == (2, "ours", 10)
    for method in ("ddim", "ddpm"):
        assert rows["step"][method]["device_ms"]["n"] == 1
        assert rows["step"][method]["wall_ratio"] >= rows["step"][method]["ratio"] > 0
    assert set(rows["step"]["bare_ms_by_steps_in_graph"]) == {"10", "50"}
    assert rows["step"]["kernels"]["noise"]["us"] > 0
    assert "peak_mib" not in rows["step"]  # each process on the stand-in has a memory of its own
    assert set(rows["chunk"]["chunks"]) == {"1", "2", "5", "10", "25", "50"}
    assert "no torch in this test" in rows["matmul"]["error"]
    assert "flops" not in rows  # not counted: it is nobody's preset
    assert "tflops" not in rows["step"]
    assert "targets" in said


ENGINES = """
import sys
sys.path[:0] = sys.argv[1:3]
import fake_onnxruntime, fake_tensorrt
sys.modules["onnxruntime"] = fake_onnxruntime
import gpu_rivals, gpu_speed
from epsrt import EngineError

key = {"network": "small", "precision": "fp32", "batch": 3, "rounds": 2, "gflop": 1.0, "matmul": 100.0}
row = gpu_speed.measure({**key, "engine": "onnxruntime-cuda"})
assert (row["graphs"], row["bare_steps_in_graph"]) == ("the engine's own", "alone"), row
assert row["tflops"] > 0 and "share_of_matmul" not in row, row  # FP32 is not held against FP16's product
try:
    gpu_speed.chunks({**key, "engine": "onnxruntime-cuda"})
except EngineError as error:
    assert "captures its steps by itself" in str(error)
fake_tensorrt.knobs["fail_in_capture"] = True
row = gpu_speed.measure({**key, "engine": "tensorrt"})
assert (row["graphs"], row["bare_steps_in_graph"]) == ("none", "alone"), row
"""


def test_timing_engines_that_we_do_not_capture(on_gpu) -> None:
    """onnxruntime captures its steps by itself; and what CUDA refuses to capture runs step by step."""
    on_gpu("-c", ENGINES, ROOT / "benchmarks", ROOT / "tests/gpu")


def quick(on_gpu: Callable[..., str], out: Path, *more: object) -> list[dict[str, Any]]:
    """The rows of benchmarks/gpu_quick.py with small sizes."""
    given = ("--digits", "out/bench/small-256-fp32.epsrt", "--network", "small", "--small", "--state", out / "state")
    on_gpu(ROOT / "benchmarks/gpu_quick.py", "--out", out, *given, *more, pretend_onnxruntime=True)
    return json.loads((out / "gpu.json").read_text())


def test_the_quick_measurement_on_the_stand_in(on_gpu, tmp_path) -> None:
    rows = quick(on_gpu, tmp_path, "--seconds", "300", "--parts", "kernels,digits,variants,race,parity,more")
    assert all(row["passed"] for row in rows if "passed" in row), rows
    by_part = {row["part"]: {r["what"] for r in rows if r["part"] == row["part"] and "error" not in r} for row in rows}
    assert by_part["kernels"] >= {"device", "noise", "noise kernel", "host time of a launch", "check kernel", "copy"}
    assert by_part["digits"] == {"providers", "layout", "rung", "verify", "samples", "step"}
    assert by_part["variants"] == {"fuse", "layout", "step"}  # whose fused graphs onnxruntime's CPU cannot run
    assert by_part["parity"] == {"rung", "verify"}
    assert "race" not in by_part["race"]  # there is no torch in this test
    layouts = [(r["nhwc"], r["options"]) for r in rows if r["part"] == "variants" and r["what"] == "layout"]
    assert layouts[:3] == [(False, {}), (True, {}), (True, {"fuse_conv_bias": "1"})]
    assert {r["precision"] for r in rows if r["what"] == "verify"} == {"fp32"}
    errors = {(r["part"], r["what"]): r["error"] for r in rows if "error" in r}
    assert "fp16" in errors["digits", "digits"]  # the bundle has none
    assert "no torch in this test" in errors["race", "race"]


def test_fused_group_norms_compute_what_the_exported_do() -> None:
    """onnxruntime's operator runs on GPUs alone: here it is NumPy's."""
    from group_norm import fuse

    class GroupNorm(OpRun):
        op_domain = "com.microsoft"

        def _run(self, x, scale, bias, groups, activation, epsilon, channels_last):
            assert channels_last
            apart = x.reshape(len(x), -1, groups, x.shape[-1] // groups).astype(np.float64)
            mean, variance = apart.mean((1, 3), keepdims=True), apart.var((1, 3), keepdims=True)
            y = ((apart - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * scale + bias
            return ((y / (1 + np.exp(-y)) if activation else y).astype(x.dtype),)

    bundle = Bundle.open(ROOT / "examples/digits.epsrt")
    path = bundle.path / bundle.graph("fp32").file
    model = onnx.load(path)
    before = ReferenceEvaluator(model)
    rng = np.random.default_rng(0)
    given = {}
    for name, kind in ((i.name, i.type.tensor_type) for i in model.graph.input):
        size = [d.dim_value or 2 for d in kind.shape.dim]
        given[name] = rng.random(size, np.float32) if kind.elem_type == TensorProto.FLOAT else np.ones(size, np.int64)
    want = before.run(None, given)
    norms, with_silu = fuse(model)
    assert norms >= with_silu > 0
    assert {n.op_type for n in model.graph.node} & {"InstanceNormalization", "GroupNorm"} == {"GroupNorm"}
    got = ReferenceEvaluator(model, new_ops=[GroupNorm]).run(None, given)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_part_that_hangs_or_dies_costs_its_own_share(tmp_path, monkeypatch, capsys) -> None:
    import gpu_quick

    (tmp_path / "bad_parts.py").write_text(
        "import os, time\nfrom epsrt.bench import isolated\n"
        "def hangs(given):\n    isolated.say({'what': 'figure', 'value': 1})\n    time.sleep(60)\n"
        "def dies(given):\n    isolated.say({'what': 'figure', 'value': 2})\n    os.abort()\n"
        "def works(given):\n    isolated.say({'what': 'figure', 'value': given['value']})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import bad_parts

    parts = {name: (getattr(bad_parts, name), 3.0, False) for name in ("hangs", "dies", "works")}
    monkeypatch.setattr(gpu_quick, "PARTS", parts)
    rows = gpu_quick.Rows(tmp_path / "gpu.json")
    gpu_quick.run(rows, {"value": 3}, list(parts), 100.0, tmp_path / "log", None)
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert [(r["part"], r["what"]) for r in kept] == [
        ("hangs", "figure"), ("hangs", "cut off"), ("dies", "figure"), ("dies", "died"), ("works", "figure"),
    ]  # fmt: skip
    assert "SIGABRT" in kept[3]["error"]
    assert [r["value"] for r in kept if r["what"] == "figure"] == [1, 2, 3]
    gpu_quick.run(rows, {"value": 4}, ["works"], 0.0, tmp_path / "log", None)
    assert rows.rows[-1]["what"] == "left"
    assert "cut off" in gpu_quick.summary(rows.rows)


def test_without_a_gpu_it_says_so(tmp_path) -> None:
    from epsrt.engines import nvidia

    if not nvidia.driver().problem:
        pytest.skip("this machine has a GPU")
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "speed", "--results", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0
    assert nvidia.driver().problem in done.stdout
    assert not list(tmp_path.iterdir())
