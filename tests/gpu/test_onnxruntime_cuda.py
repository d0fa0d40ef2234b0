"""The engines on onnxruntime's GPU providers, run for real on the stand-in driver; see fake_onnxruntime."""

from __future__ import annotations

import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from epsrt import EngineError
from epsrt.engines.cache.store import EngineCache
from helpers import DATA

FAKE = """
import fake_onnxruntime as fake
sys.modules["onnxruntime"] = fake
from epsrt.engines import probe
bundle = spoken

def opened(name="onnxruntime-cuda", precision="fp32"):
    return open_engine(bundle, name, precision=precision)

def plainly(precision="fp32", **options):
    from epsrt.engines.gpu.onnxruntime import OnnxRuntimeCuda
    return OnnxRuntimeCuda(bundle, bundle.graph(precision), **options)

def rows_of(engine, batch, method="ddim", steps=10):
    rows = Sampler(engine).plan(method, steps).rows(engine.columns)
    return np.ascontiguousarray(np.broadcast_to(rows[:, None], (len(rows), batch, rows.shape[1])))

def images(engine, batch=2, method="ddim", seed=0):
    with engine.lanes(batch) as lanes:
        return sampled(lanes, rows_of(engine, batch, method), seed)

def sampled(lanes, rows, seed=0):
    for i in range(lanes.batch):
        lanes.write(i, Sample(seed, i, conditions={"label": i} if bundle.labelled else {}))
    lanes.advance(rows)
    return read(lanes)

def read(lanes):
    return np.stack([lanes.read(i) for i in range(lanes.batch)])

"""

Run = Callable[..., str]


@pytest.fixture
def run(on_stand_in: Run) -> Run:
    return lambda code, *arguments, **knobs: on_stand_in(FAKE + code, *arguments, **knobs)


