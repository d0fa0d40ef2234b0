"""benchmarks/gpu_quick.py: what is kept, when its parts end. tests/gpu/test_gpu_quick.py runs all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from epsrt import Bundle, Sampler
from epsrt.bench import isolated
from epsrt.parity.measure import worst_psnr
from nets import tiny

pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")
ROOT = Path(__file__).parents[1]
Row = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def benchmarks() -> Iterator[None]:
    """benchmarks/ on the path, as for its scripts."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


HERE: Row = {"gpu": {"name": "one"}, "cores": 2, "kernel": "6.1", "versions": {"torch": "2"}}


def kept(path: Path) -> list[Row]:
    return json.loads(path.read_text())["rows"]


def test_a_row_takes_the_place_of_its_key_in_any_bundle(tmp_path) -> None:
    from gpu_rows import Results

    results = Results(tmp_path / "r.json", HERE)
    key = {"what": "step", "batch": 1, "digest": "a"}
    results.keep(key, ms=1.0)
    results.keep({**key, "batch": 8}, ms=2.0)
    results.keep({**key, "digest": "b"}, ms=3.0)
    assert [(r["batch"], r["digest"], r["ms"]) for r in kept(results.path)] == [(1, "b", 3.0), (8, "a", 2.0)]
    assert Results(results.path, HERE | {"kernel": "6.2"}).rows == results.rows  # which changes no figure
    assert Results(results.path, HERE, fresh=True).rows == kept(results.path) == []


def test_another_machines_rows_are_put_aside(tmp_path, capsys) -> None:
    from gpu_rows import Results

    Results(tmp_path / "r.json", HERE).keep({"what": "x"}, value=1)
    other = Results(tmp_path / "r.json", HERE | {"versions": {"torch": "3"}})
    assert "versions torch: 2, now 3" in capsys.readouterr().out
    assert other.rows == []
    assert kept(tmp_path / "r-before.json")[0]["value"] == 1
    for damaged in ("{", "[]", '{"rows": 1}'):
        (tmp_path / "r.json").write_text(damaged)
        assert Results(tmp_path / "r.json", HERE).rows == []
        assert "starting over" in capsys.readouterr().out


def test_the_file_is_whole_at_any_time(tmp_path) -> None:
    from gpu_rows import Results

    results = Results(tmp_path / "r.json", HERE)
    writer = threading.Thread(target=lambda: [results.keep({"what": "x", "n": n}, value=[n] * 500) for n in range(100)])
    writer.start()
    seen = []
    while writer.is_alive():
        seen.append(len(kept(results.path)))
    writer.join()
    assert len(kept(results.path)) == 100
    assert len(set(seen)) > 2
    assert seen == sorted(seen)


# Parts that count what they measure.
PARTS = """
import logging, os, time
from gpu_rows import Notes

def measure(notes, name, work=lambda: {"value": 1}, digest="a"):
    def counted():
        with open("measured", "a") as file: file.write(name + " ")
        return work()
    return notes.measure({"what": name, "digest": digest}, counted)

def works(given):
    notes = Notes(given)
    for name in "abc": measure(notes, name, digest=given.get("digest", "a"))

def warns(given):
    def warned():
        logging.getLogger("epsrt").warning("%s is slow", "it")
        return {}
    notes = Notes(given)
    measure(notes, "w", warned), measure(notes, "quiet")

def fails(given):
    def no(): raise ValueError("no")
    notes = Notes(given)
    assert measure(notes, "f", no) is None
    assert measure(notes, "g")["value"] == 1

def dies(given):
    notes = Notes(given)
    measure(notes, "before"), measure(notes, "deadly", os.abort), measure(notes, "after")

def falls(given):
    os.abort()

def hangs(given):
    notes = Notes(given)
    measure(notes, "first"), measure(notes, "endless", lambda: time.sleep(60)), measure(notes, "last")

def slow(given):
    notes = Notes(given)
    measure(notes, "slow", lambda: time.sleep(given["slow"]) or {}), measure(notes, "late", lambda: time.sleep(60))
"""


