"""After a fork: a sentence where there would be a hang, and a fork that ends; and what works in one."""

from __future__ import annotations

import os
import sys

import pytest

from epsrt.machine import cores
from helpers import run_python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

FORK = """
import os, signal, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import numpy as np
from epsrt import Bundle, EpsrtError, Sampler, idle_row, open_engine

def in_fork(work):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(30)
        try:
            said = str(work())
        except EpsrtError as error:
            said = str(error)
        os.write(write, said.encode())
        os.close(write)
        sys.exit(0)  # as programs end: the interpreter destroys what it has
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    print(said, "| ended with", os.waitpid(child, 0)[1], flush=True)

path, name, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])

def opened(name=name):
    return Sampler.open(path, name, precision="fp32", threads=threads)
"""
OPENED_BEFORE = "what was opened before a fork cannot be used in it, for threads do not come along: open it after the "
ENDED = "| ended with 0"


def lines(code, *args, env=None):
    done = run_python(FORK + code, *args, env={"CUDA_VISIBLE_DEVICES": "", **(env or {})})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("threads", [1, 2])
def test_what_was_opened_before_is_refused(small_bundle_path, name, threads):
    if threads > cores():
        pytest.skip(f"this machine has {cores()} cores")
    code = """
sampler = opened()
want = sampler.sample(2, steps=2)
engine = sampler.engine
lanes = engine.lanes(2)
rows = np.tile(idle_row(engine.columns), (1, 2, 1))
for work in (
    lambda: sampler.sample(2, steps=2),
    lambda: sampler.sample(3, steps=2),
    lambda: next(sampler.stream(2, steps=2)),
    lambda: engine.lanes(1),
    lambda: lanes.advance(rows),
):
    in_fork(work)
in_fork(lambda: [each.close() for each in (lanes, sampler, engine)])
print(np.array_equal(sampler.sample(2, steps=2), want))
"""
    *refused, closed, unchanged = lines(code, small_bundle_path, name, threads)
    assert len(refused) == 5
    for said in refused:
        assert said.startswith(OPENED_BEFORE)
        assert said.endswith(f"start processes with spawn {ENDED}")
    assert (closed, unchanged) == (f"[None, None, None] {ENDED}", "True")


def test_a_lock_that_another_thread_held_is_not_waited_for(small_bundle_path):
    code = """
sampler = opened()
held, over = threading.Event(), threading.Event()
def hold():
    with sampler._graphs._lock, sampler._graphs._opening, sampler._pool._lock, sampler.engine._lock:
        held.set()
        over.wait(60)
threading.Thread(target=hold).start()
held.wait(60)
in_fork(lambda: sampler.sample(1, steps=1))
in_fork(sampler.close)
over.set()
"""
    refused, closed = lines(code, small_bundle_path, "openvino", 1)
    assert refused.startswith(OPENED_BEFORE)
    assert refused.endswith(ENDED)
    assert closed == f"None {ENDED}"


def test_what_is_opened_in_the_fork(small_bundle_path):
    """onnxruntime can be; OpenVINO cannot once it was used, and auto passes over it."""
    code = """
want = opened().sample(2, steps=2)
in_fork(lambda: np.array_equal(opened().sample(2, steps=2), want))
in_fork(lambda: opened("auto").engine.name)
"""
    assert lines(code, small_bundle_path, "onnxruntime", 1)[0] == f"True {ENDED}"
    refused, auto = lines(code, small_bundle_path, "openvino", 1)
    assert refused == (
        "a fork of a process that has used OpenVINO cannot use it: start processes with spawn, or take onnxruntime "
        + ENDED
    )
    assert auto == f"onnxruntime {ENDED}"


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_fork_before_any_use_works(small_bundle_path, name):
    code = """
in_fork(lambda: opened().sample(2, steps=2).shape)
import epsrt.engines.ort_library, epsrt.engines.cpu.openvino
in_fork(lambda: opened().sample(2, steps=2).shape)
"""
    assert lines(code, small_bundle_path, name, 1) == [f"(2, 1, 8, 8) {ENDED}"] * 2


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_spawned_processes_work(small_bundle_path, tmp_path, name):
    script = tmp_path / "script.py"
    script.write_text("""
import multiprocessing, sys
from epsrt import Sampler
def draw(_):
    with Sampler.open(sys.argv[1], sys.argv[2], precision="fp32", threads=1) as sampler:
        return sampler.sample(1, steps=2).tolist()
if __name__ == "__main__":
    mine = draw(0)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map_async(draw, [0]).get(100) == [mine])
""")
    code = (
        "import subprocess, sys; print(subprocess.run([sys.executable, *sys.argv[1:]], capture_output=True, text=True))"
    )
    done = run_python(code, script, small_bundle_path, name)
    assert "stdout='True\\n'" in done.stdout, done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells of threads")
@pytest.mark.parametrize("threads", [1, 2])
def test_openvino_has_few_threads_and_gives_them_back(small_bundle_path, tmp_path, threads):
    """With threads=1 the caller's own computes, whatever the batch. Keeping a model begins a pool, a thread a core."""
    if threads > cores():
        pytest.skip(f"this machine has {cores()} cores")
    code = """
def count():
    return len(os.listdir("/proc/self/task"))
begun = count()
with opened() as sampler:
    for batch in (1, 2, 3, 4, 1, 2, 3, 4):
        sampler.sample(batch, steps=2)
        print(count() - begun)
print(count() - begun)
"""
    *during, closed = map(int, lines(code, small_bundle_path, "openvino", threads, env={"EPSRT_CACHE": str(tmp_path)}))
    assert closed < cores()
    assert max(during) < cores() + (0 if threads == 1 else (threads + 1) * 4)
    assert during[4:] == during[3:4] * 4
