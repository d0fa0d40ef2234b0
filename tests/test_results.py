"""docs/evidence/results: each file is what epsrt bench --share writes, and the page's table is made from them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from epsrt import EpsrtError
from epsrt.bench.others import BUSY
from epsrt.bench.report import Cost, Device, Figures, Of, Peak, Report, Row, Workload, read, with_ratios, write
from epsrt.bench.share import shared

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "evidence" / "results"
FILES = sorted(FOLDER.glob("*"))
PAGE = (ROOT / "docs" / "evidence" / "results.md").read_text()
CPU = Figures(2500.0, 0.01, 50.0, 0.4, 0.44, (0.4,) * 7, 20, 1 << 26, (0.5,), Cost(10**9, 10**6))
GPU = msgspec.structs.replace(CPU, device=Device(0.25, 0.5, 412.4))


def report(name: str = "UNet") -> Report:
    """An engine on a GPU, one on the CPU, and a rival on the GPU; another rival failed."""
    rows = [Row("tensorrt", "fp16", 8, "", GPU), Row("onnxruntime", "fp32", 8, "", CPU)]
    rows += [Row("torch", "fp16", 8, "", CPU), Row("diffusers", "fp16", 8, "it failed")]
    return Report(
        2,
        "2026-11-21",
        Of(name, "d" * 64, f"somebody.{name}", 750_000),
        Workload("ddim", 50, None),
        (8,),
        "VmHWM",
        {"processor": "P", "cores": 2, "gpu": {"name": "NVIDIA L4"}, "versions": {}},
        (),
        True,
        (),
        with_ratios(rows),
        ("torch", "diffusers"),
        "cuda",
        Peak("cuda", {"fp16": 121.0}, None, "NVIDIA's L4 data sheet"),
    )


@pytest.fixture(scope="module")
def results() -> ModuleType:
    """docs/tools/results.py."""
    spec = importlib.util.spec_from_file_location("results", ROOT / "docs" / "tools" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_a_file_is_as_the_command_wrote_it(path: Path, tmp_path: Path) -> None:
    """Whole, with nothing private, and not edited: written again it is the same, byte by byte."""
    found = read(path)
    assert found.complete
    assert found.measured
    assert shared(found) == found
    assert found.others_share is None or found.others_share <= BUSY
    write(tmp_path / path.name, found)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_every_case_of_every_file_is_a_row(results: ModuleType) -> None:
    head, marks, *rows = cells(results.table())
    assert len(head) == len(marks)
    for path in FILES:
        found = read(path)
        own = [row for row in rows if row[-1] == f"[{found.date}](results/{path.name})"]
        wanted = {
            (f"{c.engine} {c.precision}", str(c.batch), results.rate(f.steps_per_s)) for c, f in found.measured.items()
        }
        assert {(row[2], row[3], row[4]) for row in own} == wanted
        assert len(own) == len(wanted)
    assert len(rows) == sum(len(read(path).measured) for path in FILES)


def test_the_page_has_a_place_for_it(results: ModuleType) -> None:
    """Which the site's hook fills with what the script prints."""
    assert PAGE.count("<!-- docs/tools/results.py -->") == 1
    assert "|---" not in PAGE
    script = [sys.executable, str(ROOT / "docs" / "tools" / "results.py")]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == results.table()


def test_a_row_has_its_device_and_its_clock(results: ModuleType, tmp_path: Path) -> None:
    """10⁹ FLOPs in 0.25 ms of the GPU's clock, or in 0.4 ms of who waits."""
    write(tmp_path / "some.json", report())
    head, _, *rows = cells(results.table(tmp_path))
    ours, cpu, rival = (
        dict(zip(head, row, strict=True)) for row in sorted(rows, key=lambda row: row[2] != "tensorrt fp16")
    )
    assert ours == {
        "machine": "NVIDIA L4",
        "network, sampler": "UNet, 0.75 M parameters; ddim, 50 steps",
        "engine": "tensorrt fp16",
        "batch": "8",
        "steps/s": "2,500",
        "images/s": "50",
        "ms p50": "0.25",
        "ms p95": "0.5",
        "GFLOP/s": "4,000",
        "of peak": "3.3%",
        "of bandwidth": "",
        "W": "412",
        "file": "[2026-11-21](results/some.json)",
    }
    assert (cpu["machine"], cpu["ms p50"], cpu["of peak"], cpu["W"]) == ("2 cores of P", "0.4", "", "")
    assert (rival["machine"], rival["engine"], rival["of peak"], rival["W"]) == ("NVIDIA L4", "torch fp16", "2.1%", "")


def test_many_steps_a_second_are_read_at_a_glance(results: ModuleType) -> None:
    assert [results.rate(value) for value in (0.61234, 99.996, 999.94, 12345.6)] == ["0.6123", "100", "999.9", "12,346"]


def test_a_file_that_is_no_result_fails(results: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(EpsrtError, match="bad.json holds no bench's results"):
        results.table(tmp_path)


def test_the_table_is_in_order_of_networks(results: ModuleType, tmp_path: Path) -> None:
    for file, name in (("a", "UNet"), ("b", "DiT"), ("c", "UNet")):
        write(tmp_path / f"{file}.json", report(name))
    _, _, *rows = cells(results.table(tmp_path))
    assert [row[-1][-7] + row[1][:3] for row in rows] == ["bDiT"] * 3 + ["aUNe"] * 3 + ["cUNe"] * 3
