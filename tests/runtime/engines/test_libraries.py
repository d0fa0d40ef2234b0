"""Importing an engine's library: it tells nobody, and where it fails in whatever way, the next engine is taken."""

from __future__ import annotations

import platform
import signal
import sys

import pytest

from epsrt import EngineError
from epsrt.engines import probe
from epsrt.engines.libraries import importing
from helpers import run_python, tree

WATCHED = """
import os, sys, threading
seen = []
def watch(event, args):
    if event.startswith("socket.") or event in ("subprocess.Popen", "os.system"):
        seen.append((event, str(args)))
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if not str(args[0]).startswith((os.environ["EPSRT_CACHE"], "/dev/null")):
            seen.append((event, str(args)))
sys.addaudithook(watch)
from epsrt import Sampler
def threads():
    return len(os.listdir("/proc/self/task"))
before = threads()
import epsrt.engines.ort_library, epsrt.engines.cpu.openvino
imported = threads() - before
for name in ("onnxruntime", "openvino"):
    with Sampler.open(sys.argv[1], name, threads=1) as sampler:
        sampler.sample(2, steps=2)
print(seen)
print(imported)
print([thread.name for thread in threading.enumerate() if not thread.daemon])
print("openvino_telemetry" in sys.modules)
"""


def test_no_look_up_no_file_at_home_and_no_thread(small_bundle_path, tmp_path):
    (home := tmp_path / "home").mkdir()
    env = {"HOME": str(home), "EPSRT_CACHE": str(tmp_path / "cache"), "CI": "", "XDG_CACHE_HOME": ""}
    done = run_python(WATCHED, small_bundle_path, env=env, without=("ORT_DISABLE_TELEMETRY",))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "0", "['MainThread']", "False"]
    assert tree(home) == {}


def test_what_others_imported_before_stays_theirs(monkeypatch):
    theirs = object()
    monkeypatch.setitem(sys.modules, "openvino_telemetry", theirs)
    with importing("json", "a test", ""):
        assert sys.modules["openvino_telemetry"] is theirs
    assert sys.modules["openvino_telemetry"] is theirs


def test_others_can_import_theirs_afterwards(monkeypatch):
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    with importing("json", "a test", ""), pytest.raises(ImportError):
        import openvino_telemetry  # noqa: F401
    assert "openvino_telemetry" not in sys.modules


OPEN = """
import sys
from epsrt import Bundle, EngineError, open_engine
try:
    print(open_engine(Bundle.open(sys.argv[1]), sys.argv[2]).name)
except EngineError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "line",
    [
        'raise RuntimeError("no home")',
        'raise OSError(13, "denied")',
        'raise KeyError("uid")',
        "class Odd(Exception): pass\nraise Odd",
    ],
    ids=["RuntimeError", "OSError", "KeyError", "Odd"],
)
def test_auto_passes_over_an_engine_whose_library_fails(small_bundle_path, tmp_path, line):
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino/__init__.py").write_text(line)
    code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{OPEN}"
    done = run_python(code, small_bundle_path, "auto", env={"CUDA_VISIBLE_DEVICES": ""})
    assert (done.returncode, done.stdout.strip()) == (0, "onnxruntime"), done.stderr
    assert "engine openvino is passed over: the library of engine openvino fails while it is imported" in done.stderr
    done = run_python(code, small_bundle_path, "openvino")
    assert 'mend what python -c "import openvino" shows, or take another engine' in done.stdout


def test_auto_without_a_home_directory(small_bundle_path):
    """As in a container, for a uid that its passwd does not have."""
    code = f"""
import os, pwd
def missing(uid):
    raise KeyError(f"getpwuid(): uid not found: {{uid}}")
pwd.getpwuid = missing
for name in ("HOME", "EPSRT_CACHE", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
{OPEN}
from epsrt import Sampler
with Sampler.open(sys.argv[1]) as sampler:
    print(sampler.sample(1, steps=2).shape)
"""
    done = run_python(code, small_bundle_path, "auto", env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    fastest = "openvino" if platform.machine() in probe.X86 else "onnxruntime"
    assert done.stdout.split("\n")[:2] == [fastest, "(1, 1, 8, 8)"]


def test_what_a_signals_handler_raises_while_importing_comes_out():
    def handler(number, frame):
        raise RuntimeError("late")

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(RuntimeError, match="^late$"), importing("json", "a test", ""):
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(RuntimeError, match="^late$"), importing("json", "a test", ""):
            try:
                signal.raise_signal(signal.SIGUSR1)
            except RuntimeError as error:  # as pybind11 does around a module that initialises itself
                raise ImportError("initialization failed") from error
    finally:
        signal.signal(signal.SIGUSR1, before)
    says = pytest.raises(EngineError, match=r"a test fails while it is imported \(RuntimeError: late\)")
    with says, importing("json", "a test", ""):
        raise RuntimeError("late")
