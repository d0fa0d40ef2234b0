"""Engine files built, found, refused, rebuilt, and run: on the stand-in driver with a pretended TensorRT."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpu.conftest import PRELUDE
from gpu.stand_in.build import environment


def test_an_engine_file_is_built_once_and_found_again(on_stand_in, small_bundle_path) -> None:
    out = on_stand_in(
        """
told = []
first = open_engine(bundle, "tensorrt", on_progress=lambda name, share: told.append((name, share)))
assert not told and EngineCache().entries() == []  # nobody has asked for a batch
first.lanes(3).close()
assert told[0] == ("Building engine", 0.0) and told[-1] == ("Building engine", 1.0)
assert [share for _, share in told] == sorted(share for _, share in told) and len(told) >= 6
assert first.max_batch == 4 and first.precision == "fp32" and first.device == "cuda"
(entry,) = EngineCache().entries()
key, summary = entry.record.key, entry.record.summary
assert (key.engine, key.version, key.gpu, key.capabilities) == ("tensorrt", "11.4.0.106", "Stand-in GPU", ("sm_89",))
assert key.profiles == ((3, 3, 3),)
assert summary["layers"] == 1 and summary["seconds"] >= 0 and summary["peak_memory"] > 1 << 20
assert EngineCache().blob("tensorrt-11.4.0.106-Stand-in-GPU") == b"timed"
def never(*_): raise AssertionError("built again")
for may_build in (True, False):
    open_engine(bundle, "tensorrt", may_build=may_build, on_progress=never).lanes(3).close()
other = built(bundle)
assert other.entry.record.key.profiles == ((1, 1, 1), (4, 4, 4))
assert other.built and other.built.timing == b"timedtimed"  # it was given the timing cache of the first
assert "built for batch 3, asked for batches 1 and 4" in other.why
assert json.loads(first.information(entry)) == {"Layers": []}
""",
        small_bundle_path,
    )
    assert "no engine file of small.epsrt for tensorrt was built yet: building it" in out


def test_what_differs_is_said(on_stand_in, small_bundle_path, bundle_path) -> None:
    on_stand_in("built(bundle)", small_bundle_path)
    on_stand_in("built(bundle, precision='fp16')", bundle_path)
    command = f'run "epsrt build {small_bundle_path} --engine tensorrt --precision fp32"'
    refuse = "print(refused(open_engine, bundle, 'tensorrt', may_build=False))"
    newer = "trt.__version__ = '12.0.1'\n"
    for code, knobs, words in (
        (newer, {}, ["built with tensorrt 11.4.0.106, this is 12.0.1"]),
        ("", {"capability": "9.0"}, ["built for sm_89, this is sm_90"]),
        ("", {"name": "NVIDIA H200"}, ["built for Stand-in GPU, this is NVIDIA H200"]),
        (newer, {"capability": "8.6"}, ["tensorrt 11.4.0.106, this is 12.0.1", "built for sm_89, this is sm_86"]),
    ):
        sentence = on_stand_in(code + refuse, small_bundle_path, **knobs)
        assert all(
            word in sentence for word in [*words, "small.epsrt has no engine file for this: the nearest was", command]
        )
    sentence = on_stand_in(refuse.replace("may_build", "precision='fp32', may_build"), bundle_path)
    assert "built in fp16, asked for fp32" in sentence
    assert "no engine file of small.epsrt for tensorrt-rtx was built yet" in on_stand_in(
        refuse.replace("'tensorrt'", "'tensorrt-rtx'"), small_bundle_path
    )
    # and without may_build=False it is built for the first lanes, with the same words as a warning
    out = on_stand_in(newer + "open_engine(bundle, 'tensorrt').lanes(4).close()", small_bundle_path)
    words = (
        "the nearest was built with tensorrt 11.4.0.106, this is 12.0.1; built for batches 1 and 4, asked for batch 4"
    )
    assert f"{words}: building it" in out


def test_an_engine_file_of_another_export_is_not_used(on_stand_in, small_bundle_path, copy_of) -> None:
    from helpers import forge

    on_stand_in("built(bundle)", small_bundle_path)
    other = copy_of(small_bundle_path)
    forge(other, lambda manifest: manifest.update(value_range=[-1.0, 1.5]))
    sentence = on_stand_in("print(refused(open_engine, bundle, 'tensorrt', may_build=False))", other)
    assert "built from another export of the bundle" in sentence


def test_damaged_foreign_and_exposed_engine_files_are_refused(on_stand_in, small_bundle_path) -> None:
    on_stand_in(
        """
