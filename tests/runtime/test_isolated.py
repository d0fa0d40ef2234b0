"""epsrt.bench.isolated: a function in a process of its own, whose end is sure."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from epsrt import EngineError
from epsrt.bench import isolated

WORKS = """
import atexit, os, pathlib, signal, sys, time
from epsrt.bench import isolated

def work(given):
    print("the last words")
    if given == "die": os.kill(os.getpid(), signal.SIGSEGV)
    if given == "exit": sys.exit(3)
    if given == "fail": raise ValueError("no")
    if given == "sleep":
        try: time.sleep(60)
        except KeyboardInterrupt: pathlib.Path("cleaned").touch(); raise
    if given == "linger": atexit.register(time.sleep, 60)
    if given == "say":
        time.sleep(0.2)
        isolated.say({"half": 0.5})
        time.sleep(0.3)
    return 7
"""


@pytest.fixture
def works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module WORKS."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made_up_works.py").write_text(WORKS)
    monkeypatch.syspath_prepend(tmp_path)
    import made_up_works

    yield made_up_works
    del sys.modules["made_up_works"]


@pytest.mark.parametrize(
    ("given", "said"),
    [("fail", "ValueError: no"), ("die", "SIGSEGV: the last words"), ("exit", "status 3: the last words")],
)
def test_a_failure_is_told(works: ModuleType, given: str, said: str) -> None:
    with pytest.raises(EngineError, match=said):
        isolated.call(works.work, given)


def test_a_process_that_takes_too_long_is_ended_kindly(works: ModuleType) -> None:
    begin = time.monotonic()
    with pytest.raises(isolated.LateError, match="more than the 6 s"):  # enough for a Python to start
        isolated.call(works.work, "sleep", seconds=6.0)
    assert time.monotonic() - begin < 30
    assert Path("cleaned").exists()


def test_a_result_counts_though_its_process_stays(works: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "LINGER_S", 0.2)
    begin = time.monotonic()
    assert isolated.call(works.work, "linger").value == 7
    assert time.monotonic() - begin < 10


def test_what_it_says_is_heard_and_ends_the_watch(works: ModuleType) -> None:
    heard: list[object] = []
    watched: list[int] = []  # how much was heard at each look
    done = isolated.call(
        works.work, "say", heard=lambda at, said: heard.append(said), watch=lambda: watched.append(len(heard))
    )
    assert (done.value, heard) == (7, [{"half": 0.5}])
    assert len(watched) > 4
    assert set(watched) == {0}
