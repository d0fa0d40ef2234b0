"""epsrt verify --layers, as a user runs it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from epsrt_command import main
from epsrt_command.app import app
from helpers import forge, weights

LAYERS = ("--layers", "--engine", "onnxruntime", "--threads", "1")


@pytest.fixture
def epsrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """epsrt(arguments) in this process: the exit code and stdout."""
    pytest.importorskip("polygraphy", reason="needs epsrt[debug]")

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["epsrt", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr("signal.signal", lambda number, handler: None)
        with pytest.raises(SystemExit) as exited:
            main()
        return int(exited.value.code or 0), capsys.readouterr().out

    return run


def test_a_good_bundle_has_its_worst_tensors_shown(epsrt, bundle_path):
    code, text = epsrt("verify", bundle_path, *LAYERS, "--limit", "0.1", "--top", "3")
    assert code == 0
    title, head, *rows, _, told = text.splitlines()
    assert title.strip() == "Worst tensors: relative L2, worst of 25 states"
    assert head.split() == ["depth", "tensor", "op", "module", "t", "inputs", "figure"]
    figures = [float(row.split()[-1]) for row in rows]
    assert len(rows) == 3
    assert figures == sorted(figures, reverse=True)
    assert told.startswith(f"{bundle_path}: onnxruntime fp16 against onnxruntime fp32: 0 of ")
    assert told.endswith("tensors are over 0.1")


def test_a_damaged_weight_is_named_and_exits_1(epsrt, copy_of, bundle_path):
    path = copy_of(bundle_path)
    values = weights(path, "network.middle.weight", "fp16")
    values[3] *= 2
    values.flush()
    forge(path)
    code, text = epsrt("verify", path, *LAYERS, "--top", "1")
    assert code == 1
    title, _, row, _, told = text.splitlines()
    assert title.startswith("First tensors over 0.001: ")
    depth, tensor, op, module, *_ = row.split()
    assert (op, module) == ("Conv", "middle")
    assert f"first {tensor} (Conv, middle), {depth.replace('/', ' of ')}" in told
    report = json.loads(epsrt("verify", path, *LAYERS, "--json")[1])
    assert report["passed"] is False
    first = next(layer for layer in report["layers"] if layer["figure"] > report["limit"])
    assert (first["tensor"], first["module"]) == (tensor, "middle")


def test_all_are_shown_in_their_order(epsrt, bundle_path):
    report = json.loads(epsrt("verify", bundle_path, *LAYERS, "--limit", "0.1", "--json")[1])
    assert report["passed"] is True
    text = epsrt("verify", bundle_path, *LAYERS, "--limit", "0.1", "--top", "all")[1]
    shown = [line.split()[1] for line in text.splitlines()[2:-2]]
    assert shown == [layer["tensor"] for layer in report["layers"]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--limit", "1e-3"), "--against, --limit and --top are for --layers: add it, or leave them out"),
        (("--against", "fp16"), "--against, --limit and --top are for --layers"),
        (("--layers", "--top", "0"), "--top '0' is neither a whole number above 0 nor all"),
        (("--layers", "--top", "few"), "--top 'few' is neither"),
        (("--layers", "--limit", "0"), "--limit 0 is no relative L2: give a positive number such as 1e-3"),
        (("--layers", "--engine", "openvino"), "engine openvino returns what a graph does, not the tensors within"),
        (
            ("--layers", "--engine", "onnxruntime", "--precision", "fp32"),
            "--precision fp32 of onnxruntime is the refer",
        ),
    ],
)
def test_what_does_not_fit_is_refused(refused, bundle_path: Path, tmp_path: Path, arguments, sentence):
    assert sentence in refused("verify", bundle_path, *arguments, cwd=tmp_path)


def test_one_precision_and_a_missing_extra(refused, plain_bundle_path: Path, bundle_path: Path, tmp_path, monkeypatch):
    assert "has fp32 alone" in refused("verify", plain_bundle_path, *LAYERS, cwd=tmp_path)
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    assert 'needs polygraphy: pip install "epsrt[debug]"' in refused("verify", bundle_path, *LAYERS, cwd=tmp_path)


def test_help_names_the_extra() -> None:
    shown = CliRunner().invoke(app, ["verify", "--help"], env={"COLUMNS": "200"}).stdout
    assert "needs epsrt[debug]" in " ".join(shown.replace("│", " ").split())