entry = built(bundle).entry
kept = entry.path.read_bytes()
def refuse(): return refused(open_engine(bundle, "tensorrt").lanes, 1)
for damaged in (kept[:-1], kept[:-1] + b"!", b"", kept + b"0"):
    entry.path.write_bytes(damaged)
    sentence = refuse()
    assert str(entry.path) in sentence and "does not hold the bytes that its record tells of" in sentence, sentence
    assert "epsrt cache --prune" in sentence
entry.path.write_bytes(kept)
open_engine(bundle, "tensorrt", may_build=False).lanes(1).close()
for path, mode in ((entry.path, 0o666), (entry.path.parent, 0o777), (EngineCache().directory, 0o770)):
    before = path.stat().st_mode & 0o777
    path.chmod(mode)
    sentence = refuse() if path == entry.path else refused(open_engine, bundle, "tensorrt")
    assert str(path) in sentence and "lets others write" in sentence and "an engine file is native code" in sentence
    path.chmod(before)
open_engine(bundle, "tensorrt", may_build=False).lanes(1).close()
# what passes the checks and is no engine file: the library's own refusal, in a sentence
key = entry.record.key
EngineCache().store(key, b"not an engine file", bundle_name="small.epsrt")
sentence = refuse()
assert "tensorrt 11.4.0.106 refuses the engine file of small.epsrt (it has 0 MiB, 1024 of the GPU's are" in sentence
assert f': the magic tag does not match; run "epsrt build {bundle.path} ' in sentence
assert sentence.endswith('--precision fp32 --batch 1 --batch 4 --again"')
""",
        small_bundle_path,
    )


def test_an_engine_file_that_came_with_the_bundle_must_be_trusted(on_stand_in, small_bundle_path, copy_of) -> None:
    bundle = copy_of(small_bundle_path)
    on_stand_in(
        """
cache = EngineCache()
entry = built(bundle).entry
cache.ship(entry, bundle.path)
cache.remove(entry)
bundle = plain(Bundle.open(sys.argv[1]))  # a bundle with engines is still that bundle
sentence = refused(open_engine, bundle, "tensorrt")
assert "came with the bundle: an engine file is native code that runs unchecked" in sentence
assert "--trust-engines" in sentence
with Sampler(open_engine(bundle, "tensorrt", trust_engines=True, may_build=False)) as sampler:
    sampler.sample(1, steps=2)
built(bundle, profiles=((1, 2, 4),))
with open_engine(bundle, "tensorrt") as engine:  # one's own needs no trust
    assert [e.shipped for e in engine._files.found()] == [False]
with open_engine(bundle, "tensorrt", trust_engines=True) as engine, engine.lanes(4) as lanes:
    assert [e.shipped for e in engine._files.found()] == [False, True]
    assert len(lanes._runner._loaded.engine._made["profiles"]) == 2  # an exact one, though it was brought
""",
        bundle,
    )


def test_options_reach_the_library_and_the_key(on_stand_in, small_bundle_path) -> None:
    on_stand_in(
        """
seen = {}
real = trt.Builder.build_serialized_network
def spy(self, network, config):
    seen.update(flags=set(config._flags_set), config=config)
    return real(self, network, config)
trt.Builder.build_serialized_network = spy
flags = trt.BuilderFlag
made = built(bundle, level=5, workspace=64, hardware_compatible="ampere+", version_compatible=True, refittable=True)
config = seen["config"]
assert seen["flags"] == {flags.VERSION_COMPATIBLE, flags.REFIT}
assert config.builder_optimization_level == 5 and config._workspace == 64 << 20 and config.max_aux_streams == 0
assert config.hardware_compatibility_level is trt.HardwareCompatibilityLevel.AMPERE_PLUS
assert made.entry.record.key.options["level"] == 5
open_engine(bundle, "tensorrt", may_build=False).lanes(1).close()
stripped = built(bundle, stripped=True)
assert seen["flags"] == {flags.STRIP_PLAN}
cpu = open_engine(bundle, "onnxruntime", threads=1)
with Sampler(open_engine(bundle, "tensorrt")) as sampler, Sampler(cpu) as plain:  # the weights are the bundle's
    close(sampler.sample(4, steps=5), plain.sample(4, steps=5))
assert built(bundle, stripped=True).built is None
for _ in range(2):
    asked = library("tensorrt"), bundle, bundle.graph("fp32"), BuildOptions()
    assert engine_files.make_engine_file(*asked, again=True).built
