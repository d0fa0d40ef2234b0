"""TensorRT on the stand-in: an engine file in its dialect is proven before its first use, or the plain graph runs."""

from __future__ import annotations

from pathlib import Path

OPENED = """
from epsrt.engines import proof
from epsrt.manifest import Rung
measured, really = [], proof.verify
def counted(engine, tell=None, **more):
    measured.append((engine.name, engine.graph.file, engine.max_batch))
    return really(engine, tell, **more)
proof.verify = counted

def opened(**options):
    return open_engine(spoken, "tensorrt", precision="fp32", **options)

def images(engine, n=2):
    with Sampler(engine) as sampler:
        return sampler.sample(n, method="ddpm", steps=10, seed=3, labels=[1] * n)

truth = images(open_engine(spoken, "onnxruntime", threads=1))
file, instead = "step-fp32.tensorrt.onnx", "tensorrt runs step-fp32.onnx, not its dialect tensorrt: "
"""


def test_each_engine_file_is_proven_once(on_stand_in, bundle_path: Path) -> None:
    on_stand_in(
        OPENED
        + """
told = []
gpu = opened(on_progress=lambda what, share: told.append(what))
assert gpu.dialect == "tensorrt" and gpu.graph.file == file and not measured  # nothing was asked for yet
close(images(gpu), truth)
assert measured == [("tensorrt", file, 2)] and "tensorrt in dialect tensorrt network" in told
close(images(gpu, 1), truth[:1])
assert measured == [("tensorrt", file, 2), ("tensorrt", file, 1)]
names = [Path(name).name for name in trt.deserialized]
assert names == [file, file]
again = opened(may_build=False)  # what is built is proven, and what is proven is kept
close(images(again), truth)
assert len(measured) == 2 and again.dialect == "tensorrt"
for blob in EngineCache().blobs():
    blob.unlink()
close(images(opened(may_build=False)), truth)  # a proof is no build
assert len(measured) == 3
assert all(rung.passed for rung in verify(again))
guided = gpu.on(spoken.graph("fp32", ["guidance"]))
assert guided.graph.file == "step-guidance-fp32.tensorrt.onnx"
""",
        bundle_path,
    )


def test_threads_prove_it_once(on_stand_in, bundle_path: Path) -> None:
    on_stand_in(
        OPENED
        + """
gpu, got = opened(), {}
def work(i): got[i] = images(gpu)
threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(got) == 3 and len(measured) == 1
for x in got.values(): close(x, truth)
""",
        bundle_path,
    )


def test_where_it_misses_a_rung_the_plain_graph_runs(on_stand_in, bundle_path: Path) -> None:
    on_stand_in(
        OPENED
        + """
proof.verify = lambda engine, tell=None, **_: [Rung("network", engine.name, "fp32", 0.5, 1e-5, "relative L2")]
def falls_back():
    gpu = opened()
    got, sentences = said(images, gpu)
    close(got, truth)
    assert (gpu.dialect, gpu.graph.file) == ("cpu", "step-fp32.onnx")
    (sentence,) = [s for s in sentences if s.startswith(instead)]
    assert sentence == instead + "there it misses network, which is 0.5 relative L2 (at most 1e-05 allowed)"
    close(images(gpu, 1), truth[:1])  # the plain graph, without another word
    return gpu
falls_back()
built = len(EngineCache().entries())
assert built == 3  # of batch 2 in both, and of batch 1
proof.verify = lambda *_, **__: 1 / 0
falls_back()  # by what was kept
assert len(EngineCache().entries()) == built
""",
        bundle_path,
    )


def test_an_engine_file_that_missed_a_rung_does_not_run(on_stand_in, bundle_path: Path) -> None:
    """It was loaded to be measured, and holds the batch that is asked for next."""
    on_stand_in(
        OPENED
        + """
def missed(engine, tell=None, **more):
    return [Rung(r.name, engine.name, "fp32", 0.5, 1e-5, r.unit) for r in really(engine, tell, **more)]
proof.verify = missed
gpu = opened()
for _ in range(2):
    with gpu.lanes(2) as lanes:
        assert Path(lanes._runner._loaded.engine._made["file"]).name == "step-fp32.onnx"
""",
        bundle_path,
    )


