"""epsrt build as its users run it, with the real TensorRT-RTX on a machine that needs no GPU."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import command_line
import pytest

from epsrt.engines import nvidia, probe

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx_cu13")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(*arguments, code=0): the command with a cache of its own, on a machine without an NVIDIA driver."""
    monkeypatch.setenv("EPSRT_CACHE", str(tmp_path / "cache"))
    for module in (nvidia, probe):
        monkeypatch.setattr(module, "driver", partial(nvidia._ask, "/nowhere/libcuda.so.1"))
    return command_line.run


def test_build_says_what_it_made_and_finds_it_again(run: Run, bundle_path: Path) -> None:
    arguments = ("build", bundle_path, "--target", "sm89,sm_120", "--batch", "1", "--batch", "2:4:8")
    done = run(*arguments, "--json")
    assert "no engine file of tiny.epsrt for tensorrt-rtx was built yet: building it" in done.stderr
    facts = json.loads(done.stdout)
    assert facts["engine"].startswith("tensorrt-rtx 1.")
    assert (facts["for"], facts["graph"], facts["batches"]) == ("sm_89, sm_120", "step-fp16.tensorrt.onnx", "1, 2:4:8")
    assert facts["built_now"] is True
    assert facts["layers"] > 50
    assert Path(facts["engine_file"]).stat().st_size == facts["bytes"] > 100_000
    again = run(*arguments)
    for word in ("Engine file of", "none now: it was built", "sm_89, sm_120", "2:4:8", "MiB"):
        assert word in again.stdout
    listed = json.loads(run("cache", "--json").stdout)
    assert [file["path"] for file in listed["engine_files"]] == [facts["engine_file"]]


def test_inspect_prints_the_parsed_network(run: Run, small_bundle_path: Path) -> None:
    layers = json.loads(run("build", small_bundle_path, "--target", "sm86", "--inspect").stdout)["Network"]
    assert {"CONVOLUTION", "NORMALIZATION", "ELEMENTWISE"} <= {layer["type"] for layer in layers}
    outputs = [tensor for layer in layers for tensor in layer["outputs"]]
    assert {"name": "x_next", "type": "FLOAT", "shape": [-1, 1, 8, 8]} in outputs


def test_ship_puts_the_plan_beside_the_bundle(run: Run, small_bundle_path: Path, copy_of) -> None:
    bundle = copy_of(small_bundle_path)
    done = run("build", bundle, "--target", "sm89", "--ship", "--json")
    file = Path(json.loads(done.stdout)["engine_file"])
    assert file.parent == bundle / "engines"
    assert file.is_file()
    assert run("inspect", bundle).stdout  # it is still that bundle
    sentence = run("sample", bundle, "--engine", "tensorrt-rtx", "--out", bundle.parent / "x.npz", code=1).stderr
    assert "no NVIDIA driver" in sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--engine", "tensorrt-rtx"), "or name what to build for, e.g. --target sm89,sm120"),
        (("--engine", "tensorrt-rtx", "--target", "sm_90"), "or engine tensorrt, which builds on the GPU itself"),
        (
            ("--target", "sm90"),
            "has no target sm_90: use one of sm75, sm80, sm86, sm89, sm120, sm121, or engine tensor",
        ),
        (
            ("--target", "sm89", "--batch", "1:8"),
            "--batch 1:8 is neither a batch, e.g. 8, nor min:opt:max, e.g. 1:8:64",
        ),
        (("--target", "sm89", "--batch", "²"), "--batch ² is neither a batch, e.g. 8, nor min:opt:max"),
        (("--target", "sm89", "--batch", "5"), "batch profile 5 exceeds 4, the largest batch of small.epsrt"),
        (
            ("--target", "sm89", "--batch", "0"),
            "batch profile 0:0:0 does not ascend from 1: give a batch or min:opt:max",
        ),
        (("--target", "sm89", "--batch", "1:2:99"), "batch profile 1:2:99 exceeds 4, the largest batch of small.epsrt"),
        (("--target", "sm89", "--batch", "3:2:4"), "batch profile 3:2:4 does not ascend"),
        (("--target", "sm89", "--precision", "fp16"), "has no fp16 step graph, only fp32"),
        (("--target", "sm89", "--features", "masks"), "--features 'masks' is no feature of a step: did you mean mask"),
        (("--target", "sm89", "--features", "mask,,"), "'' is no feature of a step: use one of guidance, classifier, "),
        (("--target", "sm89", "--features", "thresholding"), "'thresholding' is no feature of a step: use one of guid"),
        (("--target", "sm89", "--features", "mask"), "small.epsrt has no step graph with mask: export it again with"),
        (("--target", "sm89", "--features", "guidance"), "small.epsrt has no null label, so guidance has nothing to"),
        (("--target", "sm89", "--level", "7"), "optimisation level 7 is outside 0 … 5"),
        (("--target", "sm89", "--workspace", "0"), "--workspace 0 MiB: give at least 1"),
        (("--target", "sm89", "--hardware-compatible", "all"), "use none, ampere+, same-capability"),
        (("--target", "sm89", "--stripped"), "builds refittable and weight-stripped engine files on a GPU alone"),
        (("--engine", "onnxruntime"), "engine onnxruntime is not built ahead: use tensorrt or tensorrt-rtx"),
        (("--engine", "openvino"), "small.epsrt --engine openvino"),
    ],
)
def test_refusals(run: Run, small_bundle_path: Path, tmp_path: Path, arguments, sentence: str) -> None:
    done = run("build", small_bundle_path, *arguments, code=1)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("epsrt: ")
    assert sentence in last
    assert not list((tmp_path / "cache").rglob("*.engine"))


