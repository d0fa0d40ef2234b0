"""epsrt bench --share, --peak-tflops and --peak-gbs, as a user runs them; and FLOPs with and without onnx."""

from __future__ import annotations

import getpass
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import run

from epsrt import Bundle
from epsrt.bench.report import read
from epsrt.bench.share import shared
from helpers import run_python

Refused = Callable[..., str]
QUICK = ("--engine", "onnxruntime", "--threads", 1, "--batch", 2, "--steps", 3, "--rounds", 2)


def bench(*arguments: object, cwd: Path) -> str:
    return run("bench", *arguments, cwd=cwd).stdout


@pytest.mark.usefixtures("one_start")
def test_what_is_shared_can_be_compared_and_names_nobody(digits_bundle_path: Path, tmp_path: Path) -> None:
    named = tmp_path / "a-name-of-mine.epsrt"
    named.symlink_to(digits_bundle_path)
    out = bench(named, *QUICK, "--out", "mine.json", "--share", "shared.json", cwd=tmp_path)
    assert out.splitlines()[-2:] == ["mine.json", "shared.json"]
    text, report, m = (
        (tmp_path / "shared.json").read_text(),
        read(tmp_path / "shared.json"),
        Bundle.open(named).manifest,
    )
    private = {socket.gethostname(), getpass.getuser(), str(Path.home()), str(tmp_path), "a-name-of-mine", sys.prefix}
    assert not [word for word in private if len(word) > 4 and word in text]
    assert "/" not in text.replace(report.machine["processor"], "")
    assert report == shared(read(tmp_path / "mine.json"))
    assert (report.bundle.digest, report.bundle.parameters) == (m.digest, m.provenance.parameters)
    assert report.bundle.network == m.provenance.network
    assert report.machine["processor"]
    assert report.machine["versions"]["onnxruntime"]
    compared = bench("compare", "mine.json", "shared.json", cwd=tmp_path)
    assert [line.split()[-1] for line in compared.splitlines() if line.startswith("onnxruntime")].count(
        "regression"
    ) == 0
    assert "steps/s" in compared


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--share", "none/shared.json"),
            "--share none/shared.json: the folder none does not exist: make it, or choose",
        ),
        (("--share", "shared.txt"), "--share shared.txt: the suffix must be .json"),
        (("--share", "folder.json"), "--share folder.json is a directory: choose another name"),
        (("--share", "r.json", "--out", "r.json"), "--out and --share name one file: choose two"),
        (("--peak-tflops", "0"), "--peak-tflops 0.0 is no peak: give a number above 0"),
        (("--peak-gbs", "inf"), "--peak-gbs inf is no peak: give a number above 0"),
    ],
)
def test_what_is_refused_before_anything_is_measured(
    arguments: tuple[str, ...], words: str, small_bundle_path: Path, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "folder.json").mkdir()
    assert words in refused("bench", small_bundle_path, *arguments, cwd=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.json"]


@pytest.mark.usefixtures("one_start")
def test_a_cpu_has_flops_and_the_share_of_a_peak_that_is_given(small_bundle_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    printed = json.loads(bench(small_bundle_path, *QUICK, "--peak-tflops", 2, "--peak-gbs", 50, "--json", cwd=tmp_path))
    (row,) = printed["rows"]
    assert row["figures"]["cost"]["flops"] > 0
    assert printed["peak"] == {
        "device": "cpu",
        "tflops": {"fp32": 2.0},
        "gbs": 50.0,
        "source": "FLOP/s and bytes/s as given",
    }
    out = bench(small_bundle_path, *QUICK, "--peak-tflops", 2, "--peak-gbs", 50, cwd=tmp_path).splitlines()
    for words in ("GFLOP/s", "of peak", "of bandwidth"):
        assert words in out[1]
    assert "W" not in out[1].split()
    assert "peak: 2 TFLOP/s in fp32, 50 GB/s (FLOP/s and bytes/s as given)" in out
    assert "of peak" not in bench(small_bundle_path, *QUICK, cwd=tmp_path)


def test_without_onnx_the_bench_says_so_and_goes_on(small_bundle_path: Path) -> None:
    code = "import sys; from epsrt_command import main; sys.argv = ['epsrt', 'bench', *sys.argv[1:]]; main()"
    done = run_python(code, small_bundle_path, *QUICK, blocked=("onnx",), env={"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert "FLOPs are not counted: onnx is missing, which reads step graphs: pip install onnx" in done.stdout
    assert "GFLOP/s" not in done.stdout
    assert "onnxruntime" in done.stdout