@pytest.mark.parametrize("captured", [True, False])
def test_samples_equal_the_cpu_engines(run: Run, bundle_path: Path, captured: bool) -> None:
    run(
        f"fake.knobs['captured'] = {captured}"
        + """
gpu, cpu = opened(), open_engine(bundle, "onnxruntime", threads=1)
with Sampler(gpu) as sampler, Sampler(cpu) as plain:
    for method, steps in (("ddim", 25), ("ddpm", 50), ("ddim", 1)):
        options = dict(method=method, steps=steps, seed=3, labels=[0, 1, None], first=7)
        close(sampler.sample(3, **options), plain.sample(3, **options))
own = {"capture", "replay"} & {kind for _, kind in fake.runs}
assert not own if fake.knobs["captured"] else len(own) == 2
""",
        bundle_path,
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_ladder_holds(run: Run, bundle_path: Path, precision: str) -> None:
    run(
        f"""
rungs = verify(opened(precision="{precision}"))
assert [r.name for r in rungs] == ["network", "conditions", "step", "ddim-50", "ddpm-100", "batch"]
assert all(r.passed and r.engine == "onnxruntime-cuda" for r in rungs), rungs
assert {{o["CUDAExecutionProvider"]["use_tf32"] for o, _ in fake.sessions}} == {{"{int(precision == "fp16")}"}}
""",
        bundle_path,
    )


def test_nan_is_reported(run: Run, small_bundle_path: Path) -> None:
    run(
        """
gpu = opened()
rows = rows_of(gpu, 2, steps=25)
rows[13, 1, gpu.columns.index("b")] = np.inf
with gpu.lanes(2) as lanes:
    lanes.write(0, Sample(7)), lanes.write(1, Sample(8, 5))
    lanes.advance(rows)
    assert np.isfinite(lanes.read(0)).all()
    said = refused(lanes.read, 1)
assert said.startswith("lane 1 (seed 8, index 5) is not finite since its step 14 (t = 47)"), said
""",
        small_bundle_path,
    )


@pytest.mark.parametrize("captured", [True, False])
def test_what_it_asks_of_onnxruntime(run: Run, bundle_path: Path, captured: bool) -> None:
    """Chunks of ten steps are captured as one graph, without a copy of their rows; or else each step by onnxruntime."""
    said = run(
        f"fake.knobs['captured'] = {captured}"
        + """
import contextlib, io
with contextlib.redirect_stdout(io.StringIO()) as out:
    gpu = opened()
assert out.getvalue() == ""  # preload_dlls() prints
with contextlib.ExitStack() as stack:
    fake.sessions.clear(), fake.runs.clear()
    a, b = (stack.enter_context(gpu.lanes(2)) for _ in "ab")
    assert len(fake.sessions) == 2
    asked = {
        "enable_cuda_graph": "0", "use_tf32": "0", "prefer_nhwc": "1", "cudnn_conv_algo_search": "EXHAUSTIVE",
        "fuse_conv_bias": "1", "arena_extend_strategy": "kSameAsRequested",
    }
    for lanes, (providers, options) in zip((a, b), fake.sessions):
        stream = {"user_compute_stream": str(lanes._stream.handle)}
        assert providers == {"CUDAExecutionProvider": asked | stream}
        assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        assert options.batch == {"batch": 2}  # or there were shape arithmetic on the CPU
    assert a._stream.handle != b._stream.handle
    assert fake.runs == 2 * [(1, "eager"), (2, "eager")]
    fake.sessions.clear(), fake.runs.clear()
    rows, calls = rows_of(gpu, 2, steps=100), ("cuStreamSynchronize", "cuMemAlloc_v2", "cuGraphLaunch")
    for _ in "12":
        a.advance(rows[:99])  # an odd number of steps
    kinds = [kind for _, kind in fake.runs]
    if fake.knobs["captured"]:
        assert not fake.sessions and kinds == 19 * ["captured"], kinds  # chunks of ten and nine
    else:  # one try, then another session, which records two graphs
        assert [p["CUDAExecutionProvider"]["enable_cuda_graph"] for p, _ in fake.sessions] == ["1"]
        assert kinds[:6] == 2 * ["eager", "eager", "capture"], kinds
        assert set(kinds[6:]) == {"replay"}
    before, done = [count(c) for c in calls], fake.steps[0]
    a.advance(rows[:99])
    assert [count(c) - n for c, n in zip(calls, before)] == [0, 0, 10 if fake.knobs["captured"] else 99]
    assert fake.steps[0] == done  # nothing ran: the stream has not been waited for
    a.read(0)
    assert fake.steps[0] > done
    first, cpu = images(gpu, 2, seed=4), open_engine(bundle, "onnxruntime", threads=1)
    close(sampled(b, rows_of(gpu, 2), 4), first)  # b was not touched by what a did
    close(images(cpu, 2, seed=4), first)
""",
        bundle_path,
    )
    warned = "onnxruntime's own CUDA graphs are slower: CUDA cannot capture whole chunks of steps (onnxruntime failed"
    assert (warned in said) is not captured


THREADS = """
gpu, cpu = opened(), open_engine(bundle, "onnxruntime", threads=1)
truth = {(batch, seed): images(cpu, batch, "ddpm", seed) for batch in (1, 2, 3) for seed in (0, 1)}
failures = []

def guarded(function, *arguments):
    def work():
        try:
            function(*arguments)
        except BaseException as error:
            failures.append(repr(error))
    return threading.Thread(target=work)

def together(*threads):
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not failures, failures
"""


def test_threads_at_once(run: Run, bundle_path: Path) -> None:
    """One captures, in the mode that forbids others to allocate and wait, while others make lanes, sample and close."""
    run(
        THREADS
        + """
fake.knobs["capture"] = 0.02
def work(seed):
    for batch in (1, 2, 3, 1):
        close(images(gpu, batch, "ddpm", seed), truth[batch, seed])
together(*(guarded(work, seed) for seed in (0, 1)))
""",
        bundle_path,
    )


@pytest.mark.parametrize("captured", [True, False])
def test_lanes_move_between_threads(run: Run, bundle_path: Path, captured: bool) -> None:
    """A thread's first run makes handles, which no capture allows. onnxruntime keeps its own graphs by thread: each new
    one captures anew, also under the number of one that ended."""
    run(
        THREADS
        + f"fake.knobs['captured'] = {captured}"
        + """
lanes, rows = gpu.lanes(2), rows_of(gpu, 2, "ddpm")
for i in range(2): lanes.write(i, Sample(1, i, conditions={"label": i}))
fake.runs.clear()
fake.knobs["capture"] = 0.05
idents = set()

def advance(part):
    idents.add(threading.get_ident())
    lanes.advance(part)

def allocate():  # as other samplers do
    gpu._device.use()
    while not done:
        cuda.Memory(256, "a test").close()
done, beside = [], guarded(allocate)
beside.start()
for first, last in ((0, 2), (2, 5), (5, 6), (6, 8), (8, 10)):  # chunks of two, three and one
    together(guarded(advance, rows[first:last]))
done.append(True)
beside.join()
assert not failures, failures
kinds = [kind for _, kind in fake.runs]
if fake.knobs["captured"]:
    assert lanes.capturing and kinds == sum((["eager", *n * ["captured"]] for n in (2, 3, 1)), []), kinds
else:
    assert kinds.count("capture") == 9 and len(idents) < 5, (kinds, idents)  # the chunk of one needs one of the two
close(read(lanes), truth[2, 1])
lanes.close()
""",
        bundle_path,
    )


def test_it_is_refused(run: Run, bundle_path: Path) -> None:
    run(
        """
fake.knobs["providers"] = ["CPUExecutionProvider"]
assert refused(opened) == (
    "engine onnxruntime-cuda needs onnxruntime built for NVIDIA's GPUs, and this one has only CPUExecutionProvider: "
    'pip uninstall -y onnxruntime, then pip install "epsrt[gpu]"')
fake.knobs["providers"] = [fake.TENSORRT, fake.CUDA, fake.CPU]
installed, probe.installed = probe.installed, lambda name: "1.31.1" if "onnxruntime" in name else ""
probe._file_of = lambda name, path: path
assert "onnxruntime 1.31.1 and onnxruntime-gpu 1.31.1 are both installed" in refused(opened)
probe.installed = installed
assert refused(opened, "onnxruntime-tensorrt").startswith("engine onnxruntime-tensorrt has no FP32: ")
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
opened("onnxruntime-tensorrt")

gpu, before = opened(), live()
fake.knobs["loads"] = set()  # silently on the CPU, if it were allowed to
said = refused(gpu.lanes, 1)
assert f"onnxruntime cannot run {bundle.path / 'step-fp32.cuda.onnx'} (" in said, said
assert "fallback to CPU EP has been explicitly disabled by the user.; onnxruntime-cuda needs CUDA 13 and cuDNN" in said
assert said.endswith(': pip install "epsrt[gpu]", and see "epsrt doctor"') and live() == before
tensorrt = opened("onnxruntime-tensorrt", "fp16")
assert "Please install TensorRT libraries" in refused(tensorrt.lanes, 1)
fake.knobs.update(loads={fake.CUDA, fake.TENSORRT}, falls_back=True)
said = refused(tensorrt.lanes, 1)
assert "it fell back to CUDAExecutionProvider; onnxruntime-tensorrt needs TensorRT 10, CUDA 13 and cuDNN 9" in said
assert "a batch of 9 is outside 1 … 8" in refused(gpu.lanes, 9)
fake.knobs["falls_back"] = False
import epsrt.engines.gpu.ort_session as module
module.BATCH = "another"
assert "explicitly disabled" in refused(gpu.lanes, 1)
import gc
gc.collect()
assert live() == before
""",
        bundle_path,
    )


def test_the_faster_layout_is_timed_once_a_graph(run: Run, small_bundle_path: Path) -> None:
    run(
        """
def layouts(batch, engine=None):
    fake.sessions.clear()
    with (engine or plainly()).lanes(batch):
        return [providers["CUDAExecutionProvider"]["prefer_nhwc"] for providers, _ in fake.sessions]

slow, fast = 0.003, 0.0
fake.knobs["seconds"] = {"0": slow, "1": fast}
assert layouts(2) == ["0", "1", "1"]
fake.knobs["seconds"] = {"0": fast, "1": slow}
gpu = plainly()
assert layouts(2, gpu) == layouts(3, gpu) == layouts(1) == ["1"]  # on the disk
kept, = (EngineCache().directory / "timing").glob("layout-*.bin")
kept.write_bytes(b"nhwc?")  # a file that we did not write
gpu = plainly()
assert layouts(1, gpu) == ["0", "1", "0"] and layouts(2, gpu) == layouts(4) == ["0"]
kept.unlink()
fake.knobs["seconds"], fake.knobs["nhwc"] = {"0": slow, "1": fast}, False
gpu = plainly()
assert layouts(3, gpu) == ["0", "1", "0"] and layouts(2, gpu) == ["0"]
fake.knobs["nhwc"] = True
assert layouts(3) == ["0", "1", "1"]  # a refusal is not remembered
assert plainly(nhwc=False)._nhwc is False and plainly(dialect="cuda")._nhwc is True
EngineCache().directory.chmod(0o777)
gpu = plainly()
assert layouts(2, gpu) == ["0", "1", "1"] and layouts(2, gpu) == ["1"]
""",
        small_bundle_path,
    )


def test_a_layout_that_lacks_memory_is_timed_again(run: Run, small_bundle_path: Path) -> None:
    run(
        """
gpu, real = plainly(), fake.InferenceSession
def hungry(path, options=None, *, providers, enable_fallback=1):
    fake.knobs["weights"] = 900 << 20 if providers[-1][1].get("prefer_nhwc") == "1" else 1 << 16
    return real(path, options, providers=providers, enable_fallback=enable_fallback)
fake.InferenceSession = hungry
hog = cuda.Memory(400 << 20, "a test")
with gpu.lanes(1): pass
assert gpu._nhwc is None and not list(EngineCache().directory.glob("timing/layout-*"))
hog.close()
with gpu.lanes(1): pass
assert gpu._nhwc is not None
""",
        small_bundle_path,
    )


def test_the_dialect_is_proven_once(run: Run, bundle_path: Path) -> None:
    run(
        """
told = []
gpu = open_engine(bundle, "onnxruntime-cuda", precision="fp16", on_progress=lambda what, share: told.append(what))
assert gpu.dialect == "cuda" and told[0] == "onnxruntime-cuda in dialect cuda network"
assert {o["CUDAExecutionProvider"]["prefer_nhwc"] for o, _ in fake.sessions} == {"1"}
fake.sessions.clear()
again = open_engine(bundle, "onnxruntime-cuda", precision="fp16", may_build=False)
assert again.dialect == "cuda" and not fake.sessions
assert all(rung.passed for rung in again.proof().kept())
assert opened().dialect == "cuda" and fake.sessions  # another graph has a proof of its own
guided = gpu.on(bundle.graph("fp16", ["guidance"]))
assert guided.dialect == "cuda" and guided.graph.file == "step-guidance-fp16.cuda.onnx"
with Sampler(gpu) as sampler, Sampler(open_engine(bundle, "onnxruntime", precision="fp16", threads=1)) as cpu:
    asked = dict(method="ddpm", steps=10, seed=1, labels=[1, 2], guidance=2.0)
    assert np.abs(sampler.sample(**asked) - cpu.sample(**asked)).max() < 2e-2
""",
        bundle_path,
    )


def test_a_dialect_that_is_not_to_be_had(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    """The plain graph runs in its place, one sentence says why, and what was measured is not measured again."""
    old = tmp_path / "old.epsrt"
    shutil.copytree(DATA / "format-4.epsrt", old)
    run(
        """
def opens(**more):
    engine, sentences = said(open_engine, bundle, "onnxruntime-cuda", precision="fp32", **more)
    assert engine.dialect == "cpu" and len(sentences) == 1, sentences
    close(images(engine), truth)
    return sentences[0]
with open_engine(bundle, "onnxruntime", threads=1) as cpu: truth = images(cpu)
runs = "onnxruntime-cuda runs step-fp32.onnx, not its dialect cuda: "
assert opens(may_build=False) == runs + "it is not proven, and cannot be now: open the engine once with may_build=True"
fake.knobs["norms"] = False
sentence = opens()
assert sentence.startswith(runs + "it cannot run there: onnxruntime cannot run "), sentence
assert "Could not find an implementation for GroupNorm" in sentence
fake.knobs.update(norms=True, norms_off_by=0.5)
sentence = opens()
assert sentence.startswith(runs + "there it misses network, which is 0.") and "(at most 1e-05 allowed)" in sentence
fake.knobs["norms_off_by"] = 0.0
assert opens() == sentence  # it was kept
held = cuda.Memory(cuda.device().memory()[0] - (1 << 17), "a test")
for blob in EngineCache().blobs(): blob.unlink()
engine, (sentence,) = said(opened)
assert engine.dialect == "cpu"
assert sentence.startswith(runs + "the GPU's memory does not suffice to prove it: "), sentence
held.close()
assert opened().dialect == "cuda"  # the memory was lacking, not the dialect: nothing was kept

bundle = Bundle.open(sys.argv[2])
engine, sentences = said(opened)
assert engine.dialect == "cpu" and sentences == [
    "old.epsrt was exported without the dialect of onnxruntime-cuda, which runs its plain graph: export it again for "
    "speed"]
""",
        bundle_path,
        old,
    )


@pytest.mark.parametrize("captured", [True, False])
def test_after_a_failure(run: Run, small_bundle_path: Path, captured: bool) -> None:
    run(
        THREADS
        + f"fake.knobs['captured'] = {captured}"
        + """
gpu.lanes(4).close()
before, rows = live(), rows_of(gpu, 2, "ddpm")
def check(lanes, said):
    assert said.startswith(f"onnxruntime failed in a step of {bundle.path / 'step-fp32.cuda.onnx'} ("), said
    assert said.endswith(" of 1024 MiB of the GPU are free): [ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : "
                         "a node does not run"), said
    for _ in range(2):
        assert refused(lanes.advance, rows).endswith("make new lanes") and "lost" in refused(lanes.read, 0)
    lanes.close()
    assert live() == before
    close(images(gpu, 2, "ddpm", 1), truth[2, 1])

for kind in () if fake.knobs["captured"] else ("replay", "capture"):
    lanes = gpu.lanes(2)
    lanes.advance(rows)  # with onnxruntime's own graphs from now on
    fake.knobs["fail"] = kind
    if kind == "replay":
        check(lanes, refused(lanes.advance, rows))
    else:  # in a thread's first run
        together(guarded(lambda: check(lanes, refused(lanes.advance, rows))))
lanes = gpu.lanes(2)
fake.knobs["fail"] = "eager"
together(guarded(lambda: check(lanes, refused(lanes.advance, rows))))
for kind in ("eager",):
    fake.knobs["fail"] = kind
    try:
        gpu.lanes(2)
        raise AssertionError("this was not refused")
    except EngineError as error:
        assert live() == before and "a node does not run" in str(error)  # released before the error is forgotten
assert all(driver.stand_in_live(kind) == 0 for kind in (b"streams", b"graphs", b"execs"))

def fills(what, size):
    fake.knobs[what] = size
    try:
        with gpu.lanes(2), gpu.lanes(2):
            raise AssertionError("this was not refused")
    except epsrt.OutOfMemoryError as error:
        assert live() == before
        return str(error)
said = fills("arena", 600 << 20)  # the second has no room in its first run
assert "onnxruntime failed in a step of " in said and said.endswith(" requested buffer of size 629145600"), said
fake.knobs["arena"] = 256
said = fills("weights", 600 << 20)
assert "onnxruntime cannot run " in said and said.endswith(" requested buffer of size 629145600"), said
fake.knobs["weights"] = 256
close(images(gpu, 2, "ddpm", 0), truth[2, 0])
""",
        small_bundle_path,
    )


def test_tensorrt_loads_only_what_it_wrote(run: Run, bundle_path: Path) -> None:
    run(
        """
gpu, cpu = opened("onnxruntime-tensorrt", "fp16"), open_engine(bundle, "onnxruntime", precision="fp16", threads=1)
assert np.abs(images(gpu, 2, "ddpm") - images(cpu, 2, "ddpm")).max() < 1e-2  # FP16, by two bindings in turn
(providers, options) = fake.sessions[-1]
assert list(providers) == [fake.TENSORRT, fake.CUDA] and providers[fake.CUDA]["enable_cuda_graph"] == "0"
given = providers[fake.TENSORRT]
assert given["trt_fp16_enable"] == "True" and given["trt_cuda_graph_enable"] == "False"
folder, = (EngineCache().directory / "libraries").glob("*-2x8x8")  # the proof's beside it
assert given["trt_engine_cache_path"] == given["trt_timing_cache_path"] == str(folder)
assert folder.name.startswith("onnxruntime-tensorrt-") and folder.stat().st_mode & 0o777 == 0o700

def opens():
    fake.engines.clear()
    images(gpu)
    return fake.engines
assert opens() == ["built"]
engine, = folder.glob("*.engine")
engine.write_text("another's")
(folder / "other.engine").write_text("another's")
(folder / "linked.timing").symlink_to(engine)
assert opens() == [] and engine.read_text() == "built" and len(list(folder.iterdir())) == 3
assert opens() == ["built"]
with gpu.lanes(1):  # of another batch: a folder of its own
    assert (folder.parent / folder.name.replace("-2x8x8", "-1x8x8")).is_dir()
folder.chmod(0o770)
assert "lets others write" in refused(gpu.lanes, 2)
folder.chmod(0o700)
from epsrt_command.commands.cache import cache
cache(prune=True, older_than=None, bundle=None, everything=True, as_json=True)
assert not [p for p in EngineCache().directory.rglob("*") if p.is_file()]
""",
        bundle_path,
    )


def test_who_waits_for_tensorrts_files_stops_no_other_lanes(run: Run, bundle_path: Path) -> None:
    """And goes on without them at last, keeping nothing."""
    run(
        """
import threading
from epsrt.engines.cache import store
gpu, cpu = opened("onnxruntime-tensorrt", "fp16"), open_engine(bundle, "onnxruntime", precision="fp16", threads=1)
folder, = (EngineCache().directory / "libraries").glob("*-2x8x8")
before, found, waits = list(folder.iterdir()), [], threading.Event()
store.USING, store.log.warning = 2.0, lambda *words: waits.set()
thread = threading.Thread(target=lambda: found.append(images(gpu)))
with store._held(folder / store.LOCK):
    thread.start()
    assert waits.wait(20)
    assert gpu._device.setup.acquire(timeout=0.5)
    gpu._device.setup.release()
    thread.join()
assert np.abs(found[0] - images(cpu)).max() < 1e-2
(given, _) = fake.sessions[-1]
assert not any("cache" in key for key in given[fake.TENSORRT]), given
assert list(folder.iterdir()) == before
""",
        bundle_path,
    )


# EngineCache.kept_by, of which the above is the use


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache")


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {".lock"}


def test_what_a_library_keeps(cache: EngineCache, tmp_path: Path) -> None:
    with cache.kept_by("a library") as folder:
        assert folder == cache.directory_for("a-library")
        (folder / "a.engine").write_bytes(b"a")
        (folder / "b.engine").write_bytes(b"b")
    with cache.kept_by("another") as other:
        assert names(other) == set()
    (folder / "b.engine").write_bytes(b"B")
    (folder / "c.engine").write_bytes(b"c")
    (folder / "d.engine").symlink_to(folder / "a.engine")
    with cache.kept_by("a library"):
        assert names(folder) == {"a.engine"}
        (folder / "a.engine").write_bytes(b"newer")
    with cache.kept_by("a library"):
        assert (folder / "a.engine").read_bytes() == b"newer"
    with pytest.raises(EngineError, match="stop"), cache.kept_by("a library"):
        (folder / "half.engine").write_bytes(b"half")
        raise EngineError("stop")
    with cache.kept_by("a library"):
        assert names(folder) == {"a.engine"}
    for path in cache.directory.glob("timing/*.json"):
        path.unlink()
    with cache.kept_by("a library"):
        assert names(folder) == set()
    folder.chmod(0o777)
    with pytest.raises(EngineError, match="lets others write"), cache.kept_by("a library"):
        pass
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777


def test_one_at_a_time_keeps(cache: EngineCache) -> None:
    entered = threading.Event()

    def enter() -> None:
        with cache.kept_by("a library"):
            entered.set()

    thread = threading.Thread(target=enter)
    with cache.kept_by("a library"):
        thread.start()
        assert not entered.wait(0.3)
    assert entered.wait(10)
    thread.join()


def test_other_sizes(run: Run, sized_bundle_path: Path) -> None:
    """A session a size, as its graph is recorded: no dimension is free in it; a cache for each."""
    run(
        """
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
gpu, cpu = opened(), open_engine(bundle, "onnxruntime", threads=1)
with Sampler(gpu) as sampler, Sampler(cpu) as plain:
    fake.sessions.clear()
    for size in ((8, 8), (4, 20), (20, 4)):
        for _ in range(2):
            options = dict(steps=10, seed=3, size=size)
            close(sampler.sample(2, **options), plain.sample(2, **options))
    assert [options.batch for _, options in fake.sessions] == [
        {"batch": 2, "height": height, "width": width} for height, width in ((8, 8), (4, 20), (20, 4))
    ]
assert all(r.passed for r in verify(gpu))
assert "a size of 6 × 8 is none of sized.epsrt" in refused(gpu.lanes, 1, (6, 8))
with Sampler(opened("onnxruntime-tensorrt", "fp32")) as sampler:
    close(sampler.sample(1, steps=5, size=(4, 8)), Sampler(cpu).sample(1, steps=5, size=(4, 8)))
assert len([f for f in os.listdir(EngineCache().directory / "libraries") if f.endswith("-1x4x8")]) == 1
""",
        sized_bundle_path,
    )


@pytest.mark.parametrize("engine", ["onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt"])
def test_an_engine_takes_its_graph_by_way_of_the_check(run: Run, bundle_path: Path, engine: str) -> None:
    run(
        f"""
def hostile(data, file, manifest): raise epsrt.BundleError(file + " is hostile")
epsrt.operators.check = hostile
assert "onnx is hostile" in refused(lambda: opened({engine!r}, "fp16").lanes(1))
""",
        bundle_path,
    )
