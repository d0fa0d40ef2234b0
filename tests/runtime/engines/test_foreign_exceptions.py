"""What a signal's handler raises in the middle of anything comes out as itself, and leaves all as it should be."""

from __future__ import annotations

import os
import random
import signal
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest

import epsrt
from epsrt import Bundle, EngineError, Sample, Sampler, idle_row, open_engine
from epsrt.contents import absolute
from epsrt.machine import cores
from epsrt.verify import verify

SHOTS = 40  # at each engine's steps
ENGINES = ["onnxruntime", "openvino"]


class TimeLimit(Exception):
    """As a task queue has one."""


class Late(OSError):
    """As others have one."""


class Stopped(RuntimeError):
    """And others."""


KINDS = [TimeLimit, Late, Stopped, TimeoutError, RuntimeError]


@pytest.fixture
def alarm():
    """alarm(error, seconds) has a signal's handler raise it, once, so many seconds from now; alarm() says if it did."""
    raised = []

    def handler(number, frame):
        raised.append(frame)
        raise armed[0]

    def arm(error=None, seconds=0.0):
        if error is not None:
            armed[:] = [error]
            raised.clear()
            signal.setitimer(signal.ITIMER_REAL, seconds)
        return raised

    armed: list[Exception] = []
    before = signal.signal(signal.SIGALRM, handler)
    yield arm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def shoot(alarm, work, shots, longest, settled=lambda: None):
    """So many exceptions are raised in the middle of `work`, each at a random time: those that did not come out.

    `settled` runs after each.
    """
    rng, lost = random.Random(5), []
    for shot in range(shots):
        error = KINDS[shot % len(KINDS)]("the task took too long")
        try:
            alarm(error, rng.uniform(1e-4, longest))
            while not alarm():
                work()
            lost.append(f"nothing came out of {traceback.format_stack(alarm()[0])[-2:]}")
        except Exception as came:
            if came is not error:
                lost.append(f"{came!r} came out of {traceback.format_stack(alarm()[0])[-2:]}")
        settled()
    return lost


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("threads", [1, 2])
def test_out_of_a_step(small_bundle_path, alarm, name, threads):
    if threads > cores():
        pytest.skip(f"this machine has {cores()} cores")
    with Sampler.open(small_bundle_path, name, precision="fp32", threads=threads) as sampler:
        want = sampler.sample(2, steps=8, seed=1)

        def same():
            np.testing.assert_array_equal(sampler.sample(2, steps=8, seed=1), want)

        assert shoot(alarm, lambda: sampler.sample(4, steps=8), SHOTS, 0.02, same) == []


@pytest.mark.parametrize("path", ["there", "missing"])
def test_out_of_finding_where_a_path_leads(tmp_path, monkeypatch, alarm, path):
    """Python's own Path.resolve passes over an OSError that is raised in the middle of it."""
    (tmp_path / "there").mkdir()
    alarm(Late("the task took too long"), 1000.0)
    monkeypatch.setattr(os, "lstat", lambda *_, **__: signal.raise_signal(signal.SIGALRM))
    with pytest.raises(Late):
        absolute(tmp_path / path)


@pytest.mark.parametrize("name", ENGINES)
def test_out_of_opening_compiling_and_proving(small_bundle_path, tmp_path, monkeypatch, alarm, name):
    fresh = iter(range(1_000_000))

    def work():
        monkeypatch.setenv("EPSRT_CACHE", str(tmp_path / f"cache-{next(fresh) // 3}"))  # filled, then used
        with open_engine(Bundle.open(small_bundle_path), name, threads=1) as engine, engine.lanes(3) as lanes:
            lanes.advance(np.tile(idle_row(engine.columns), (1, 3, 1)))
            verify(engine)

    work()  # imports, and what is asked once a process
    assert shoot(alarm, work, SHOTS // 4, 0.3) == []


@pytest.mark.parametrize("name", ENGINES)
def test_out_of_any_line_of_the_runtime(small_bundle_path, tmp_path, monkeypatch, name):
    """A tracer raises where a signal's handler might: at lines spread over all that opening and sampling run."""
    monkeypatch.setenv("EPSRT_CACHE", str(tmp_path))
    ours = str(Path(epsrt.__file__).parent)
    left, error = [sys.maxsize], Late("too late")

    def tracer(frame, event, argument):
        if not frame.f_code.co_filename.startswith(ours):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] < 0:
                raise error
        return tracer

    def work(lines):
        left[0] = lines
        sys.settrace(tracer)
        try:
            with Sampler.open(small_bundle_path, name, threads=1) as sampler:
                sampler.sample(2, steps=2)
        finally:
            sys.settrace(None)
        return lines - left[0]

    work(sys.maxsize)  # imports, and what is asked once a process
    lines = work(sys.maxsize)
    for at in range(0, lines, lines // 60):
        with pytest.raises(Late) as caught:
            work(at)
        assert caught.value is error


@pytest.mark.parametrize("name", ENGINES)
def test_lanes_whose_step_did_not_end_are_refused(small_bundle_path, monkeypatch, name):
    with open_engine(Bundle.open(small_bundle_path), name, precision="fp32", threads=1) as engine:
        lanes, row = engine.lanes(1), idle_row(engine.columns)[None, None]
        lanes.write(0, Sample())
        lanes.advance(row)

        def stopped():
            raise Stopped

        with monkeypatch.context() as patch:
            patch.setattr(lanes, "_runs", [stopped, stopped])
            with pytest.raises(Stopped):
                lanes.advance(row)
        for use in (lambda: lanes.advance(row), lambda: lanes.read(0)):
            with pytest.raises(EngineError, match="an earlier advance of these lanes failed: .* make new lanes"):
                use()