def test_without_the_library(run: Run, small_bundle_path: Path) -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        last = run("build", small_bundle_path, "--engine", "tensorrt", code=1).stderr.strip()
        assert "engine tensorrt needs its library" in last
        assert 'pip install "epsrt[tensorrt]"' in last
    else:
        pytest.skip("tensorrt is installed")


def test_sizes_are_those_of_the_profiles(run: Run, sized_bundle_path: Path, small_bundle_path: Path) -> None:
    facts = json.loads(run("build", sized_bundle_path, "--target", "sm89", "--json").stdout)
    assert (facts["sizes"], facts["batches"]) == ("4x4:8x8:24x24", "1, 4")
    assert "sizes" not in json.loads(run("build", small_bundle_path, "--target", "sm89", "--json").stdout)


@pytest.mark.parametrize(("part", "sizes"), [("decode", "4x4:8x8:16x16"), ("encode", "8x8:16x16:32x32")])
def test_parts(run: Run, latent_bundle_path: Path, part: str, sizes: str) -> None:
    arguments = ("build", latent_bundle_path, "--target", "sm89", "--part", part)
    facts = json.loads(run(*arguments, "--batch", "2", "--json").stdout)
    assert (facts["graph"], facts["batches"], facts["sizes"]) == (f"{part}-fp32.onnx", "2", sizes)
    sentence = run(*arguments, "--features", "mask", code=1).stderr
    assert f"--part {part} has no features and no dialects: leave --features and --plain out" in sentence


def test_features_choose_the_graph(run: Run, edited_bundle_path: Path) -> None:
    arguments = ("build", edited_bundle_path, "--target", "sm89", "--precision", "fp32")
    for given, graph in (
        ((), "step-fp32.tensorrt.onnx"),
        (("--features", "guidance"), "step-guidance-fp32.tensorrt.onnx"),
        (("--features", "mask, guidance"), "step-guidance-mask-fp32.tensorrt.onnx"),
        (("--features", "guidance", "--features", "mask"), "step-guidance-mask-fp32.tensorrt.onnx"),
        (("--features", "classifier"), "step-classifier-fp32.tensorrt.onnx"),
    ):
        assert json.loads(run(*arguments, *given, "--json").stdout)["graph"] == graph
    assert len(json.loads(run("cache", "--json").stdout)["engine_files"]) == 4
    layers = json.loads(run(*arguments, "--features", "mask", "--inspect").stdout)["Network"]
    plain = json.loads(run(*arguments, "--inspect").stdout)["Network"]
    assert len(layers) > len(plain)
