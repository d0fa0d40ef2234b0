"""Timing, reports, comparison, and the description of the machine."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from epsrt import Bundle, EngineError, EpsrtError, NotFiniteError, machine, open_engine
from epsrt.bench import child, group, isolated, others, run, timing
from epsrt.bench.compare import compare, judged, noise_band
from epsrt.bench.report import (
    Case,
    Figures,
    Of,
    Report,
    Row,
    Workload,
    paired_ratio,
    read,
    spread,
    startup,
    with_ratios,
    write,
)
from epsrt.engines import ENGINES, probe
from epsrt.request import Request


class Slow:
    """An engine whose step takes `seconds`, or fails after `lives` steps; one batch at most, as wide as it likes."""

    device, graph, precision, max_batch, batch_limit = "cpu", None, "fp32", 8, "the bundle's largest"

    def __init__(self, name: str, bundle: Bundle, seconds: float, log: list[str], lives: float = math.inf):
        self.name, self.bundle, self.seconds, self.log, self.lives = name, bundle, seconds, log, lives
        self.columns = bundle.graph("fp32").columns
        self.closed = False

    def lanes(self, batch: int, size: Any = None) -> Slow:
        self.batch = batch
        return self

    def write(self, index: int, sample: Any, state: Any = None) -> None:
        assert 0 <= index < self.batch

    def advance(self, rows: Any) -> None:
        assert rows.shape == (len(rows), self.batch, len(self.columns))
        for _ in rows:
            self.log.append(self.name)
            self.lives -= 1
            if self.lives < 0:
                raise NotFiniteError("lane 0 is not finite")
            time.sleep(self.seconds)

    def wait(self, ahead: int = 0) -> None:
        pass

    def read(self, index: int, what: str = "x") -> Any:
        return np.zeros(self.bundle.manifest.shape, np.float32)

    def close(self) -> None:
        self.closed = True


def course(engine: Any, *, batch: int = 1, steps: int = 4, seconds: float | None = None) -> timing.Course:
    case = Case(engine.name, engine.precision, batch)
    return timing.Course(case, engine, Request(batch, method="ddim", steps=steps), seconds)


def never(case: Case, error: EpsrtError) -> None:
    raise AssertionError((case, error))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less of what makes figures steady."""
    for name, value in {"WARM_S": 0.0, "SETTLE_S": 0.0, "ROUND_S": 0.0, "REST_S": 0.005}.items():
        monkeypatch.setattr(timing, name, value)


@pytest.fixture
def bundle(small_bundle_path: Path) -> Bundle:
    return Bundle.open(small_bundle_path)


def test_the_figures_are_those_of_the_engine(bundle: Bundle) -> None:
    with course(Slow("a", bundle, 0.01, []), batch=3) as timed:
        (kept,) = timing.alternate([timed], None, 3, never)
    figures = kept.figures(1 << 20, (0.5,))
    assert len(figures.rounds_ms) == 3
    assert figures.steps_a_round == 4
    assert 10 <= figures.step_ms_p50 <= figures.step_ms_p95 < 40
    assert 25 < figures.steps_per_s <= 100
    assert figures.images_per_s == pytest.approx(3 * figures.steps_per_s / 4, rel=0.5)
    assert figures.images_per_s < 3 * figures.steps_per_s / 4  # what a request takes beside its steps


def test_a_long_trajectory_is_cut_and_its_rest_counted(bundle: Bundle) -> None:
    engine = Slow("a", bundle, 0.021, log := [])
    with course(engine, steps=50, seconds=0.3) as timed:
        assert timed.steps_a_round == pytest.approx(0.3 / 7 / 0.021, abs=1.1)
        begun = len(log)
        timed.round()
        assert len(log) == begun + timing.SETTLE_STEPS + timed.steps_a_round  # slow: waited for, and timed once
    assert timed.timed.request[0] == pytest.approx(50 * timed.timed.step[0], rel=0.1)


def test_however_slow_there_are_rounds(bundle: Bundle) -> None:
    with course(Slow("a", bundle, 0.03, []), steps=20, seconds=0.01) as timed:
        assert timed.steps_a_round == 1
        (kept,) = timing.alternate([timed], 0.01, 0, never)
    assert len(kept.timed.step) == timing.LEAST


