"""Engine files for exact batches, and for ranges by request: which one lanes run on, and how many stay loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from epsrt.engines.cache.entry import Entry
from epsrt.engines.cache.key import Key, Profile, Record
from epsrt.engines.gpu.engine_files import Choice, above, holding, profiles_of

CHOSEN = """
import gc
from epsrt.engines.gpu.tensorrt import open_tensorrt
from epsrt.engines.gpu.trt_loaded_files import KEPT_FILES
said, told = [], []

def opened(**options):
    return open_tensorrt("tensorrt", bundle, bundle.graph("fp32"), say=said.append,
                         on_progress=lambda name, share: told.append(share), **options)

def profile(lanes):
    context = lanes._runner._context
    return [shape[0] for shape in context.engine._made["profiles"][context._profile]["x"]]

def chosen(engine, batch):  # the profile that serves a batch, how many lanes run, and whether it was built
    said.clear(), told.clear()
    with engine.lanes(batch) as lanes:
        assert lanes.batch == batch and bool(told) == bool(said)
        return profile(lanes), lanes._width, bool(said)

def files():
    return sorted(e.record.key.profiles for e in EngineCache().entries())
"""


def test_a_batch_has_an_engine_file_of_its_own(on_stand_in, small_bundle_path) -> None:
    on_stand_in(
        CHOSEN
        + """
engine = opened()
assert engine.max_batch == 4 and engine.batch_limit == "the bundle's largest" and not files()
for built_now in (True, False):
    for batch in (3, 1):
        assert chosen(engine, batch) == ([batch] * 3, batch, built_now)
assert files() == [((1, 1, 1),), ((3, 3, 3),)]
chosen(engine, 2)
why = "small.epsrt has no engine file for this: the nearest was built for batch 1, asked for batch 2"
assert said == [f"{why}: building it"]
assert "a batch of 5 is outside 1 … 4, the bundle's largest" in refused(engine.lanes, 5)
cpu = open_engine(bundle, "onnxruntime", threads=1)
with Sampler(engine) as sampler, Sampler(cpu) as plain:
    close(sampler.sample(7, steps=5, seed=1), plain.sample(7, steps=5, seed=1))  # four, then three
assert len(files()) == 4
""",
        small_bundle_path,
    )


def test_a_range_serves_by_request_alone(on_stand_in, small_bundle_path) -> None:
    """What holds a batch comes before a build, the narrowest first; with may_build=False also what begins above."""
    on_stand_in(
        CHOSEN
        + """
built(bundle, profiles=((2, 3, 4),))
engine, strict = opened(), opened(may_build=False)
assert strict.max_batch == 4
for each in (engine, strict):
    assert [chosen(each, batch) for batch in (2, 3, 4)] == [([2, 3, 4], batch, False) for batch in (2, 3, 4)]
assert chosen(strict, 1) == ([2, 3, 4], 2, False)  # a lane idles
assert chosen(engine, 1) == ([1, 1, 1], 1, True)
assert chosen(strict, 1) == ([1, 1, 1], 1, False)
built(bundle, profiles=((3, 3, 3),))
built(bundle, profiles=((1, 4, 4), (1, 2, 4)))
assert [chosen(engine, batch)[0] for batch in (1, 2, 3, 4)] == [[1, 1, 1], [2, 3, 4], [3, 3, 3], [2, 3, 4]]
""",
        small_bundle_path,
    )


def entry(*profiles: Profile) -> Entry:
    key = Key("digest", "step.onnx", "tensorrt", "11", "", ("sm_90",), "fp16", profiles, {})
    return Entry(Path("a"), Record(key, "", 0, "", "", {}), "", 0, 0.0, False)


def test_the_nearest_profile_of_several() -> None:
    one, many = entry((1, 1, 1), (1, 8, 64)), entry((16, 32, 64), (1, 48, 64), (128, 128, 128), (100, 128, 128))
    both = [one, many]
    assert [holding(both, b) for b in (1, 2, 16, 128)] == [
        Choice(one, 0, 1), Choice(one, 1, 2), Choice(many, 0, 16), Choice(many, 2, 128)
    ]  # fmt: skip
    assert holding(both, 65) is None
    assert above(both, 65) == Choice(many, 3, 100)
    assert above(both, 128) is None
    assert holding([many, one], 40) == holding(both, 40) == Choice(many, 0, 40)
    assert holding([entry((1, 2, 4)), second := entry((1, 3, 4))], 4) == Choice(second, 0, 4)
    assert profiles_of(replace(one, record=None)) == ()


def test_where_nothing_may_be_built(on_stand_in, small_bundle_path) -> None:
    """The command builds just what was asked for."""
    on_stand_in(
        CHOSEN
        + """
command = f"epsrt build {bundle.path} --engine tensorrt --precision fp32"
sentence = refused(opened, may_build=False)
assert sentence == f'no engine file of small.epsrt for tensorrt was built yet: run "{command}"', sentence
entry = built(bundle, profiles=((3, 3, 3),)).entry
engine = opened(may_build=False)
sentence = refused(engine.lanes, 4)
assert "a batch of 4 is outside 1 … 3, the largest of its engine files, which are for batch 3" in sentence
assert sentence.endswith(f'(for another, run "{command} --batch N")')
EngineCache().remove(entry)  # by another process, after it was opened
for batch in (2, 3):
    sentence = refused(engine.lanes, batch)
    assert sentence == f'no engine file of small.epsrt for tensorrt was built yet: run "{command} --batch {batch}"'
