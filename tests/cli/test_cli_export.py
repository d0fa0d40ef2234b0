"""epsrt export's thresholding and sizes, and what epsrt inspect says of a bundle's options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from epsrt import Bundle
from epsrt.bundle import Sizes, Thresholding

EPSRT = str(Path(sys.executable).with_name("epsrt"))


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [EPSRT, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, check=False
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_a_thresholded_bundle(checkpoint_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "some.epsrt"
    options = ("--threshold-ratio", 0.995, "--threshold-max", 1.5, "--precision", "fp32", "--max-batch", 2, "--json")
    done = run("export", checkpoint_path, out, *options)
    made = Bundle.open(out)
    assert json.loads(done.stdout)["digest"] == made.manifest.digest
    assert made.manifest.thresholding == Thresholding(0.995, 1.5)
    assert made.graph("fp32").features == ("thresholding",)


def test_thresholding_takes_both_numbers(checkpoint_path: Path, tmp_path: Path) -> None:
    for option, value in (("--threshold-ratio", 0.995), ("--threshold-max", 1.5)):
        done = run("export", checkpoint_path, tmp_path / "some.epsrt", option, value, code=1)
        assert "epsrt: dynamic thresholding has two numbers: give both --threshold-ratio and --threshold" in done.stderr
    done = run("export", checkpoint_path, tmp_path / "s", "--threshold-ratio", 99.5, "--threshold-max", 1.5, code=1)
    assert "epsrt: thresholding ratio = 99.5 is outside (0, 1]" in done.stderr
    assert os.listdir(tmp_path) == []


def test_inspect_shows_them(learned_bundle_path: Path, small_bundle_path: Path) -> None:
    text = run("inspect", learned_bundle_path).stdout
    for words in (
        "epsilon, and log σ² as a fraction from log β̃ to log β", "by the 0.9 quantile of |x0|, at most 1.5 × the",
        "learned variance, thresholding", "variance",
    ):  # fmt: skip
        assert words in text
    plain = run("inspect", small_bundle_path).stdout
    assert "quantile" not in plain
    assert "log σ²" not in plain


def test_sizes(tmp_path: Path) -> None:
    """Exported, shown, sampled at another size, verified; and what is refused."""
    from epsrt import Schedule
    from epsrt_trainer.checkpoint import save_checkpoint
    from helpers import unet

    network, out, images = unet(channels=3), tmp_path / "some.epsrt", tmp_path / "wide.npz"
    checkpoint = save_checkpoint(tmp_path / "some.safetensors", network, network.config, Schedule(T=20, beta_end=0.2))
    run("export", checkpoint, out, "--sizes", "2:24", "--precision", "fp32", "--max-batch", 2)
    assert Bundle.open(out).manifest.sizes == Sizes(2, 24)
    assert "height and width: multiples of 2 up to 24" in run("inspect", out).stdout
    options = ("--engine", "onnxruntime", "--steps", 5, "-n", 3, "--out", images)
    report = json.loads(run("sample", out, "--size", "10x16", *options, "--json").stdout)
    assert report["size"] == [10, 16]
    with np.load(images) as kept:
        assert (kept["samples"].shape, kept["images"].shape) == ((3, 3, 10, 16), (3, 10, 16, 3))
    assert "sizes" in run("verify", out, "--engine", "onnxruntime").stdout
    for size, words in (
        ("10x15", "a size of 10 × 15 is none of some.epsrt: height and width are multiples of 2 up to 24"),
        ("26x8", "a size of 26 × 8 is none of some.epsrt"),
        ("10", "--size '10' is not HEIGHTxWIDTH, such as 16x24"),
    ):
        assert f"epsrt: {words}" in run("sample", out, "--size", size, *options, code=1).stderr
    done = run("export", checkpoint, tmp_path / "other.epsrt", "--sizes", "8x24", code=1)
    assert "epsrt: --sizes '8x24' is not MULTIPLE:LARGEST, such as 8:64" in done.stderr
    done = run("export", checkpoint, tmp_path / "other.epsrt", "--sizes", "1:24", "--max-batch", 2, code=1)
    assert "epsrt: UNet does not take multiples of 1 pixels, but of 2" in done.stderr
    assert not (tmp_path / "other.epsrt").exists()
