"""epsrt export's thresholding and sizes, and what epsrt inspect says of a bundle's options."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run

from epsrt import Bundle, Schedule
from epsrt.manifest import Sizes, Thresholding
from epsrt_trainer.checkpoint import save_checkpoint
from epsrt_trainer.classifier import ClassifierConfig, NoisyClassifier
from helpers import forge
from nets import unet


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a random network, which misses FP16's gate."""
    network = unet(channel_multipliers=(1,), attention_resolutions=())
    path = tmp_path_factory.mktemp("checkpoint") / "some.safetensors"
    return save_checkpoint(path, network, network.config, Schedule(T=20, beta_end=0.2))


def test_a_thresholded_bundle(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "some.epsrt"
    options = ("--threshold-ratio", 0.995, "--threshold-max", 1.5, "--precision", "fp32", "--max-batch", 2, "--json")
    done = run("export", checkpoint, out, *options)
    made = Bundle.open(out)
    assert json.loads(done.stdout)["digest"] == made.manifest.digest
    assert made.manifest.thresholding == Thresholding(0.995, 1.5)
    assert made.graph("fp32").features == ("thresholding",)


def test_thresholding_takes_both_numbers(checkpoint: Path, tmp_path: Path) -> None:
    for option, value in (("--threshold-ratio", 0.995), ("--threshold-max", 1.5)):
        done = run("export", checkpoint, tmp_path / "some.epsrt", option, value, code=1)
        assert "epsrt: dynamic thresholding has two numbers: give both --threshold-ratio and --threshold" in done.stderr
    done = run("export", checkpoint, tmp_path / "s", "--threshold-ratio", 99.5, "--threshold-max", 1.5, code=1)
    assert "epsrt: thresholding ratio = 99.5 is outside (0, 1]" in done.stderr
    assert os.listdir(tmp_path) == []


def test_inspect_shows_them(learned_bundle_path: Path, small_bundle_path: Path) -> None:
    text = run("inspect", learned_bundle_path).stdout
    for words in (
        "epsilon, and log σ² as a fraction from log β̃ to log β",
        "by the 0.9 quantile of |x0|, at most 1.5 × the",
        "learned variance, thresholding",
        "variance",
    ):
        assert words in text
    plain = run("inspect", small_bundle_path).stdout
    assert "quantile" not in plain
    assert "log σ²" not in plain


def test_sizes(tmp_path: Path) -> None:
    """Exported, shown, sampled at another size, verified; and what is refused."""
    network, out, images = unet(channels=3), tmp_path / "some.epsrt", tmp_path / "wide.npz"
    checkpoint = save_checkpoint(tmp_path / "some.safetensors", network, network.config, Schedule(T=20, beta_end=0.2))
    run("export", checkpoint, out, "--sizes", "2:24", "--precision", "fp32", "--max-batch", 2)
    assert Bundle.open(out).manifest.sizes == Sizes(2, 24)
    assert "height and width are multiples of 2 up to 24" in run("inspect", out).stdout
    options = ("--engine", "onnxruntime", "--steps", 5, "-n", 3, "--out", images)
    report = json.loads(run("sample", out, "--size", "10x16", *options, "--json").stdout)
    assert report["size"] == [10, 16]
    with np.load(images) as kept:
        assert (kept["samples"].shape, kept["images"].shape) == ((3, 3, 10, 16), (3, 10, 16, 3))
    assert "sizes" in run("verify", out, "--engine", "onnxruntime").stdout
    for size, words in (
        ("10x15", "a size of 10 × 15 is none of some.epsrt: height and width are multiples of 2 up to 24"),
        ("26x8", "a size of 26 × 8 is none of some.epsrt"),
        ("10", "--size '10' is not HEIGHTxWIDTH, such as 8x8, the size of some.epsrt itself"),
        ("10xa", "--size '10xa' is not HEIGHTxWIDTH, such as 8x8, the size of some.epsrt itself"),
        ("8x8x8", "--size '8x8x8' is not HEIGHTxWIDTH, such as 8x8, the size of some.epsrt itself"),
    ):
        assert f"epsrt: {words}" in run("sample", out, "--size", size, *options, code=1).stderr
    assert json.loads(run("sample", out, "--size", "8x8", *options, "--json").stdout)["size"] == [8, 8]  # as they say
    done = run("export", checkpoint, tmp_path / "other.epsrt", "--sizes", "8x24", code=1)
    assert "epsrt: --sizes '8x24' is not MULTIPLE:LARGEST, such as 8:64" in done.stderr
    done = run("export", checkpoint, tmp_path / "other.epsrt", "--sizes", "1:24", "--max-batch", 2, code=1)
    assert "epsrt: UNet does not take multiples of 1 pixels, but of 2" in done.stderr
    assert not (tmp_path / "other.epsrt").exists()


def test_masked_and_by_a_classifier(tmp_path: Path) -> None:
    """Exported from the two checkpoints, shown, and sampled by both."""
    small = {"channel_multipliers": (1,), "attention_resolutions": ()}
    schedule, out = Schedule(T=20, beta_end=0.2), tmp_path / "some.epsrt"
    size = {"image_channels": 1, "image_size": 8, "base_channels": 16, "groups": 8, "residual_blocks": 1}
    network = unet(seed=8, **small)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = NoisyClassifier(ClassifierConfig(classes=3, **size, **small))
        torch.nn.init.normal_(judge.head.weight)  # zero at first: no gradient at all
    checkpoint = save_checkpoint(tmp_path / "network.safetensors", network, network.config, schedule)
    path = save_checkpoint(tmp_path / "judge.safetensors", judge, judge.config, schedule, class_names=("a", "b", "c"))
    options = ("--precision", "fp32", "--max-batch", 2)
    run("export", checkpoint, out, "--masked", "--classifier", path, *options)
    m = Bundle.open(out).manifest
    assert [g.stem for g in m.graphs] == ["", "classifier", "mask", "classifier-mask"]
    assert m.classifier is not None
    text = run("inspect", out).stdout
    for words in (
        f"NoisyClassifier, 3 classes (a, b, c), {sum(p.numel() for p in judge.parameters()):,} parameters",
        "judge.safetensors",
        m.classifier.source_sha256,
        "classifier, mask",
        "… s j ka kb",
        "step-mask-fp32.onnx",
    ):
        assert words in text
    np.savez(tmp_path / "known.npz", samples=np.zeros((1, 1, 8, 8), np.float32))
    ask = ("--steps", 4, "--known", tmp_path / "known.npz", "--mask", ":4,:", "--classifier", 50)
    found = {}
    for option, name in (("--labels", "b"), ("--targets", "b"), ("--targets", "c")):  # of such a network the same
        run("sample", out, *ask, option, name, "--out", tmp_path / "a.npz")
        with np.load(tmp_path / "a.npz") as kept:
            assert not kept["samples"][:, :, :4].any()
            assert kept["target"].tolist() == ["abc".index(name)]
            found[option, name] = kept["samples"]
    np.testing.assert_array_equal(found["--labels", "b"], found["--targets", "b"])
    assert np.abs(found["--targets", "b"] - found["--targets", "c"]).max() > 1e-3
    done = run("export", checkpoint, tmp_path / "b.epsrt", "--classifier", checkpoint, *options, code=1)
    assert "not a classifier" in done.stderr
    assert not (tmp_path / "b.epsrt").exists()


def test_inspect_shows_the_owners_guidance(bundle_path: Path, copy_of: Callable[[Path], Path], tmp_path: Path) -> None:
    """And a label is guided by it, unless the caller says otherwise."""
    path = copy_of(bundle_path)
    forge(path, lambda manifest: manifest["sampling"].update(guidance=3.5))
    assert "guidance 3.5 where there is a label" in run("inspect", path).stdout
    assert "where there is a label" not in run("inspect", bundle_path).stdout
    for options, weight in (((), 1.0), (("--labels", 1), 3.5), (("--labels", 1, "--guidance", 1), 1.0)):
        done = run("sample", path, "--steps", 3, "-n", 2, *options, "--out", tmp_path / "a.png", "--json")
        assert json.loads(done.stdout)["guidance"] == weight
    np.savez(tmp_path / "init.npz", samples=np.zeros((1, 1, 8, 8), np.float32))
    ask = ("invert", path, "--init", tmp_path / "init.npz", "--labels", 1, "--out", tmp_path / "a.npz")
    assert "--steps 50 --guidance 1" in run(*ask).stdout  # to draw them as they were inverted


def test_fp16_that_misses_the_gate(checkpoint: Path, tmp_path: Path) -> None:
    """It is left out with a sentence, and refused where it was asked for; FP32 alone is exported without a word."""
    options = (checkpoint, tmp_path / "some.epsrt", "--max-batch", 2)
    said = [line for line in run("export", *options).stderr.splitlines() if not line.endswith("…")]
    (sentence,) = said
    assert sentence.startswith("some.epsrt is written without fp16: network in fp16 on onnxruntime is 0.00")
    assert sentence.endswith('; to leave it out from the start, give --precision fp32 (precisions=["fp32"])')
    assert {graph.precision for graph in Bundle.open(tmp_path / "some.epsrt").manifest.graphs} == {"fp32"}
    refused = run("export", checkpoint, tmp_path / "other.epsrt", "--max-batch", 2, "--precision", "fp16", code=1)
    assert "epsrt: parity missed: network in fp16 on onnxruntime is 0.00" in refused.stderr
    assert not (tmp_path / "other.epsrt").exists()
    told = run("export", *options, "--precision", "fp32").stderr
    assert all(line.endswith("…") for line in told.splitlines())
