"""benchmarks/race*.py and linear.py: like is raced with like, what is kept, how it is judged, tables and charts."""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import unets
from epsrt import Bundle, EngineError, Sampler, Schedule
from epsrt.bench import isolated
from epsrt.timesteps import spaced

ROOT = Path(__file__).parents[1]
bundle_path = unets.bundle_path  # whose network is at hand


@pytest.fixture(autouse=True, scope="module")
def benchmarks() -> Iterator[None]:
    """benchmarks/ on the path, as for its scripts."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def prepared(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """out/bench/ with the network as ONNX, and a pipeline's folder without one in it."""
    import race_rivals

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("prepared"))
        race_rivals.pipeline_path("digits").mkdir(parents=True)
        race_rivals.prepare("digits", lambda name: copy.deepcopy(network))
        return race_rivals.FOLDER.absolute()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EPSRT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_rivals_table_is_ours() -> None:
    import plain_loops as loops

    assert np.array_equal(loops.Linear().alpha_bar, Schedule("linear").alpha_bar)
    for steps in (1, 2, 7, 20, 48, 50, 250, 999, 1000):
        ts, table = loops.rows(loops.Linear(), steps)
        assert ts == spaced(1000, steps, "trailing")
        assert table[-1][2:] == (1.0, 0.0)