@pytest.fixture
def quick(tmp_path, monkeypatch) -> Callable[..., Any]:
    """quick(names, …) runs such parts: what was left undone. quick.rows() are the rows, quick.measured() the count."""
    import gpu_quick
    from gpu_rows import Results

    (tmp_path / "made_up_parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delitem(sys.modules, "made_up_parts", raising=False)
    import made_up_parts

    monkeypatch.setattr(gpu_quick, "HOPELESS", 0.5)
    names = ("works", "warns", "fails", "dies", "falls", "hangs", "slow")
    monkeypatch.setattr(gpu_quick, "PARTS", {n: gpu_quick.Part(getattr(made_up_parts, n), 6.0) for n in names})
    path = tmp_path / "r.json"

    def run(
        *parts: str, seconds: float = 100.0, beside: Any = None, run: str = "", code: str = "", **given: Any
    ) -> Any:
        results = Results(path, HERE)
        results.run, results.code = run or results.run, code or results.code
        asked = {"results": str(path), "run": results.run, "code": results.code, "retry": False, "keep": False}
        return gpu_quick.run(results, asked | given, list(parts), seconds, tmp_path / "log", beside)

    run.rows = lambda: {row["what"]: row for row in kept(path)}  # type: ignore[attr-defined]
    run.measured = lambda: Path("measured").read_text().split()  # type: ignore[attr-defined]
    return run


def test_nothing_is_measured_twice(quick) -> None:
    for _ in range(2):
        assert quick("works") == []
    assert quick.measured() == ["a", "b", "c"]
    quick("works", digest="b")  # of another bundle
    assert len(quick.measured()) == 6
    quick("works", digest="b", code="other")
    assert len(quick.measured()) == 9
    quick("works", keep=True)
    assert len(quick.measured()) == 9


def test_a_failure_is_a_row_until_it_is_retried(quick) -> None:
    for _ in range(2):
        quick("fails", run="first")
        assert "ValueError: no" in quick.rows()["f"]["error"]
    assert quick.measured() == ["f", "g"]
    quick("fails", run="second", retry=True)
    assert quick.measured() == ["f", "g", "f"]


def test_warnings_are_kept(quick) -> None:
    import gpu_quick

    assert quick("warns") == []
    rows = quick.rows()
    assert rows["w"]["warnings"] == ["it is slow"]
    assert "warnings" not in rows["quiet"]
    failed = {"what": "verify", "batch": 2, "passed": False}
    assert gpu_quick.failures([*rows.values(), failed]) == ["w: it is slow", "verify 2: MISSED"]


def test_a_part_goes_on_after_what_killed_it(quick) -> None:
    for _ in range(2):
        assert quick("dies", "works", retry=True, run="one") == []
    assert quick.measured() == ["before", "deadly", "after", "a", "b", "c"]
    assert "SIGABRT" in quick.rows()["deadly"]["error"]
    assert quick.rows()["after"]["value"] == 1
    (undone,) = quick("falls")  # before it began to measure
    assert "falls" in undone
    assert "SIGABRT" in undone


def test_a_part_that_is_cut_off_costs_its_own_share(quick) -> None:
    undone = quick("hangs", "works")
    assert undone == ["hangs: it was cut off after 6 s"]
    assert "took more than 3 s" in quick.rows()["endless"]["error"]
    assert {"first", "a", "b", "c"} <= set(quick.rows())
    assert quick("hangs") == []  # the next run leaves it out
    assert quick.measured().count("endless") == 1
    assert quick.rows()["last"]["value"] == 1
    quick("slow", slow=4.5)
    assert "error" not in quick.rows().get("late", {})  # it had hardly begun
    assert quick("works", seconds=1.0) == ["works: no time was left"]


def test_parts_that_need_the_export_let_others_go_first(quick, monkeypatch) -> None:
    import gpu_quick

    monkeypatch.setitem(gpu_quick.PARTS, "works", gpu_quick.Part(gpu_quick.PARTS["works"].work, 9.0, exported=True))
    over = threading.Event()
    beside = threading.Thread(target=over.wait, daemon=True)
    beside.start()
    threading.Timer(3.0, over.set).start()
    assert quick("works", "fails", beside=beside) == []
    assert quick.measured() == ["f", "g", "a", "b", "c"]


def test_names() -> None:
    from gpu_rows import name_of

    names = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090", "Tesla T4", "NVIDIA H200")
    assert [name_of(name) for name in names] == ["h100", "a100-sxm4", "rtx-4090", "t4", "h200"]


def test_arithmetic() -> None:
    from common import align, difference
    from gpu_timing import median_ratio, rounds, spread

    assert spread([3.0, 1.0, 2.0]) == {"p50": 2.0, "p95": 2.9, "n": 3}
    assert median_ratio([100, 303, 100], [1, 3, 2], 50) == 2.0
    calls: list[str] = []
    made = rounds({"a": lambda: calls.append("a") or 1, "b": lambda: calls.append("b") or 2}, 3)
    assert made == {"a": [1, 1, 1], "b": [2, 2, 2]}
    assert calls[-6:] == ["a", "b", "b", "a", "a", "b"]
    assert len(calls) >= 8  # one to warm up, at least
    assert len(rounds({"a": lambda: 1}, 20, least=4, seconds=0)["a"]) == 4
    assert align("a|n|last", [["xx", "1", "y"], ["z", "22", "q"]], 1) == ["a    n  last", "xx   1  y", "z   22  q"]
    assert difference({"a": 1, "v": {"t": 1}}, {"a": 1, "v": {"t": 2, "u": 3}}) == "v t: 1, now 2; v u: None, now 3"


def test_the_plain_loop_is_our_ddim(small_bundle_path) -> None:
    """The rivals draw the very samples that we draw, so that a race is of like with like."""
    gpu_torch = pytest.importorskip("gpu_torch")
    import torch

    bundle = Bundle.open(small_bundle_path)
    with Sampler.open(small_bundle_path, "onnxruntime") as sampler:
        want = sampler.sample(3, steps=20, seed=gpu_torch.SEED)
    x_T = gpu_torch.start(3, bundle.manifest.shape)
    for channels_last in (False, True):
        draw = gpu_torch.eager(
            tiny(seed=3), bundle.manifest.schedule, x_T, channels_last=channels_last, device="cpu", dtype=torch.float32
        )
        assert worst_psnr(draw(20), want, bundle.manifest.value_range) >= 90


def test_a_race_is_in_turn_with_ours(small_bundle_path, tmp_path, monkeypatch) -> None:
    """On the CPU: a rival that cannot run is a row, and only what has no row is raced again."""
    import gpu_quick_race as race
    import gpu_torch
    import torch
    from gpu_rows import Results

    results = Results(tmp_path / "r.json", HERE)
    given = {"network": str(small_bundle_path), "results": str(results.path), "run": results.run, "code": results.code}
    given |= {"retry": False, "keep": False, "small": True}
    begun = []

    def rival(name: str, network: str, bundle: Bundle, batch: int) -> Any:
        begun.append(name)
        if name == "diffusers":
            raise ValueError("no diffusers here")
        x_T = gpu_torch.start(batch, bundle.manifest.shape)
        return gpu_torch.eager(tiny(seed=3), bundle.manifest.schedule, x_T, device="cpu", dtype=torch.float32)

    def ours(bundle: Bundle, precision: str, variant: Any, batch: int, stack: Any) -> Any:
        begun.append("ours")
        sampler = stack.enter_context(Sampler.open(bundle.path, "onnxruntime"))
        return lambda steps: sampler.sample(batch, steps=steps, seed=gpu_torch.SEED, rederive=False)

    def say(told: Row) -> None:
        if "key" in told:
            results.keep(told["key"], **told["values"])

    monkeypatch.setattr(race, "rival", rival)
    monkeypatch.setattr(race, "ours", ours)
    monkeypatch.setattr(isolated, "say", say)
    took = {"epsrt": [10.0, 30.0], "PyTorch channels-last": [20.0, 120.0], "PyTorch": [40.0, 60.0]}  # ms
    monkeypatch.setattr(race, "rounds", lambda draws, most, least: {n: took[n] for n, d in draws.items() if d() > 0})
    race.race(given)
    rows = {row["rival"]: row for row in results.rows}
    assert begun == ["ours", "PyTorch channels-last", "diffusers", "PyTorch"]
    assert rows["diffusers"]["error"] == "ValueError: no diffusers here"
    assert rows["epsrt"]["times_ours"] == 1
    times, rates = {"PyTorch channels-last": 3, "PyTorch": 3}, {"PyTorch channels-last": 1428.6, "PyTorch": 2000}
    for name in times:
        assert rows[name]["db_to_ours"] >= 90
        assert rows[name]["times_ours"] == times[name]  # the median of paired ratios: 2 and 4, 4 and 2
        assert rows[name]["image_steps_per_s"] == rates[name]  # 2 of 50 in 70 and 50 ms
    race.race(given)
    assert len(begun) == 4
    results.rows.remove(rows["PyTorch"])
    results.keep({"what": "something else"})
    race.race(given)
    assert begun[4:] == ["ours", "PyTorch"]


def test_flops() -> None:
    import gpu_quick_race

    found = gpu_quick_race.flops("digits")["gflop"]
    assert 0.005 < found < 0.5  # some 10⁷ multiply-adds


def test_without_a_gpu_it_says_so(tmp_path) -> None:
    from epsrt.engines import nvidia

    if not nvidia.driver().problem:
        pytest.skip("this machine has a GPU")
    command = [sys.executable, ROOT / "benchmarks/gpu_quick.py", "--out", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0
    assert nvidia.driver().problem in done.stdout
    assert not list(tmp_path.iterdir())