def test_where_the_library_cannot_build_it_the_plain_graph_runs(on_stand_in, bundle_path: Path) -> None:
    on_stand_in(
        OPENED
        + """
make = engine_files.make_engine_file
def refusing(lib, bundle, graph, *rest, **options):
    if "tensorrt" in graph.file:
        raise EngineError("tensorrt cannot parse it: GroupNormalization is unknown")
    return make(lib, bundle, graph, *rest, **options)
engine_files.make_engine_file = refusing
gpu = opened()
got, sentences = said(images, gpu)
close(got, truth)
assert instead + "it cannot be built: tensorrt cannot parse it: GroupNormalization is unknown" in sentences
assert gpu.dialect == "cpu" and not measured
""",
        bundle_path,
    )


def test_a_lack_of_memory_is_no_fault_of_the_dialect(on_stand_in, bundle_path: Path) -> None:
    on_stand_in(
        OPENED
        + """
gpu = opened()
free, _ = cuda.device().memory()
hog = cuda.Memory(free - 16_000, "a test")
try:
    images(gpu, 8)
    raise AssertionError("this was not refused")
except epsrt.OutOfMemoryError:
    hog.close()
assert gpu.dialect == "tensorrt"
close(images(gpu), truth)
assert gpu.dialect == "tensorrt" and measured
""",
        bundle_path,
        memory=1 << 22,
    )


def test_an_engine_file_that_is_built_again_is_proven_again(on_stand_in, bundle_path: Path) -> None:
    """A build chooses its kernels anew: neither a pass nor a miss of the one before counts."""
    on_stand_in(
        OPENED
        + """
options = BuildOptions(profiles=((2, 2, 2),))
graph, lib = spoken.graph("fp32").in_dialect("tensorrt"), library("tensorrt")
really_built = engine_files.build
def other(*given):  # with other bytes
    made = really_built(*given)
    return engine_files.replace(made, data=made.data + b" ")
make = lambda: engine_files.make_engine_file(lib, spoken, graph, options, again=True, say=lambda s: None)
make()
proof.verify = lambda engine, tell=None, **_: [Rung("network", engine.name, "fp32", 0.5, 1e-5, "relative L2")]
gpu = opened()
close(images(gpu), truth)
assert gpu.dialect == "cpu"
engine_files.build, proof.verify = other, counted
make()
gpu = opened()
close(images(gpu), truth)
assert gpu.dialect == "tensorrt" and len(measured) == 1
""",
        bundle_path,
    )


def test_where_nothing_may_be_built_the_advice_helps(on_stand_in, bundle_path: Path) -> None:
    on_stand_in(
        OPENED
        + """
built(spoken, profiles=((2, 2, 2),), dialect="tensorrt")
proof.verify = lambda engine, tell=None, **_: [Rung("network", engine.name, "fp32", 0.5, 1e-5, "relative L2")]
gpu = opened(may_build=False)
sentence = refused(images, gpu)
assert sentence.startswith("tensorrt has no engine file of tiny.epsrt that it may run: there it misses network, which")
command = sentence.split('run "')[1].rstrip('"')
assert command == f"epsrt build {bundle.path} --engine tensorrt --precision fp32 --plain", command
built(spoken, profiles=((1, 1, 1), (8, 8, 8)), dialect="cpu")  # what the command builds
gpu = opened(may_build=False)
close(images(gpu), truth)
assert (gpu.dialect, gpu.max_batch) == ("cpu", 8)
for entry in EngineCache().entries():
    if "tensorrt" in entry.record.key.graph: EngineCache().remove(entry)
gpu = opened(may_build=False)  # with files of the plain graph alone
got, sentences = said(images, gpu)
close(got, truth)
assert sentences == [instead + "no engine file in it holds a batch of 2"], sentences
""",
        bundle_path,
    )


def test_a_build_that_lacks_memory_is_no_fault_of_the_dialect(on_stand_in, bundle_path: Path) -> None:
    on_stand_in(
        OPENED
        + """
really_built = engine_files.build
def lacking(*given): raise epsrt.OutOfMemoryError("the GPU is full")
engine_files.build = lacking
gpu = opened()
assert refused(images, gpu) == "the GPU is full" and gpu.dialect == "tensorrt"
engine_files.build = really_built
close(images(gpu), truth)
assert gpu.dialect == "tensorrt"
""",
        bundle_path,
    )