for options, words in (
    (dict(profiles=((4, 2, 8),)), "batch profile 4:2:8 does not ascend"),
    (dict(profiles=((0, 1, 1),)), "batch profile 0:1:1 does not"),
    (dict(profiles=((1, 4, 5),)), "batch profile 1:4:5 exceeds 4, the largest batch of small.epsrt"),
    (dict(profiles=((5, 5, 5),)), "batch profile 5 exceeds 4, the largest batch of small.epsrt"),
    (dict(level=6), "optimisation level 6 is outside 0 … 5"), (dict(workspace=0), "workspace = 0 MiB"),
    (dict(hardware_compatible="all"), "hardware compatibility 'all'"),
):
    assert words in refused(built, bundle, **options), options
assert "builds for this machine's GPU alone" in refused(engine_files.targets_of, library("tensorrt"), ["sm89"])
""",
        small_bundle_path,
    )


def test_tensorrt_rtx_builds_for_targets_and_keeps_what_it_compiles(on_stand_in, small_bundle_path) -> None:
    on_stand_in(
        """
made = built(bundle, engine="tensorrt-rtx", targets=("sm_86", "sm_89"))
key = made.entry.record.key
assert (key.gpu, key.capabilities) == ("", ("sm_86", "sm_89"))
with Sampler(open_engine(bundle, "tensorrt-rtx", may_build=False)) as sampler:
    sampler.sample(4, steps=3)
kept = [p for p in EngineCache().blobs() if p.suffix == ".bin"]
assert [p.read_bytes() for p in kept] == [b"compiled"] and "Stand-in-GPU-sm_89" in kept[0].name
offered = []
real = trt.IRuntimeCache.deserialize
trt.IRuntimeCache.deserialize = lambda self, data: offered.append(data) or real(self, data)
open_engine(bundle, "tensorrt-rtx").lanes(4).close()
assert offered == [b"compiled"]
""",
        small_bundle_path,
    )


def test_tensorrt_rtx_has_no_sm_90(on_stand_in, small_bundle_path) -> None:
    on_stand_in(
        """
words = "tensorrt-rtx 11.4.0.106 has no target sm_90: use one of sm86, sm89, sm120, or engine tensorrt, which builds on"
for refuse in (
    lambda: refused(built, bundle, engine="tensorrt-rtx", targets=("sm_90",)),  # named, or this GPU
    lambda: refused(built, bundle, engine="tensorrt-rtx"), lambda: refused(open_engine, bundle, "tensorrt-rtx"),
):
    assert refuse() == f"{words} the GPU itself", refuse()
assert EngineCache().entries() == []
""",
        small_bundle_path,
        capability="9.0",
        name="NVIDIA H100",
    )


def test_a_build_that_fails_or_is_interrupted_leaves_nothing(on_stand_in, small_bundle_path) -> None:
    on_stand_in(
        """
from pathlib import Path
def files(): return sorted(p.name for p in EngineCache().directory.rglob("*") if p.is_file() and p.suffix != ".lock")
def stop(name, share):
    if share > 0.3: raise KeyboardInterrupt
try:
    open_engine(bundle, "tensorrt", on_progress=stop).lanes(1)
except KeyboardInterrupt:
    assert files() == []
else:
    raise AssertionError
real = trt.Builder.build_serialized_network
def no(self, network, config):
    self.logger.log(trt.ILogger.ERROR, "no kernel can do this")