built(bundle, profiles=((1, 1, 1),))
sentence = refused(engine.lanes, 2)
assert f'the nearest was built for batch 1, asked for batch 2: run "{command} --batch 2"' in sentence
assert files() == [((1, 1, 1),)] and not told
""",
        small_bundle_path,
    )


def test_few_stay_loaded_and_lanes_keep_theirs(on_stand_in, bundle_path) -> None:
    on_stand_in(
        CHOSEN
        + """
def loaded(): return gc.collect() and None or len(trt.loaded)
engine = opened()
first = engine.lanes(1)
first.write(0, Sample(seed=1, conditions={"label": 1}))
for batch in range(2, 9):
    engine.lanes(batch).close()
assert loaded() == KEPT_FILES + 1  # the first lanes hold theirs
rows = Sampler(engine).plan("ddim", 5).rows(engine.columns)[:, None]
first.advance(rows)
close(first.read(0)[None], Sampler(open_engine(bundle, "onnxruntime", threads=1)).sample(1, steps=5, seed=1, labels=1))
before = len(trt.deserialized)
for batch in (8, 7, 6, 7, 8):
    engine.lanes(batch).close()
assert len(trt.deserialized) == before
engine.lanes(5).close()  # 6 was used longest ago
engine.lanes(8).close(), engine.lanes(7).close()
assert len(trt.deserialized) == before + 1
engine.lanes(6).close()
assert len(trt.deserialized) == before + 2

for entry in EngineCache().entries():  # "epsrt cache --prune --all": what is loaded still serves
    EngineCache().remove(entry)
assert chosen(engine, 6) == ([6, 6, 6], 6, False)
engine.close()
assert loaded() == 1
first.write(0, Sample(seed=2))
first.advance(rows)
first.read(0)
first.close()
assert loaded() == 0
""",
        bundle_path,
    )


def test_what_is_not_in_use_makes_room(on_stand_in, bundle_path) -> None:
    on_stand_in(
        CHOSEN
        + """
engine = opened()
for batch in (1, 2, 3):
    engine.lanes(batch).close()
size = EngineCache().entries()[0].record.size
trt.knobs["room"] = 2 * size + 50
gc.collect()
with engine.lanes(1), engine.lanes(4):
    assert len(trt.loaded) == 2
    try:
        engine.lanes(5)
        raise AssertionError("this was not refused")
    except epsrt.OutOfMemoryError as error:
        assert "refuses the engine file of tiny.epsrt (" in str(error) and "OutOfMemory" in str(error)
engine.lanes(5).close()  # the next call goes on
""",
        bundle_path,
    )


def test_threads_build_each_batch_once(on_stand_in, bundle_path) -> None:
    on_stand_in(
        CHOSEN
        + """
trt.knobs["sleep"] = 0.02
engine, failures, barrier = opened(), [], threading.Barrier(6)
def work(batch):
    try:
        barrier.wait()
        with engine.lanes(batch) as lanes:
            assert profile(lanes) == [batch] * 3
    except BaseException as error:
        failures.append(repr(error))
threads = [threading.Thread(target=work, args=(b,)) for b in (1, 2, 3) * 2]
for t in threads: t.start()
for t in threads: t.join()
assert not failures, failures
assert len(files()) == 3 and len(said) == 3 and len(trt.deserialized) == 3, (files(), said)
""",
        bundle_path,
    )


def test_the_library_has_one_logger_and_each_call_its_own_errors(on_stand_in, small_bundle_path) -> None:
    """TensorRT talks to the first logger that it was given; a build in one thread fails beside a load in another."""
    on_stand_in(
        CHOSEN
        + """
entry = built(bundle).entry
logger = library("tensorrt").logger
assert library("tensorrt").logger is logger and trt._global == [logger]
EngineCache().store(entry.record.key, b"not an engine file", bundle_name="small.epsrt")
loading, building = threading.Event(), threading.Event()
real = trt.Runtime.deserialize_cuda_engine
def slow(self, data):
    loading.set()
    building.wait(10)
    return real(self, data)
def fail(self, network, config):
    loading.wait(10)
    self.logger.log(trt.ILogger.ERROR, "no kernel can do this")
    theirs = threading.Thread(target=self.logger.log, args=(trt.ILogger.ERROR, "a thread of the library's own"))
    theirs.start(), theirs.join()
    building.set()
trt.Runtime.deserialize_cuda_engine, trt.Builder.build_serialized_network = slow, fail
sentences = {}
def load(): sentences["load"] = refused(opened().lanes, 1)
def build(): sentences["build"] = refused(built, bundle, profiles=((2, 2, 2),))
threads = [threading.Thread(target=work) for work in (load, build)]
for t in threads: t.start()
for t in threads: t.join()
assert ": a thread of the library's own; the magic tag does not match; run " in sentences["load"], sentences
assert sentences["build"].endswith(": no kernel can do this; a thread of the library's own"), sentences
with logger.hearing() as heard:
    assert str(heard) == "it gave no reason"  # what earlier calls were told is theirs
""",
        small_bundle_path,
    )