def test_rivals_draw_what_we_draw(
    network: nn.Module, bundle_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same network from the same x_T; those that are not asked for, or cannot run, are told of."""
    import race_case
    import race_rivals

    monkeypatch.setattr(race_rivals, "FOLDER", prepared)
    copies = lambda name: copy.deepcopy(network)  # noqa: E731
    field = race_case.field_of({"network": "digits", "batch": 3, "bundle": str(bundle_path)})
    assert field.labels == [0, 1, 2]
    without = ["torch.compile fp32", "torch.compile bf16"]
    row = race_case.measure(field, 10, 0.0, 2, without, copies, pause=0.0)
    assert row["refused"].pop("torch.compile fp32") == row["refused"].pop("torch.compile bf16") == "left out"
    assert row["refused"].pop("diffusers")  # its folder is empty
    found = row["contestants"]
    wanted = {"epsrt", "epsrt onnxruntime fp32", "onnxruntime loop", "PyTorch fp32", "PyTorch bf16"}
    if pytest.importorskip("onnxruntime") and row["refused"].get("epsrt onnxruntime fp32", "").startswith("what auto"):
        wanted.remove("epsrt onnxruntime fp32")
    assert wanted <= set(found), row["refused"]
    assert row["rounds"] == 2
    for name, one in found.items():
        assert one["psnr"] >= (90 if one["precision"] == "fp32" else 30), (name, one)
        assert one["ms"] > 0
        assert one["alone_ms"] > 0
    assert found[row["reference"]]["precision"] == "fp32"
    assert found["PyTorch fp32"]["psnr"] < 300  # not our own images
    assert race_rivals.BY_NAME[row["best"]].ours
    assert found[row["best"]]["times"] == 1
    assert found[row["best"]]["ms"] == min(one["ms"] for name, one in found.items() if race_rivals.BY_NAME[name].ours)
    loop = found["onnxruntime loop"]
    assert race_rivals.BY_NAME[loop["like"]].ours
    assert found[loop["like"]]["library"] == "onnxruntime"
    assert "like" not in found["PyTorch fp32"]


def test_openvinos_loop_says_what_it_computes_in(bundle_path: Path, prepared: Path) -> None:
    pytest.importorskip("openvino")
    import plain_loops as loops
    import race_case
    import race_rivals

    field = race_case.field_of({"network": "digits", "batch": 2, "bundle": str(bundle_path)})
    path = prepared / race_rivals.plain_path("digits").name
    draw, used = loops.openvino_loop(path, field.schedule, field.x_T, label=field.labels, precision="fp32")
    assert used == "fp32"
    with Sampler.open(bundle_path, "onnxruntime", precision="fp32") as sampler:
        want = sampler.sample(2, steps=10, seed=loops.SEED, labels=field.labels, rederive=False)
    assert np.abs(draw(10) - want).max() < 1e-4
    assert loops.openvino_loop(path, field.schedule, field.x_T, label=field.labels)[1] in ("fp32", "bf16")


def test_turns_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    import race_case

    calls: list[tuple[str, int]] = []
    draws = {name: (lambda steps, name=name: calls.append((name, steps))) for name in "ab"}
    kept = race_case.turns(draws, 4, 60.0, 4, pause=0.0)
    assert [name for name, _ in calls] == list("abbaabba")
    assert {name: len(ms) for name, ms in kept.items()} == {"a": 4, "b": 4}
    calls.clear()
    race_case.turns(draws, 4, 0.0, 9, pause=0.001)
    assert len(calls) == 2 * 2 * 3  # three rounds though no time was left; an unmeasured step before each
    assert calls[:2] == [("a", 1), ("a", 4)]
    calls.clear()
    monkeypatch.setattr(race_case, "LONG", 0.0)  # all steps are long: only the first turn is begun gently
    race_case.turns({"a": draws["a"]}, 4, 0.0, 3, pause=0.001)
    assert calls == [("a", 1), ("a", 4), ("a", 4), ("a", 4)]
    assert race_case.alone(lambda steps: time.sleep(0.002), 2) == pytest.approx(1.0, rel=0.9)


def test_those_alike_are_neighbours() -> None:
    import race_case

    about = {
        "epsrt": ("openvino", "fp32"),
        "epsrt openvino bf16": ("openvino", "bf16"),
        "OpenVINO loop": ("openvino", "bf16"),
        "OpenVINO loop fp32": ("openvino", "fp32"),
        "onnxruntime loop": ("onnxruntime", "fp32"),
    }
    found = {name: {"library": library, "precision": precision} for name, (library, precision) in about.items()}
    order = ["epsrt", "OpenVINO loop fp32", "epsrt openvino bf16", "OpenVINO loop", "onnxruntime loop"]
    assert race_case.in_order(found) == order
    assert race_case.ours_like("onnxruntime loop", found) is None
    assert race_case.reference(found) == "epsrt"
    assert race_case.fastest(found, {"epsrt": [9, 1, 9], "epsrt openvino bf16": [3], "OpenVINO loop": [2]}) == order[2]


PROCESS = """
import sys
import race_rivals
def imported(key):
    race_rivals.draw_once(key)
    return sorted({"epsrt", "torch", "onnxruntime", "diffusers", "openvino"} & set(sys.modules))
"""


def test_a_process_imports_what_it_needs(
    folder: Path, bundle_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import race_case

    (folder / "out").mkdir()
    (folder / "out/bench").symlink_to(prepared)
    (folder / "what_a_rival_imports.py").write_text(PROCESS)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]))
    import what_a_rival_imports

    key = {"network": "digits", "bundle": str(bundle_path), "batch": 2, "steps": 3, "rounds": 1}
    done = isolated.call(what_a_rival_imports.imported, {**key, "contestant": "onnxruntime loop"})
    assert done.value == ["onnxruntime"]
    assert done.memory is not None
    assert 20 << 20 < done.memory < 4 << 30
    key["contestant"] = "epsrt onnxruntime fp32"
    row = race_case.process(key)
    assert 0.05 < row["start_s"] < 60
    assert row["peak_mib"] > 20
    with pytest.raises(EngineError, match=r"nowhere\.epsrt"):
        race_case.process({**key, "bundle": "nowhere.epsrt"})


def test_the_loops_own_share(bundle_path: Path) -> None:
    import race_case

    row = race_case.share({"bundle": str(bundle_path), "batch": 1, "steps": 5, "rounds": 2})
    assert set(row["methods"]) == {"ddim", "ddpm"}
    for one in row["methods"].values():
        assert one["bare_ms"] > 0
        assert one["share"] < 1


def test_the_cases() -> None:
    import race

    every = race.keys(list(race.NETWORKS), list(race.BATCHES), [])
    assert len(every) == 6 + 1 + 2 * len(race.CONTESTANTS)
    less = race.keys(["digits"], [1], ["diffusers"])
    assert not any(race.matches(row, key) for row in every for key in less if key["what"] == "race")
    assert all(key in every for key in less if key["what"] != "race")
    assert not any(key.get("contestant") == "diffusers" for key in less)


# A case that counts its runs; a batch of 8 dies.
CASE = """
import os, signal
def case(key):
    with open("runs", "a") as file: file.write(f"{key['batch']} ")
    if key["batch"] == 8: os.kill(os.getpid(), signal.SIGSEGV)
    return {"value": key["seconds"]}
"""


def test_an_interrupted_run_is_taken_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import race

    here: dict[str, Any] = {"cores": 2}
    monkeypatch.setattr(race, "machine", lambda: here)
    monkeypatch.setattr(race, "given", lambda key, seconds: {"bundle": "x", "seconds": seconds})
    Path("dying_case.py").write_text(CASE)
    monkeypatch.syspath_prepend(Path.cwd())
    import dying_case

    cases, part, later = {"race": dying_case.case}, Path("part.json"), time.monotonic() + 60
    wanted = [{"what": "race", "network": "digits", "batch": batch} for batch in (1, 8, 32)]

    def runs() -> list[str]:
        return Path("runs").read_text().split()

    rows = race.run(wanted[:2], cases, part, 7.0, later)
    assert (rows[0]["value"], "bundle" in rows[0]) == (7.0, False)
    assert "SIGSEGV" in rows[1]["error"]
    assert race.run(wanted, cases, part, 7.0, 0.0) == rows  # no time: what there is
    assert len(race.run(wanted, cases, part, 7.0, later)) == 3
    assert runs() == ["1", "8", "32"]  # nothing twice, what failed neither
    here["cores"] = 4
    race.run(wanted[:1], cases, part, 7.0, later)
    assert "cores: 2, now 4" in capsys.readouterr().out
    assert runs() == ["1", "8", "32", "1"]
    part.write_text("{")
    race.run(wanted[:1], cases, part, 7.0, later)
    assert "starting over" in capsys.readouterr().out
    assert len(runs()) == 5


def one(ms: float, times: float, library: str = "torch", precision: str = "fp32", **more: object) -> dict[str, Any]:
    about = {"library": library, "precision": precision, "first_s": 1.0, "alone_ms": ms}
    return {**about, "ms": ms, "times": times, **more}


def made_up(batch: int, network: str = "ddpm-cifar10", scale: float = 1.0) -> dict[str, Any]:
    found = {
        "epsrt": one(10 * batch, 1.0, "openvino", "bf16", psnr=50.0),
        "OpenVINO loop": one(9.9 * batch, 0.99, "openvino", "bf16", times_like=0.99, like="epsrt", psnr=50.0),
        "onnxruntime loop": one(
            20 * batch, 2.0, "onnxruntime", times_like=0.97, like="epsrt onnxruntime fp32", psnr=140.0
        ),
        "PyTorch fp32": one(30 * batch, 3.0, psnr=140.0),
        "torch.compile bf16": one(15 * batch, 1.5 * scale, "inductor", "bf16", psnr=40.0),
        "diffusers": one(60 * batch, 6.0, "diffusers"),
    }
    return {
        "what": "race",
        "network": network,
        "batch": batch,
        "steps": 5,
        "rounds": 3,
        "best": "epsrt",
        "reference": "epsrt",
        "others_share": 0.01,
        "contestants": found,
        "refused": {"PyTorch bf16": "RuntimeError: no"},
    }


def processes() -> list[dict[str, Any]]:
    peaks = {"epsrt": 300.0, "epsrt onnxruntime fp32": 700.0, "diffusers": 1000.0}
    rows: list[dict[str, Any]] = [
        {
            "what": "process",
            "network": "digits",
            "contestant": name,
            "batch": 1,
            "steps": 5,
            "start_s": 1.0,
            "peak_mib": peak,
        }
        for name, peak in peaks.items()
    ]
    failed = {"what": "process", "network": "digits", "contestant": "epsrt openvino fp32", "batch": 1, "steps": 5}
    return [*rows, {**failed, "error": "no engine"}]


def test_judging() -> None:
    from race_table import verdicts

    race_rows = [made_up(1), made_up(8, scale=0.9)]
    by = {v.what: v for v in verdicts(race_rows)}
    one_at, eight_at = "ddpm-cifar10, batch 1: ", "ddpm-cifar10, batch 8: "
    against_torch = "epsrt times as fast as the fastest PyTorch, torch.compile bf16"
    assert by[one_at + against_torch].value == 1.5
    assert not by[one_at + against_torch].passed  # 1.5 of 2.5
    assert not by[eight_at + against_torch].passed  # 1.35 of 1.4
    assert by[one_at + "epsrt times as fast as diffusers"].passed
    assert by[one_at + "epsrt times as fast as OpenVINO loop"].passed
    assert not by[one_at + "epsrt onnxruntime fp32 times as fast as onnxruntime loop"].passed
    absent = by[one_at + "ours times as fast as OpenVINO loop fp32"]
    assert not absent.passed
    assert "MISS" in str(absent)
    assert "not measured" in str(absent)
    failed = verdicts([{"what": "race", "network": "ddpm-cifar10", "batch": 8, "error": "no"}])
    assert len(failed) == 5
    assert not any(v.passed for v in failed)
    share = {
        "what": "share",
        "network": "digits",
        "batch": 1,
        "methods": {"ddim": {"share": 0.08}, "ddpm": {"share": 0.2}},
    }
    assert [v.passed for v in verdicts([share])] == [True, False]
    memory = {v.what.split(": ")[1]: v for v in verdicts(processes())}
    assert [v.passed for v in memory.values()] == [True, False, False]
    assert memory["peak memory of epsrt over diffusers'"].value == 0.3
    assert [v.passed for v in verdicts([made_up(1, "digits")])] == [True]  # diffusers at batch 1 alone
    assert not verdicts([made_up(8, "digits")])


def test_table_and_chart(folder: Path) -> None:
    from PIL import Image
    from race_table import chart, table

    rows = [
        made_up(1),
        made_up(8),
        made_up(1, "digits"),
        {"what": "race", "network": "digits", "batch": 8, "error": "it died"},
    ]
    rows[0]["contestants"]["PyTorch bf16"] = one(13, 1.3)  # at one batch alone
    assert "INVALID" not in table(rows)
    rows[1]["others_share"] = 0.3
    said = table([*rows, *processes()])
    assert "INVALID: other processes took 30 % of the cores" in said
    line = next(text for text in said.splitlines() if text.startswith("torch.compile bf16"))
    assert line.split()[2:] == ["inductor", "bf16", "15.00", "15.00", "66.7", "1.50", "40.0", "1.0", "s"]
    for words in ("digits, batch 8: it died", "PyTorch bf16: RuntimeError: no", "MISS  ", "pass  ", "no engine"):
        assert words in said
    chart(rows, folder / "race.png")
    with Image.open(folder / "race.png") as picture:
        assert picture.width > picture.height > 400
        drawn = len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0))
        assert drawn > 50
    before = (folder / "race.png").read_bytes()
    rows[0]["contestants"]["diffusers"]["times"] *= 3
    chart(rows, folder / "race.png")
    assert (folder / "race.png").read_bytes() != before


def test_lines() -> None:
    from linear import fitted, line

    assert line([1, 2, 3], [3, 5, 7]) == pytest.approx((2, 1, 1))
    row = fitted("batch", {n: 0.002 + 0.001 * n for n in (1, 2, 4, 64)})
    assert (row["each_ms"], row["fixed_ms"], row["r2"]) == pytest.approx((1, 2, 1), abs=1e-3)
    assert 0.6 < row["log_slope"] < 0.9
    assert fitted("steps", {10: 0.1, 100: 1.0, 1000: 10.0})["log_slope"] == pytest.approx(1)
    assert fitted("steps", {10: 0.1, 20: 0.4, 40: 0.1})["log_r2"] < 0.5


def test_memory_and_the_chart_of_lines(small_bundle_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import linear

    with Sampler.open(small_bundle_path, "onnxruntime") as sampler:
        plan = sampler.plan("ddpm", 20)
    twice = linear.repeated(plan, 2)
    assert len(twice) == 40
    assert twice["n"].tolist() == list(range(40))
    assert np.array_equal(twice["t"][20:], plan["t"])
    monkeypatch.setattr(linear, "STEPS", (2, 4, 8))
    monkeypatch.setattr(linear, "BATCHES", (1, 2))
    monkeypatch.setattr(linear, "ROUNDS", 1)
    monkeypatch.setattr(linear, "EVERY", 20)
    rows = [
        *linear.timed(Bundle.open(small_bundle_path)),
        linear.memory({"bundle": str(small_bundle_path), "steps": 100, "calls": 10}),
    ]
    assert list(rows[2]["kib_after_steps"]) == [20, 40, 60, 80, 100]
    assert list(rows[2]["kib_after_calls"]) == [10]
    assert min(rows[2]["kib_after_steps"].values()) > 10 << 10
    rows = json.loads(json.dumps(rows))
    assert [linear.told(row).split()[0] for row in rows] == ["steps", "batch", "memory:"]
    linear.chart(rows, folder / "linear.png")
    assert (folder / "linear.png").stat().st_size > 10_000
