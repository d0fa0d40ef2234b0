"""benchmarks/gpu_table.py: tables, targets and the chart of made-up rows; the pages say what the checked-in ones do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def benchmarks() -> Iterator[None]:
    """benchmarks/ on the path, as for its scripts."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


NETWORK = {"network": "ddpm-cifar10", "precision": "fp16"}
MADE_UP = "NVIDIA Invented"


def made_up() -> Row:
    """Rows as gpu_quick.py writes them: batch 256 has no race yet, and diffusers did not run at 64."""
    rows: list[Row] = [
        {"what": "matmul", "side": 8192, "tflops": 500.0},
        {"what": "flops", "network": "ddpm-cifar10", "gflop": 12.0},
        {"what": "copy", "gb_s": 3000.0},
        {"what": "noise kernel", "lanes": 256, "size": 3072, "us": 7.5},
    ]
    for batch, bare in ((1, 1.0), (64, 4.0), (256, 15.0)):
        for variant, factor in (("cuda NHWC fused bias", 1.0), ("cpu NCHW", 2.0)):
            times = {"bare_ms": {"p50": factor * bare}, "image_steps_per_s": 1e3 * batch / bare / factor}
            loop = {"ddim": {"ratio": 1.01}}
            rows.append({"what": "variant", **NETWORK, "variant": variant, "batch": batch, **times, **loop})
        loop = {"ddim": {"ratio": 1.01}, "ddpm": {"ratio": 1.05 if batch == 1 else 1.02}}
        rows.append({"what": "step", **NETWORK, "variant": "cuda NHWC fused bias", "batch": batch, **times, **loop})
    rivals = {"torch.compile": 2.5, "PyTorch channels-last": 5.0, "PyTorch": 6.0, "diffusers": 9.0}
    for batch in (1, 64):
        rows.append({"what": "race", **NETWORK, "batch": batch, "rival": "epsrt", "image_steps_per_s": 900.0 * batch})
        for rival, ratio in rivals.items():
            ratio /= batch**0.25
            figures: Row = {"times_ours": ratio, "image_steps_per_s": 900.0 * batch / ratio}
            if (batch, rival) == (64, "diffusers"):
                figures = {"error": "OutOfMemoryError: no"}
            rows.append({"what": "race", **NETWORK, "batch": batch, "rival": rival, **figures})
    for precision, db in (("fp16", 63.1), ("fp32", 120.4)):
        rungs = [
            {"name": "ddim-50", "unit": "dB", "figure": db, "limit": 45.0},
            {"name": "step", "unit": "", "figure": 1e-4, "limit": 1e-3},
        ]
        rows.append(
            {"what": "verify", **NETWORK, "precision": precision, "variant": "cuda NHWC fused bias", "rungs": rungs}
        )
    machine = {"gpu": {"name": MADE_UP, "driver_version": "1.0"}, "versions": {"torch": "2.0"}}
    return {"benchmark": "gpu", "date": "2000-01-01", "machine": machine, "rows": rows}


def test_figures_and_targets() -> None:
    from gpu_table import Figures

    f = Figures(made_up())
    cells = {line[0]: line[1:] for line in f.table()}
    assert cells["image steps/s of the bare engine"] == ["1,000", "16,000", "17,067"]
    assert cells["share of an FP16 product's rate"] == ["2 %", "38 %", "41 %"]
    assert cells["a trajectory over the bare engine"] == ["1.050", "1.020", "1.020"]
    assert cells["times as fast as torch.compile"] == ["2.50 ×", "0.88 ×", "not measured yet"]
    assert cells["times as fast as diffusers"] == ["9.00 ×", "not measured yet", "not measured yet"]
    assert f.variants()[1] == ["cpu NCHW", "2 (1.010)", "8 (1.010)", "30 (1.010)"]
    said = [str(target) for target in f.targets()]
    assert said == [
        "missed: trajectory over bare engine, batch 1 ≤ 1.03: 1.05",
        "met: trajectory over bare engine, batch 64 ≤ 1.03: 1.02",
        "met: trajectory over bare engine, batch 256 ≤ 1.03: 1.02",
        "met: times as fast as torch.compile, batch 1 ≥ 2: 2.5",
        "missed: times as fast as torch.compile, batch 64 ≥ 1: 0.884",
        "not measured yet: times as fast as torch.compile, batch 256 ≥ 1",
        "missed: times as fast as diffusers, batch 1 ≥ 10: 9",
        "met: % of the product's rate, batch 256 ≥ 40: 41",
    ]


def test_nothing_is_estimated() -> None:
    from gpu_table import NOTHING, Figures

    f = Figures({})
    assert {cell for line in f.table() for cell in line[1:]} == {NOTHING}
    assert all(str(target).startswith(NOTHING) for target in f.targets())
    assert (f.variants(), f.decibels(), f.yardsticks()) == ([], [], "")


def test_pages_and_the_chart(tmp_path, monkeypatch, capsys) -> None:
    import gpu_table
    from PIL import Image

    results, page = tmp_path / "results", f"before\n{gpu_table.BEGIN}old\n{gpu_table.END}after\n"
    for name in ("README.md", "docs/benchmarks.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(page)
    results.mkdir()
    monkeypatch.setattr(gpu_table, "RESULTS", results)
    monkeypatch.setattr(gpu_table, "ROOT", tmp_path)
    gpu_table.main()
    assert "not measured yet" in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "docs/gpu.png").exists()
    (results / "gpu-invented.json").write_text(json.dumps(made_up()))
    (results / "gpu-invented-before.json").write_text("of another driver")
    for _ in range(2):
        gpu_table.main()
    readme, whole = ((tmp_path / name).read_text() for name in ("README.md", "docs/benchmarks.md"))
    for text in (readme, whole):
        assert text.startswith("before\n<!--")
        assert text.endswith("<!-- end -->\nafter\n")
        assert text.count(MADE_UP) == 1
        assert "| image steps/s of the bare engine | 1,000 | 16,000 | 17,067 |" in text
    assert "gpu.png" not in readme
    assert "](gpu.png)" in whole
    assert "| ddpm-cifar10 FP16, ddim-50 | 63.1 | 45 |" in whole
    assert "An FP16 product of 8192 × 8192 runs at 500.0 TFLOP/s" in whole
    with Image.open(tmp_path / "docs/gpu.png") as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    assert "met: trajectory" in gpu_table.text(results / "gpu-invented.json")


def test_the_pages_say_what_was_measured() -> None:
    import gpu_table

    figures = gpu_table.read(ROOT / "benchmarks/results")
    for page, whole in (("README.md", False), ("docs/benchmarks.md", True)):
        between = (ROOT / page).read_text().split(gpu_table.BEGIN)[1].split(gpu_table.END)[0]
        assert between == gpu_table.block(figures, whole), (
            f"run python benchmarks/gpu_table.py: {page} is of other rows"
        )
    assert (ROOT / "docs/gpu.png").exists() == bool(figures[0].machine)
