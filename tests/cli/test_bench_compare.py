"""epsrt bench compare: as a user runs it, and how it shares a name with epsrt bench."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from epsrt.bench.report import Figures, Of, Report, Row, Workload, spread, with_ratios, write
from epsrt_command import main

Epsrt = Callable[..., tuple[int, str, str]]


@pytest.fixture
def epsrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Epsrt:
    """epsrt(arguments) in this process: the exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["epsrt", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "140")
        monkeypatch.setattr("signal.signal", lambda number, handler: None)
        with pytest.raises(SystemExit) as exited:
            main()
        out, err = capsys.readouterr()
        code = exited.value.code
        return (0 if code is None else int(code)), out, err

    return run


def figures(rate: float = 100.0, noise: float = 0.0, memory: int = 1 << 26) -> Figures:
    rounds = tuple(1e3 / rate * (1 + noise * s) for s in (-2, -1, -0.5, 0, 0, 0, 0.5, 1, 2))
    return Figures(rate, spread(rounds), rate, 10.0, 12.0, rounds, 20, memory, (0.5, 0.51, 0.49, 0.5, 0.5))


def written(path: Path, rows: dict[int, Figures | str], **changes: Any) -> Path:
    found = (Row("onnxruntime", "fp32", n, *((f,) if isinstance(f, str) else ("", f))) for n, f in rows.items())
    base = Report(
        2,
        "2026-11-21T00:00:00+00:00",
        Of("x.epsrt", "d" * 64),
        Workload("ddim", 20, None),
        tuple(rows),
        "VmHWM",
        {"processor": "P", "cores": 2, "versions": {"onnxruntime": "1.31"}},
        (),
        True,
        (),
        with_ratios(found),
    )
    write(path, msgspec.structs.replace(base, **changes))
    return path


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return written(tmp_path / "before.json", {1: figures(), 8: figures(20)})


def test_alike_is_zero(epsrt: Epsrt, before: Path) -> None:
    code, out, err = epsrt("bench", "compare", before, before)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "5 same"  # steps/s and memory of each batch, one start-up


def test_a_regression_is_one(epsrt: Epsrt, before: Path, tmp_path: Path) -> None:
    after = written(tmp_path / "after.json", {1: figures(110), 8: figures(15)})
    code, out, err = epsrt("bench", "compare", before, after)
    assert (code, err.startswith("note: a machine changes from minute to minute: measure both again")) == (1, True)
    (slower,) = [line.split() for line in out.splitlines() if "regression" in line and "steps/s" in line]
    assert slower == ["onnxruntime", "fp32", "8", "steps/s", "20", "15", "0.750", "±5.0%", "regression"]
    assert out.splitlines()[-1] == "1 regression, 1 gain, 3 same"
    assert epsrt("bench", "compare", before, after, "--band", "40%")[0] == 0
    assert epsrt("bench", "compare", after, before)[0] == 1  # batch 1 was faster
    code, out, _ = epsrt("bench", "compare", before, after, "--json")
    report = json.loads(out)
    assert code == 1
    assert report["regressed"] is True
    assert [(c["batch"], c["ratio"], c["verdict"]) for c in report["changes"] if c["what"] == "steps/s"] == [
        (1, pytest.approx(1.1), "gain"),
        (8, 0.75, "regression"),
    ]


def test_many_steps_a_second_have_no_exponent(epsrt: Epsrt, tmp_path: Path) -> None:
    a = written(tmp_path / "a.json", {1: figures(23456.7)})
    (line,) = [line for line in epsrt("bench", "compare", a, a)[1].splitlines() if "steps/s" in line]
    assert line.split()[4:6] == ["23457", "23457"]


def test_larger_is_a_regression(epsrt: Epsrt, before: Path, tmp_path: Path) -> None:
    after = written(tmp_path / "after.json", {1: figures(memory=1 << 27), 8: figures(20)})
    code, out, _ = epsrt("bench", "compare", before, after)
    assert code == 1
    assert "64.0 MiB  128.0 MiB  2.000" in out


def test_noise_widens_the_band(epsrt: Epsrt, tmp_path: Path) -> None:
    a, b = (written(tmp_path / f"{r}.json", {1: figures(r, noise=0.1)}) for r in (100, 90))
    code, out, _ = epsrt("bench", "compare", a, b)
    assert code == 0
    assert "0.900" in out
    assert "±5.0%" not in next(line for line in out.splitlines() if "steps/s" in line)