trt.Builder.build_serialized_network = no
sentence = refused(built, bundle)
assert "tensorrt 11.4.0.106 cannot build" in sentence and "no kernel can do this" in sentence
trt.Builder.build_serialized_network = real
parse = trt.OnnxParser.parse_from_file
trt.OnnxParser.parse_from_file = lambda self, file: parse(self, file + ".none")
assert "cannot parse" in refused(built, bundle) and "this is no model" in refused(built, bundle)
trt.OnnxParser.parse_from_file = parse
(bundle.path / "step-fp32.onnx").rename(bundle.path / "away")
assert "was replaced since it was opened" in refused(built, bundle)
(bundle.path / "away").rename(bundle.path / "step-fp32.onnx")
assert files() == []
import errno, epsrt.files
def full(path): raise OSError(errno.ENOSPC, "No space left on device")
kept, epsrt.files._settle = epsrt.files._settle, full
sentence = refused(built, bundle)
assert "is full" in sentence and "epsrt cache --prune" in sentence and files() == []
epsrt.files._settle = kept
assert built(bundle).built  # the lock was let go each time
""",
        small_bundle_path,
    )


def test_ctrl_c_ends_a_build(stand_in: Path, small_bundle_path: Path, tmp_path: Path) -> None:
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
    code = (
        PRELUDE
        + heard
        + "trt.knobs['sleep'] = 0.5\nprint('building', flush=True)\nopen_engine(bundle, 'tensorrt').lanes(1)"
    )
    env = {**os.environ, **environment(stand_in), "EPSRT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, str(small_bundle_path)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    lock = tmp_path / "cache"
    for _ in range(100):
        if list(lock.rglob("*.lock")):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert not list(lock.rglob("*.engine"))
    assert not list(lock.rglob("*.json"))


def test_two_processes_build_once(stand_in: Path, small_bundle_path: Path, tmp_path: Path) -> None:
    code = PRELUDE + "trt.knobs['sleep'] = 0.4\nmade = built(bundle)\nprint(json.dumps(made.built is not None))"
    env = {**os.environ, **environment(stand_in), "EPSRT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, str(small_bundle_path)]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [json.loads(process.communicate(timeout=120)[0]) for process in both]
    assert sorted(answers) == [False, True]


def test_no_gpu_no_driver_and_auto(on_stand_in, bundle_path, small_bundle_path) -> None:
    refuse = "print(refused(open_engine, bundle, 'tensorrt'))"
    assert "supports CUDA 12.8" in on_stand_in(refuse, small_bundle_path, driver=12080)
    assert "CUDA_VISIBLE_DEVICES" in on_stand_in(refuse, small_bundle_path, gpus=0)
    out = on_stand_in("print(refused(open_engine, bundle, 'tensorrt', threads=1))", small_bundle_path)
    assert "threads = 1 is for a CPU engine" in out
    # auto: the fastest whose libraries, driver and GPU are there; FP16 there, where the bundle has it
    pretend = """
from epsrt.engines import probe
probe.available = lambda: iter(["tensorrt", "onnxruntime"])
"""
    show = "opened = open_engine(bundle)\nprint(opened.name, opened.precision)"
    assert "tensorrt fp16" in on_stand_in(pretend + show, bundle_path)
    assert "tensorrt fp32" in on_stand_in(pretend + show, small_bundle_path)
    failing = """
def none(logger):
    logger.log(trt.ILogger.ERROR, "CUDA initialization failure with error: 35")
    raise TypeError("factory function returned nullptr")
trt.Runtime = none
"""
    out = on_stand_in(pretend + failing + show, small_bundle_path)
    assert "onnxruntime fp32" in out
    assert "passed over: tensorrt 11.4.0.106 does not start (CUDA initialization failure with error: 35)" in out
    assert "onnxruntime fp32" in on_stand_in(pretend + show.replace("(bundle)", "(bundle, threads=1)"), bundle_path)


def test_sizes_are_part_of_an_engine_files_key(on_stand_in, sized_bundle_path, small_bundle_path, copy_of) -> None:
    from helpers import forge

    on_stand_in(
        """
made = built(bundle).entry.record.key
assert made.options["sizes"] == "4:24" and made.profiles == ((1, 1, 1), (4, 4, 4))
""",
        sized_bundle_path,
    )
    wider = copy_of(sized_bundle_path)
    forge(wider, lambda manifest: manifest.update(sizes={"multiple": 4, "largest": 48}))
    sentence = on_stand_in(
        """
made = built(bundle)
print(made.why)
gpu = open_engine(bundle, "tensorrt", may_build=False)
loaded = gpu._loaded.get(gpu._files, made.entry).engine
assert loaded.get_tensor_profile_shape("m", 1) == [(4, 1, n, n) for n in (4, 8, 48)]
""",
        wider,
    )
    assert "built with sizes 4:24, asked for 4:48" in sentence
    on_stand_in('assert "sizes" not in built(bundle).entry.record.key.options', small_bundle_path)


def test_each_step_graph_has_engine_files_of_its_own(on_stand_in, edited_bundle_path, copy_of) -> None:
    """Named by the command that builds it, in each sentence; `on` asks as the engine was opened."""
    bundle = copy_of(edited_bundle_path)
    on_stand_in(
        """
import shlex
cache = EngineCache()
def command(*features, precision="fp32"):
    return f"epsrt build {shlex.quote(str(bundle.path))} --engine tensorrt --precision {precision}" + "".join(features)