def test_engines_take_turns(bundle: Bundle) -> None:
    log: list[str] = []
    with ExitStack() as stack:
        courses = [stack.enter_context(course(Slow(name, bundle, 0.001, log))) for name in "ab"]
        log.clear()
        timing.alternate(courses, None, 4, never)
    turns = [name for i, name in enumerate(log) if i == 0 or log[i - 1] != name]
    assert turns == ["a", "b", "a", "b", "a"]  # ab ba ab ba
    assert len({len(c.timed.step) for c in courses}) == 1


def test_time_bounds_the_rounds(bundle: Bundle) -> None:
    with course(Slow("a", bundle, 0.001, []), seconds=0.4) as timed:
        begin = time.perf_counter()
        timing.alternate([timed], 0.4, 0, never)
        assert time.perf_counter() - begin >= 0.4
    assert len(timed.timed.step) >= timing.LEAST


def test_an_engine_that_fails_leaves_the_others_their_rounds(bundle: Bundle) -> None:
    failed: list[str] = []
    with ExitStack() as stack:
        courses = [
            stack.enter_context(course(Slow(name, bundle, 0.001, [], lives)))
            for name, lives in (("a", 40), ("b", math.inf))
        ]
        kept = timing.alternate(courses, None, 6, lambda case, error: failed.append(f"{case}: {error}"))
    assert failed == ["a fp32 batch 1: lane 0 is not finite"]
    assert [c.case.engine for c in kept] == ["b"]
    assert len(kept[0].timed.step) == 6


def test_a_course_that_cannot_begin_closes_its_lanes(bundle: Bundle) -> None:
    engine = Slow("a", bundle, 0.0, [], lives=0)
    with pytest.raises(NotFiniteError):
        course(engine)
    assert engine.closed


def test_a_round_waits_for_threads_that_still_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "REST_S", 0.02)
    stop = time.perf_counter() + 0.25

    def spin() -> None:
        while time.perf_counter() < stop:
            pass

    threading.Thread(target=spin).start()
    timing.rest()
    assert time.perf_counter() >= stop
    begin = time.perf_counter()
    timing.rest()
    assert time.perf_counter() - begin < 0.2


def test_a_real_engine_runs_a_course(bundle: Bundle) -> None:
    with course(open_engine(bundle, "onnxruntime", threads=1), batch=2) as timed:
        timing.alternate([timed], None, 2, never)
        figures = timed.figures(None, ())
    assert figures.memory is None
    assert figures.steps_per_s > 1


# a process of its own


def task(path: Path, **changes: Any) -> isolated.Task:
    given = {
        "bundle": str(path),
        "engine": "onnxruntime",
        "precision": "fp32",
        "threads": 1,
        "trust_engines": False,
        "method": "ddim",
        "steps": 2,
        "label": None,
        "batch": 2,
    }
    return isolated.Task(**{**given, **changes})


def test_a_process_tells_its_start_and_its_memory(small_bundle_path: Path) -> None:
    begin = time.perf_counter()
    found = isolated.run(task(small_bundle_path))
    assert found.startup_s is not None
    assert 0.05 < found.startup_s < time.perf_counter() - begin
    assert found.memory is not None
    assert 20 << 20 < found.memory < 1 << 30


def test_memory_is_the_process_s_own(small_bundle_path: Path) -> None:
    """Not that of its parent, which ru_maxrss would have been."""
    code = """
import sys
import numpy as np
from epsrt.bench import child, isolated
import msgspec
ballast = np.ones(400 << 20, np.uint8)
print(isolated.run(msgspec.json.decode(sys.argv[1], type=isolated.Task)).memory, child.peak_memory()[0])
"""
    argument = msgspec.json.encode(task(small_bundle_path)).decode()
    done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=True)
    child, parent = map(int, done.stdout.split())
    assert parent > 400 << 20
    assert child < 300 << 20


def test_memory_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    peak, what = child.peak_memory()
    assert what == "VmHWM"
    monkeypatch.setattr(child, "STATUS", tmp_path / "none")
    other, what = child.peak_memory()
    assert what == "ru_maxrss"
    assert other == pytest.approx(peak, rel=0.5)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert child.peak_memory() == (None, "not measured")


