"""benchmarks/gpu_quick.py once on the stand-in driver, with small sizes: each part as far as that goes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpu.stand_in.build import environment

ROOT = Path(__file__).parents[2]
FAKES = """
import sys
sys.path.append({fakes!r})
import fake_onnxruntime, fake_tensorrt
sys.modules["onnxruntime"], sys.modules["tensorrt"] = fake_onnxruntime, fake_tensorrt
"""
NAMES = "kernels,digits,variants,ceiling,race,compiled,parity,more,engines"


@pytest.fixture
def measured(stand_in, bundle_path, tmp_path):
    """measured() runs gpu_quick.py: what it printed, and its file."""
    packages = tmp_path / "packages"
    facts = packages / "tensorrt-11.4.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt\nVersion: 11.4.0\n")
    (packages / "sitecustomize.py").write_text(FAKES.format(fakes=str(ROOT / "tests/gpu")))
    (packages / "torch.py").write_text('raise ImportError("no torch in this test")\n')  # a second each
    shutil.copytree(bundle_path, tmp_path / "network.epsrt")
    sources = [str(ROOT / source) for source in ("runtime", "export", "trainer", "command")]
    env = environment(stand_in, capability="9.0", name="NVIDIA Pretended") | {
        "PYTHONPATH": os.pathsep.join([str(packages), *sources]),
        "EPSRT_CACHE": str(tmp_path / "cache"),
    }
    bundles = ("--digits", "network.epsrt", "--network", "network.epsrt")
    given = (*bundles, "--small", "--seconds", "500", "--parts", NAMES, "--out", "results")
    command = [sys.executable, str(ROOT / "benchmarks/gpu_quick.py"), *given]

    def run() -> tuple[str, dict[str, Any]]:
        env_of_all = {**os.environ, **env}
        done = subprocess.run(command, cwd=tmp_path, env=env_of_all, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, json.loads((tmp_path / "results/gpu-pretended.json").read_text())

    return run


@pytest.mark.slow
def test_all_of_it(measured) -> None:
    said, made = measured()
    rows = made["rows"]
    assert made["machine"]["gpu"]["name"] == "NVIDIA Pretended"
    assert all(row["passed"] for row in rows if "passed" in row), said
    failed = {row["what"]: row["error"] for row in rows if "error" in row}
    assert set(failed) == {"library", "matmul"}, failed  # there is no such library, nor torch
    assert "no torch in this test" in failed["matmul"]
    assert "race: ImportError: no torch in this test" in said
    alone = {"device", "noise", "noise kernel", "host time of a launch", "check kernel", "copy", "kernels"}
    assert {row["what"] for row in rows} >= alone
    parity = {(r["network"], r["precision"], r["variant"]) for r in rows if r["what"] == "verify"}
    ours = ("cuda NHWC fused bias", "cpu NCHW")
    assert parity >= {(n, p, v) for n in ("digits", "network") for p in ("fp16", "fp32") for v in ours}
    assert ("digits", "fp16", "tensorrt") in parity
    variants = {row["variant"]: row for row in rows if row["what"] == "variant"}
    assert len(variants) == 12
    for name, row in variants.items():
        assert row["steps_in_graph"] == ("alone" if "onnxruntime's graphs" in name else "10")
        assert row["bare_ms"]["p50"] > 0
        assert row["ddim"]["wall_ratio"] >= row["ddim"]["ratio"] > 0
    steps = [row for row in rows if row["what"] == "step"]
    assert all({"ddim", "ddpm"} <= set(row) for row in steps)
    assert {(row["network"], row["precision"]) for row in steps} >= {("network", "fp16"), ("network", "fp32")}

    again, after = measured()
    assert after["rows"] == rows
    assert '{"' not in again  # nothing was measured
