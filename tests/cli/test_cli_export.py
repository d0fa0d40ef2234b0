"""epsrt export's thresholding, and what epsrt inspect says of a bundle's options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from epsrt import Bundle
from epsrt.bundle import Thresholding

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