def refuse(*features, **options):
    return refused(open_engine, bundle, "tensorrt", precision="fp32", features=features, **options)
built(bundle)
plain = open_engine(bundle, "tensorrt", precision="fp32", may_build=False)
for features, ending in (
    (["guidance"], " --features guidance"), (["mask"], " --features mask"), (["classifier"], " --features classifier"),
    (["mask", "guidance"], " --features guidance,mask"),
):
    graph = bundle.graph("fp32", features)
    want = f'built from step-fp32.onnx, asked for {graph.file}: run "{command(ending)}"'
    assert refuse(*features, may_build=False).endswith(want), want
    assert refused(plain.on, graph).endswith(want)  # it may not build either
built(bundle, precision="fp16", features=["mask"])
cache.remove(built(bundle).entry)
assert refuse(may_build=False).endswith(
    f'built in fp16, asked for fp32; built from step-mask-fp16.onnx, asked for step-fp32.onnx: run "{command()}"')

told = []
other = open_engine(bundle, "tensorrt", precision="fp16", features=["mask"]).on(bundle.graph("fp32"))
other.lanes(1).close()
assert other.graph.file == "step-fp32.onnx" and len(cache.entries()) == 2  # it may
eager = open_engine(bundle, "tensorrt", precision="fp32", on_progress=lambda name, share: told.append(share))
eager.lanes(1).close()
assert not told
with eager.on(bundle.graph("fp32", ["guidance"])) as other, other.lanes(1):
    assert other.graph.features == ("guidance",) and told[-1] == 1.0

entry = built(bundle, features=["guidance", "mask"]).entry
assert entry.record.key.graph == "step-guidance-mask-fp32.onnx"
cache.ship(entry, bundle.path)
cache.remove(entry)
guided = bundle.graph("fp32", ["guidance", "mask"])
for sentence in (refuse("guidance", "mask"), refused(eager.on, guided)):
    assert f'run "{command(" --features guidance,mask")}" to build your own' in sentence, sentence
trusting = open_engine(bundle, "tensorrt", precision="fp32", trust_engines=True, may_build=False)
assert trusting.on(guided).on(bundle.graph("fp32")).on(guided).graph == guided

again = f'run "{command(" --features guidance,mask --batch 1 --batch 8 --again")}"'
def lanes():
    return open_engine(bundle, "tensorrt", precision="fp32", features=("guidance", "mask")).lanes(8)
kept = cache.store(entry.record.key, b"not an engine file", bundle_name="tiny.epsrt")
assert refused(lanes).endswith(again)
other = built(bundle, features=["mask"]).entry
cache.store(entry.record.key, cache.read(other), bundle_name="tiny.epsrt")
sentence = refused(lanes)  # the wrong graph's engine file under its name
assert ".epsrt: rows is float32 [?, 17], the manifest implies float32 [?, 19]: run " in sentence, sentence
assert sentence.endswith(again)
""",
        bundle,
    )


def test_an_engine_file_that_lacks_an_input_is_refused(on_stand_in, edited_bundle_path) -> None:
    """A masked graph's engine file for a classifier's graph: as many columns, other inputs."""
    on_stand_in(
        """
mask, judged = (built(bundle, features=[f]).entry for f in ("mask", "classifier"))
EngineCache().store(judged.record.key, EngineCache().read(mask), bundle_name="tiny.epsrt")
sentence = refused(open_engine(bundle, "tensorrt", precision="fp32", features=["classifier"]).lanes, 1)
assert ".epsrt: target is missing, the manifest implies int64 [?]: run " in sentence, sentence
""",
        edited_bundle_path,
    )


def test_profiles_of_every_input(on_stand_in, edited_bundle_path) -> None:
    on_stand_in(
        """
entry = built(bundle, features=["mask", "guidance"], profiles=((1, 2, 4), (5, 8, 8))).entry
gpu = open_engine(bundle, "tensorrt", precision="fp32", features=["mask", "guidance"])
shapes = gpu._loaded.get(gpu._files, entry).engine.get_tensor_profile_shape
for i, batches in enumerate(((1, 2, 4), (5, 8, 8))):
    image, rows, label = (1, 8, 8), (len(gpu.columns),), ()
    for name, rest in {"x": image, "m": image, "z": image, "rows": rows, "label": label, "known": image, "mask": image,
                       "z2": image}.items():
        assert shapes(name, i) == [(n, *rest) for n in batches], name
""",
        edited_bundle_path,
    )