def test_what_fails_in_the_process_is_its_sentence(small_bundle_path: Path) -> None:
    with pytest.raises(EngineError, match="batch = 99 is outside 1 … 4"):
        isolated.run(task(small_bundle_path, batch=99))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.kill(os.getpid(), 9)", "its process ended with SIGKILL$"),
        ("import sys; sys.exit('no room')", "its process ended with status 1: no room$"),
    ],
)
def test_a_process_that_dies_is_a_sentence(
    code: str, words: str, small_bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: popen([sys.executable, "-c", code], **more))
    with pytest.raises(EngineError, match=words):
        isolated.run(task(small_bundle_path))


def test_a_start_that_takes_too_long_is_none(small_bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    monkeypatch.setattr(isolated, "say", said.append)
    monkeypatch.setattr(isolated, "START_LIMIT_S", 0.0)
    isolated.serve(msgspec.to_builtins(task(small_bundle_path, batch=0)))
    assert said == [False]


# other processes


def test_other_processes_are_noticed() -> None:
    before, end = others.clocks(), time.process_time() + 0.5
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        while time.process_time() < end:
            pass
        during = others.clocks()  # a child that has not been waited for is another process still
        other.kill()
    assert before is not None
    assert during is not None
    assert during[1] - before[1] > 0.4  # its own
    share = others.others_share(before, during)
    assert share is not None
    assert share > 0.1
    assert others.others_share((0.0, 0.0, 0.0), (5.0, 4.0, 1.0)) == round(1 / (os.cpu_count() or 1), 3)
    assert others.others_share((0.0, 0.0, 0.0), (5.0, 5.1, 1.0)) == 0


def test_a_system_that_does_not_tell_of_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(others, "STAT", tmp_path / "none")
    assert others.clocks() is None
    assert others.others_share(None, None) is None


# which engines


def opened(bundle: Bundle, **asked: Any) -> run.Ready:
    with ExitStack() as stack:
        return run.opened(bundle, run.Asked(**{"batches": (1,), **asked}), stack, lambda what, fraction: None)


def test_all_takes_what_runs_and_says_why_the_others_do_not(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "open_engine", lambda bundle, name, **options: Slow(name, bundle, 0.0, []))
    lacking = {"tensorrt": "no NVIDIA driver", "onnxruntime-cuda": "no NVIDIA driver"}
    monkeypatch.setattr(probe, "state", lambda name: probe.State(name not in lacking, "", lacking.get(name, ""), ""))
    ready = opened(bundle, engines=("all",))
    assert [row.engine for row in ready.refused] == ["tensorrt", "onnxruntime-cuda"]
    assert {row.reason for row in ready.refused} == {"no NVIDIA driver"}
    assert [e.name for e in ready.engines] == [name for name in ENGINES if name not in lacking]


def refusing(bundle: Bundle, sentence: str, only: str) -> Callable[..., Any]:
    def open_it(_: Bundle, name: str, **options: Any) -> Any:
        if name == only:
            raise EngineError(sentence)
        return Slow(name, bundle, 0.0, [])

    return open_it


def test_a_named_engine_that_does_not_open_is_an_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one of `all` is a row: so it is with bf16 on a processor without."""
    sentence = "this processor has no bf16: use precision fp32"
    name = next(probe.available())
    monkeypatch.setattr(run, "open_engine", refusing(bundle, sentence, name))
    monkeypatch.setattr(probe, "state", lambda name: probe.State(True, "", "", ""))
    with pytest.raises(EngineError, match=sentence):
        opened(bundle, engines=(name,), precisions=("bf16",))
    ready = opened(bundle, engines=("all",), precisions=("bf16",))
    assert ready.refused == (Row(name, "bf16", None, sentence),)
    assert name not in [e.name for e in ready.engines]


def test_where_nothing_opens_the_sentence_is_the_engines_own(bundle: Bundle) -> None:
    with pytest.raises(EpsrtError, match="precision 'fp8' is unknown"):
        opened(bundle, engines=("all",), precisions=("fp8",))


def test_one_engine_asked_for_twice_is_measured_once(bundle: Bundle) -> None:
    ready = opened(bundle, engines=("onnxruntime", "onnxruntime"), precisions=(None, "fp32"), threads=1)
    assert [(e.engine, e.precision, e.built) for e in ready.openings] == [("onnxruntime", "fp32", False)]


def test_what_is_built_is_told(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def building(_: Bundle, name: str, *, on_progress: Any, **options: Any) -> Slow:
        on_progress("building", 0.5)
        return Slow(name, bundle, 0.0, [])

    monkeypatch.setattr(run, "open_engine", building)
    assert [o.built for o in opened(bundle, engines=("onnxruntime",)).openings] == [True]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"engines": ("onnxrumtime",)}, "engine 'onnxrumtime' is unknown: did you mean onnxruntime"),
        ({"engines": ()}, "nothing to measure"),
        ({"batches": (0,)}, "batch = 0"),
        ({"seconds": 0.0}, "seconds = 0.0"),
        ({"seconds": math.nan}, "seconds = nan"),
        ({"seconds": None, "rounds": 0}, "rounds = 0"),
    ],
)
def test_what_cannot_be_asked(asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EpsrtError, match=sentence):
        run.Asked(**asked)


@pytest.mark.usefixtures("one_start")
def test_a_bench_grows_batch_by_batch(bundle: Bundle) -> None:
    asked = run.Asked(
        engines=("onnxruntime",), batches=(2, 1), method="ddpm", steps=3, threads=1, seconds=None, rounds=2
    )
    with ExitStack() as stack:
        ready = run.opened(bundle, asked, stack, lambda what, fraction: None)
        reports = list(run.bench(bundle, asked, ready))
    assert [len(r.measured) for r in reports] == [0, 1, 2]
    assert [r.complete for r in reports] == [False, False, True]
    assert [[c.batch for c in r.missing] for r in reports] == [[1, 2], [2], []]
    last = reports[-1]
    assert (last.request.method, last.request.steps, last.bundle.digest) == ("ddpm", 3, bundle.manifest.digest)
    assert [row.ratio for row in last.rows] == [1.0, 1.0]
    assert all(len(f.rounds_ms) == 2 and f.memory for f in last.measured.values())
    assert len(startup(last, "onnxruntime", "fp32")) == 1


def test_a_slow_start_is_measured_once(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request is the same for every batch. A quick one is repeated."""
    monkeypatch.setenv("EPSRT_CACHE", str(tmp_path))  # into the shared one another process may put something meanwhile
    tasks: list[isolated.Task] = []

    def starting(seconds: float) -> Callable[[isolated.Task], isolated.Found]:
        return lambda task: tasks.append(task) or isolated.Found(seconds if task.start else None, 1)

    asked = run.Asked(engines=("onnxruntime",), batches=(1, 2), steps=2, threads=1, seconds=None, rounds=1)
    for seconds, expected in ((10.0, [True, False]), (0.1, [True] * 10)):
        tasks.clear()
        monkeypatch.setattr(isolated, "run", starting(seconds))
        monkeypatch.setattr(group, "STARTS_S", 3.0)
        with ExitStack() as stack:
            *_, last = run.bench(bundle, asked, run.opened(bundle, asked, stack, lambda what, fraction: None))
        assert len(startup(last, "onnxruntime", "fp32")) == sum(expected)
        if seconds > group.STARTS_S:
            assert [(t.start, t.batch) for t in tasks] == [(False, 1), (True, 0), (False, 2)]
        else:  # memory first, of a process that does nothing but the batch
            assert [(t.start, t.batch) for t in tasks] == [
                (start, batch) for n in (1, 2) for start, batch in ((False, n), *[(True, 0)] * 5)
            ]


def test_a_process_that_built_something_is_started_again(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's memory and time are no sampler's."""
    kept, tasks = {"a"}, list[isolated.Task]()

    def building(task: isolated.Task) -> isolated.Found:
        tasks.append(task)
        cold = task.batch not in kept
        kept.add(task.batch)  # type: ignore[arg-type]
        return isolated.Found(9.0 if cold else 0.1, 900 if cold else 100)

    monkeypatch.setattr(isolated, "run", building)
    monkeypatch.setattr(group, "_built", lambda: set(kept))
    asked = run.Asked(engines=("onnxruntime",), batches=(2,), steps=2, threads=1, seconds=None, rounds=1)
    with ExitStack() as stack:
        *_, last = run.bench(bundle, asked, run.opened(bundle, asked, stack, lambda what, fraction: None))
    (found,) = last.measured.values()
    assert found.memory == 100
    assert found.startup_s == (0.1,) * 5
    assert [t.batch for t in tasks] == [2, 2, 0, 0, 0, 0, 0, 0]


def test_a_process_that_need_not_start_measures_memory(small_bundle_path: Path) -> None:
    found = isolated.run(task(small_bundle_path, start=False))
    assert found.startup_s is None
    assert found.memory


def test_a_case_that_fails_is_a_row(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(task: isolated.Task) -> Any:
        raise EngineError("its process ended with SIGKILL")

    monkeypatch.setattr(isolated, "run", dying)
    asked = run.Asked(engines=("onnxruntime",), batches=(1,), steps=2, threads=1, seconds=None, rounds=1)
    with ExitStack() as stack:
        *_, last = run.bench(bundle, asked, run.opened(bundle, asked, stack, lambda what, fraction: None))
    assert last.rows == (Row("onnxruntime", "fp32", 1, "its process ended with SIGKILL"),)
    assert last.complete


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [({"batches": (1, 5)}, "batch = 5 is outside 1 … 4"), ({"method": "ddmp"}, "method 'ddmp' is unknown")],
)
def test_what_the_bundle_cannot_do_is_refused_before_an_engine_opens(
    asked: dict[str, Any], sentence: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "open_engine", None)
    with pytest.raises(EpsrtError, match=sentence):
        opened(bundle, engines=("onnxruntime",), **asked)


# reports


def figures(rate: float = 100.0, noise: float = 0.0, memory: int | None = 1 << 26, starts: float = 0.5) -> Figures:
    rounds = tuple(1e3 / rate * (1 + noise * s) for s in (-2, -1, -0.5, 0, 0, 0, 0.5, 1, 2))
    return Figures(
        rate,
        spread(rounds),
        rate,
        10.0,
        12.0,
        rounds,
        20,
        memory,
        (starts, starts * 1.01, starts * 0.99, starts, starts),
    )


def report(rows: dict[tuple[str, int], Figures | str], **changes: Any) -> Report:
    found = tuple(
        Row(engine, "fp32", batch, *((f,) if isinstance(f, str) else ("", f))) for (engine, batch), f in rows.items()
    )
    base = Report(
        2,
        "2026-11-21T00:00:00+00:00",
        Of("x.epsrt", "d" * 64),
        Workload("ddim", 20, None),
        (1,),
        "VmHWM",
        {"processor": "P", "cores": 2, "versions": {"onnxruntime": "1.31"}},
        (),
        True,
        (),
        with_ratios(found),
    )
    return msgspec.structs.replace(base, **changes)


def test_reports_survive_their_file(tmp_path: Path) -> None:
    made = report({("a", 1): figures(), ("b", 1): figures(50), ("c", 1): "it died"})
    write(tmp_path / "r.json", made)
    assert read(tmp_path / "r.json") == made
    assert [row.ratio for row in made.rows] == [1.0, pytest.approx(0.5), None]


def test_a_report_of_the_format_before_is_read(tmp_path: Path) -> None:
    write(tmp_path / "r.json", report({("a", 1): figures()}))
    value = json.loads((tmp_path / "r.json").read_text())
    for name in ("rivals", "device", "peak", "uncounted"):
        del value[name]
    for name in ("cost", "device"):
        del value["rows"][0]["figures"][name]
    del value["bundle"]["network"], value["bundle"]["parameters"]
    (tmp_path / "r.json").write_text(json.dumps({**value, "format": 1}))
    assert set(verdicts_of(read(tmp_path / "r.json"), report({("a", 1): figures()})).values()) == {"same"}


def test_the_ratio_is_of_neighbours_in_time() -> None:
    """Both grow slower together: the ratio of what was timed side by side stays."""
    assert paired_ratio((1.0, 2.0, 4.0), (2.0, 4.0, 8.0)) == 0.5


def damaged(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    write(path, report({("a", 1): figures(), ("b", 1): figures()}))
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.update(format=3), "has format 3, this epsrt reads 2: measure again"),
        (lambda v: v.update(more=1), "unknown field `more`"),
        (lambda v: v.pop("rows"), "missing required field `rows`"),
        (lambda v: v["rows"][0]["figures"].update(steps_per_s=-1), "steps_per_s"),
        (lambda v: v["rows"][0]["figures"].update(rounds_ms=[]), "rounds_ms"),
        (lambda v: v["rows"].append(v["rows"][0]), "contradicts itself"),
        (lambda v: v.update(complete=False), "contradicts itself"),
        (
            lambda v: v.update(complete=False, missing=[{"engine": "a", "precision": "fp32", "batch": 1}]),
            "contradicts itself",
        ),
    ],
)
def test_a_damaged_report_is_a_sentence(change: Callable[[dict[str, Any]], object], words: str, tmp_path: Path) -> None:
    with pytest.raises(EpsrtError, match=words):
        read(damaged(tmp_path / "r.json", change))


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": "1"}'])
def test_what_is_no_report_is_a_sentence(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(raw)
    with pytest.raises(EpsrtError, match="holds no bench's results"):
        read(tmp_path / "r.json")
    with pytest.raises(EpsrtError, match="is a directory"):
        read(tmp_path)
    with pytest.raises(EpsrtError, match="does not exist"):
        read(tmp_path / "other.json")


# comparison


def verdicts(a: Figures, b: Figures, band: float = 0.05) -> dict[str, str]:
    return verdicts_of(report({("e", 1): a}), report({("e", 1): b}), band)


def verdicts_of(a: Report, b: Report, band: float = 0.05) -> dict[str, str]:
    return {change.what: change.verdict for change in compare(a, b, band).changes}


def test_a_report_equals_itself() -> None:
    assert set(verdicts(figures(), figures()).values()) == {"same"}


@pytest.mark.parametrize(
    ("changed", "what", "verdict"),
    [
        ({"rate": 90.0}, "steps/s", "regression"),
        ({"rate": 110.0}, "steps/s", "gain"),
        ({"rate": 96.0}, "steps/s", "same"),
        ({"rate": 104.0}, "steps/s", "same"),
        ({"memory": 1 << 27}, "memory", "regression"),
        ({"memory": 1 << 25}, "memory", "gain"),
        ({"starts": 0.6}, "start-up", "regression"),
        ({"starts": 0.4}, "start-up", "gain"),
    ],
)
def test_a_change_is_seen(changed: dict[str, Any], what: str, verdict: str) -> None:
    found = verdicts(figures(), figures(**changed))
    assert found.pop(what) == verdict
    assert set(found.values()) == {"same"}


def test_noise_is_no_change() -> None:
    """10 % less in rounds that differ by 10 % is not told from chance; in steady ones it is."""
    assert verdicts(figures(noise=0.1), figures(90.0, noise=0.1))["steps/s"] == "same"
    assert verdicts(figures(noise=0.01), figures(90.0, noise=0.01))["steps/s"] == "regression"
    assert verdicts(figures(), figures(90.0), band=0.2)["steps/s"] == "same"


def test_the_band_is_exceeded_by_chance_in_few_comparisons() -> None:
    rng = np.random.default_rng(0)
    for n, share in ((7, 0.02), (9, 0.015), (15, 0.003)):
        a, b = rng.normal(1, 0.1, (2, 2000, n))
        beyond = [
            judged(float(np.median(x) / np.median(y)), noise_band(tuple(x), tuple(y), 0.0), True) != "same"
            for x, y in zip(a, b, strict=True)
        ]
        assert np.mean(beyond) < share


def test_the_band_is_as_wide_both_ways() -> None:
    assert judged(2.0, 1.0, True) == judged(0.5, 1.0, True) == "same"
    assert judged(2.01, 1.0, True) == judged(0.49, 1.0, False) == "gain"


def test_too_few_starts_are_not_judged() -> None:
    few = msgspec.structs.replace(figures(), startup_s=(0.5,))
    assert verdicts(few, msgspec.structs.replace(few, startup_s=(5.0,)))["start-up"] == "not judged"


def test_what_another_way_of_measuring_found_is_not_compared() -> None:
    a, b = report({("e", 1): figures()}), report({("e", 1): figures(memory=1 << 30)}, memory_of="ru_maxrss")
    assert "memory" not in {change.what for change in compare(a, b).changes}


def test_a_lost_case_is_a_regression() -> None:
    a, b = report({("e", 1): figures(), ("f", 1): figures()}), report({("e", 1): "it died", ("f", 1): figures()})
    found = compare(a, b)
    assert found.lost == ((Case("e", "fp32", 1), "it died"),)
    assert found.regressed
    assert not compare(b, a).regressed
    assert compare(b, a).only_b == (Case("e", "fp32", 1),)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([Row("e", None, None, "no library")], "no library"),
        ([Row("e", "fp32", None, "no kernel")], "no kernel"),
        ([Row("e", "bf16", 1, "", figures(50))], "it ran in bf16 instead"),
    ],
)
def test_an_engine_that_does_not_open_or_changes_its_precision_is_lost(rows: list[Row], reason: str) -> None:
    a, other = report({("e", 1): figures(), ("f", 1): figures()}), report({("f", 1): figures()})
    found = compare(a, msgspec.structs.replace(other, rows=(*other.rows, *rows)))
    assert found.lost == ((Case("e", "fp32", 1), reason),)
    assert found.regressed
    assert not found.only_a


def test_a_precision_that_was_not_asked_for_again_is_not_lost() -> None:
    both = (Row("e", "fp32", 1, "", figures()), Row("e", "bf16", 1, "", figures()))
    a, b = (msgspec.structs.replace(report({}), rows=rows) for rows in (both, both[1:]))
    assert not compare(a, b).regressed
    assert compare(a, b).only_a == (Case("e", "fp32", 1),)


def test_few_rounds_are_not_judged() -> None:
    few = msgspec.structs.replace(figures(), rounds_ms=(10.0,) * 6)
    assert verdicts(few, msgspec.structs.replace(few, steps_per_s=10.0))["steps/s"] == "not judged"


def test_what_is_in_one_alone_is_named() -> None:
    a = report({("e", 1): figures(), ("e", 8): figures()})
    b = report({("e", 1): figures()}, complete=False, missing=(Case("e", "fp32", 8),))
    found = compare(a, b)
    assert found.only_a == (Case("e", "fp32", 8),)
    assert not found.regressed
    assert found.warnings == ("B was cut short, without e fp32 batch 8",)


def test_other_machines_and_versions_are_said() -> None:
    other = {"processor": "Q", "cores": 2, "versions": {"onnxruntime": "1.32", "openvino": "2026.4"}}
    found = compare(report({("e", 1): figures()}), report({("e", 1): figures()}, machine=other))
    assert found.warnings == (
        "the machines differ in processor: P and Q",
        "the versions differ: onnxruntime 1.31 → 1.32, openvino none → 2026.4",
    )


def test_of_two_gpus_what_differs_is_said() -> None:
    a, b = ({"gpu": {"name": "X", "cuda": "13.0", "clocks.max.sm": mhz}} for mhz in (1980.0, 1755.0))
    found = compare(report({("e", 1): figures()}, machine=a), report({("e", 1): figures()}, machine=b))
    assert found.warnings == ("the machines differ in gpu: clocks.max.sm 1980.0 and clocks.max.sm 1755.0",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bundle": Of("y.epsrt", "e" * 64)}, "A is of the bundle x.epsrt .d{12}., B of y.epsrt"),
        ({"request": Workload("ddpm", 20, None)}, "differ in method, ddim and ddpm"),
        ({"request": Workload("ddim", 50, None)}, "differ in steps, 20 and 50"),
        ({"request": Workload("ddim", 20, 1)}, "differ in threads, all and 1"),
    ],
)
def test_other_work_is_not_compared(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(EpsrtError, match=words):
        compare(report({("e", 1): figures()}), report({("e", 1): figures()}, **changes))


def test_no_case_in_common() -> None:
    with pytest.raises(EpsrtError, match="no case is in both: A has e fp32 batch 1, and B f fp32 batch 8"):
        compare(report({("e", 1): figures()}), report({("f", 8): figures()}))


# the machine


def test_the_machine_is_described() -> None:
    found = machine.describe()
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert found["versions"]["numpy"] == np.__version__
    assert found["memory_mib"] > 100
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert found["avx2"] == ("avx2" in flags)
    assert found["avx512"] == ("avx512f" in flags)
    assert json.loads(json.dumps(found)) == found


def test_a_machine_that_says_little(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    found = machine.describe(packages=("numpy", "no-such-package"))
    assert found["amx"] is None
    assert found["processor"]
    assert set(found["versions"]) == {"epsrt", "numpy"}


def test_flags_become_instruction_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: Some CPU\nflags\t\t: avx2 avx_vnni amx_tile\n")
    monkeypatch.setattr(machine, "CPUINFO", info)
    found = machine.describe()
    assert found["processor"] == "Some CPU"
    assert [found[name] for name in machine.INSTRUCTIONS] == [True, False, True, False, True]


def test_a_container_s_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(f"{1 << 29}\n")
    found = machine.describe()
    assert (found["cpu_quota"], found["memory_mib"]) == (0.5, 512)
    assert machine.physical_cores() == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    found = machine.describe()
    assert "cpu_quota" not in found
    assert found["memory_mib"] > 512