def test_a_lost_case_is_a_regression(epsrt: Epsrt, before: Path, tmp_path: Path) -> None:
    after = written(tmp_path / "after.json", {1: figures(), 8: "its process ended with SIGKILL"})
    code, out, _ = epsrt("bench", "compare", before, after)
    assert code == 1
    assert "lost: onnxruntime fp32 batch 8: its process ended with SIGKILL" in out


def test_other_machines_and_versions_are_a_note(epsrt: Epsrt, before: Path, tmp_path: Path) -> None:
    machine = {"processor": "Q", "cores": 2, "versions": {"onnxruntime": "1.32"}}
    code, _, err = epsrt("bench", "compare", before, written(tmp_path / "after.json", {1: figures()}, machine=machine))
    assert code == 0
    assert err.splitlines() == [
        "note: the machines differ in processor: P and Q",
        "note: the versions differ: onnxruntime 1.31 → 1.32",
    ]


def test_what_was_cut_short_is_compared_as_far_as_it_goes(epsrt: Epsrt, before: Path, tmp_path: Path) -> None:
    whole = msgspec.json.decode(before.read_bytes(), type=Report)
    missing = tuple(row.case for row in whole.rows if row.batch == 8 and row.case)
    cut = written(tmp_path / "cut.json", {1: figures()}, complete=False, missing=missing)
    code, out, err = epsrt("bench", "compare", before, cut)
    assert code == 0
    assert err == "note: B was cut short, without onnxruntime fp32 batch 8\n"
    assert "in A alone: onnxruntime fp32 batch 8" in out


@pytest.mark.parametrize(
    ("changes", "rows", "words"),
    [
        (
            {"bundle": Of("y.epsrt", "e" * 64)},
            {1: figures()},
            "A is of the bundle x.epsrt (dddddddddddd), B of y.epsrt",
        ),
        ({"request": Workload("ddim", 50, None)}, {1: figures()}, "the requests differ in steps, 20 and 50"),
        ({}, {32: figures()}, "no case is in both"),
        ({"format": 3}, {1: figures()}, "has format 3, this epsrt reads 2"),
    ],
)
def test_what_cannot_be_compared(
    changes: dict[str, Any], rows: dict[int, Figures], words: str, epsrt: Epsrt, before: Path, tmp_path: Path
) -> None:
    code, out, err = epsrt("bench", "compare", before, written(tmp_path / "after.json", rows, **changes))
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("epsrt: ")
    assert words in line


@pytest.mark.parametrize("raw", [b"", b"\x80", b'{"format": 1}', b"[1]"])
def test_damaged_files(raw: bytes, epsrt: Epsrt, before: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(raw)
    code, out, err = epsrt("bench", "compare", tmp_path / "bad.json", before)
    assert (code, out) == (1, "")
    assert "bad.json holds no bench's results" in err
    assert "does not exist" in epsrt("bench", "compare", before, tmp_path / "none.json")[2]


@pytest.mark.parametrize("band", ["5", "-5%", "%", "five%", "1e3%", "nan%"])
def test_a_band_is_a_share(band: str, epsrt: Epsrt, before: Path) -> None:
    code, out, err = epsrt("bench", "compare", before, before, f"--band={band}")
    assert (code, out) == (1, "")
    assert f"--band '{band}' is not a share in percent, such as 5%" in err


def test_both_commands_have_help(epsrt: Epsrt) -> None:
    code, out, _ = epsrt("bench", "compare", "--help")
    assert code == 0
    assert "epsrt bench compare before.json after.json" in out
    assert "--band" in out
    code, out, _ = epsrt("bench", "--help")
    assert code == 0
    assert "epsrt bench compare before.json after.json" in out
    assert "--engine" in out
    assert "epsrt bench [OPTIONS] {BUNDLE}" in out


def test_a_bundle_of_that_name_is_reached_by_its_path(
    epsrt: Epsrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "compare").mkdir()
    assert "compare has no manifest.json" in epsrt("bench", "./compare")[2]
    assert epsrt("bench", "compare")[0] == 2  # A and B are missing
