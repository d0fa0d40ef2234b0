"""epsrt bench: as a user runs it, interrupts included."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import run

from epsrt import EngineError
from epsrt.bench.report import read, startup
from epsrt.engines import probe

EPSRT = str(Path(sys.executable).with_name("epsrt"))
Refused = Callable[..., str]


bench = partial(run, "bench")
QUICK = ("--engine", "onnxruntime", "--threads", 1, "--steps", 3, "--rounds", 2)


@pytest.mark.usefixtures("one_start")
def test_a_table_a_file_and_json(small_bundle_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "r.json"
    done = bench(small_bundle_path, *QUICK, "--batch", "2,1", "--method", "ddpm", "--out", out)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("small.epsrt: ddpm in 3 steps, fp32, on ")
    head = lines[1].split()
    assert head[:4] == ["engine", "batch", "steps/s", "±"]
    assert [line.split()[:2] for line in lines[2:4]] == [["onnxruntime", "1"], ["onnxruntime", "2"]]
    assert lines[-1] == str(out)
    report = read(out)
    assert report.complete
    assert [c.batch for c in report.measured] == [1, 2]
    for figures in report.measured.values():
        assert len(figures.rounds_ms) == 2
        assert figures.memory
    assert len(startup(report, "onnxruntime", "fp32")) == 1
    assert [p.name for p in out.parent.iterdir()] == ["r.json"]
    printed = json.loads(bench(small_bundle_path, *QUICK, "--batch", 1, "--json").stdout)
    assert printed["rows"][0]["engine"] == "onnxruntime"
    assert printed["request"] == {"method": "ddim", "steps": 3, "threads": 1}


@pytest.mark.usefixtures("one_start")
def test_all_names_what_does_not_run_here(small_bundle_path: Path) -> None:
    if all(probe.state(name).available for name in ("tensorrt", "onnxruntime")):
        pytest.skip("this machine has an NVIDIA GPU")
    done = bench(small_bundle_path, "--threads", 1, "--steps", 2, "--rounds", 1, "--batch", 1)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("not measured: tensorrt: ")]
    assert probe.state("tensorrt").reason in line
    assert "onnxruntime" in done.stdout.splitlines()[2] + done.stdout.splitlines()[3]


@pytest.mark.usefixtures("one_start")
def test_auto_is_one_engine(small_bundle_path: Path) -> None:
    done = bench(small_bundle_path, "--engine", "auto", "--steps", 2, "--rounds", 1, "--batch", 1, "--json")
    printed = json.loads(done.stdout)
    assert [row["engine"] for row in printed["rows"]] == [next(probe.available())]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_there_is(number: signal.Signals, small_bundle_path: Path, tmp_path: Path) -> None:
    """The first batch is measured, and the second takes for ever. What is shared is whole or not there."""
    out = tmp_path / "r.json"
    command = [EPSRT, "bench", small_bundle_path, "--engine", "onnxruntime", "--threads", "1", "--batch", "1,4"]
    command += ["--steps", "100", "--seconds", "8", "--out", out, "--share", tmp_path / "shared.json"]
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "140"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not out.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert out.exists(), "no case was ever finished"
        assert process.poll() is None
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == f"epsrt: interrupted, 1 case is missing, what there is in {out}"
    assert "missing: onnxruntime fp32 batch 4" in stdout
    assert any(line.split()[:2] == ["onnxruntime", "1"] for line in stdout.splitlines())
    report = read(out)
    assert not report.complete
    assert [str(case) for case in report.missing] == ["onnxruntime fp32 batch 4"]
    assert [str(case) for case in report.measured] == ["onnxruntime fp32 batch 1"]
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_an_interrupt_before_anything_was_measured(small_bundle_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    out.write_text("what was there")
    command = [EPSRT, "bench", str(small_bundle_path), "--engine", "onnxruntime", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "batch 1" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (143, "")
    assert stderr.splitlines()[-1] == "epsrt: interrupted before anything was measured"
    assert out.read_text() == "what was there"


def test_a_named_engine_without_its_library(refused: Refused, small_bundle_path: Path, tmp_path: Path) -> None:
    name = next((name for name in ("tensorrt", "onnxruntime-cuda") if not probe.state(name).available), None)
    if name is None:
        pytest.skip("every engine runs here")
    line = refused("bench", small_bundle_path, "--engine", f"onnxruntime,{name}", "--out", "r.json", cwd=tmp_path)
    assert not list(tmp_path.iterdir())
    assert line.removeprefix("epsrt: ")


def test_a_precision_that_the_processor_lacks(
    refused: Refused, small_bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_bf16(bundle: Any, name: str, *, precision: str | None, **options: Any) -> Any:
        raise EngineError(f"{name} has no {precision} on this processor: use fp32")

    monkeypatch.setattr("epsrt.bench.run.open_engine", no_bf16)
    line = refused("bench", small_bundle_path, "--engine", "onnxruntime", "--precision", "bf16", cwd=tmp_path)
    assert line == "epsrt: onnxruntime has no bf16 on this processor: use fp32"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--engine", "warp"), "engine 'warp' is unknown"),
        (("--engine", " , "), "--engine ' , ' names nothing"),
        (("--engine", "onnxruntime", "--precision", "fp8"), "precision 'fp8' is unknown"),
        (("--engine", "onnxruntime", "--precision", "fp16"), "has no fp16 step graph"),
        (("--batch", "1,many"), "--batch: 'many' is not a whole number"),
        (("--batch", "0"), "--batch 0"),
        (("--batch", "5"), "--batch 5 is outside 1 … 4, the largest of small.epsrt"),
        (("--method", "ddmp"), "method 'ddmp' is unknown"),
        (("--steps", "0"), "--steps 0 is outside"),
        (("--engine", "onnxruntime", "--threads", "0"), "--threads 0 is outside"),
        (("--threads", "4096"), "epsrt: --threads 4096 is outside 1 … "),
        (("--seconds", "0"), "--seconds 0.0"),
        (("--seconds", "nan"), "--seconds nan"),
        (("--rounds", "0"), "--rounds 0"),
        (("--rounds", "2", "--seconds", "2"), "--seconds and --rounds both"),
        (("--out", "r.txt"), "the suffix must be .json"),
    ],
)
def test_bench_refuses(
    refused: Refused, small_bundle_path: Path, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    """Before anything is measured."""
    assert sentence in refused("bench", small_bundle_path, *arguments, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_no_bundle(refused: Refused, tmp_path: Path) -> None:
    assert "does not exist" in refused("bench", "none.epsrt", cwd=tmp_path)


def test_a_target_that_cannot_be_written(refused: Refused, small_bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    for out in ("file/r.json", "folder.json"):
        line = refused("bench", small_bundle_path, "--out", out, cwd=tmp_path)
        assert f"--out {out}" in line
        assert ("is a directory" if out == "folder.json" else "cannot be written to") in line
