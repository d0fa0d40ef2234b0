"""epsrt.warm: what is made ahead is made once, and nothing is left for the first call."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import epsrt
from epsrt import Bundle, EngineError, InputError, Sampler, open_engine, warm
from epsrt.engines import proof
from epsrt.engines.cache.store import EngineCache
from epsrt.engines.cpu import compiled, models
from epsrt.engines.cpu import openvino as openvino_cpu
from helpers import run_python

ON = {"engine": "openvino", "precision": "fp32", "threads": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty one."""
    monkeypatch.setenv("EPSRT_CACHE", str(tmp_path / "cache"))
    return EngineCache()


@pytest.fixture
def no_work(monkeypatch):
    """From when it is called, nothing may be compiled or proven."""

    def begin():
        for each in (openvino_cpu.OpenVino, models.PartModels):
            monkeypatch.setattr(each, "_compile", lambda *_: pytest.fail("compiled"))
        monkeypatch.setattr(proof, "verify", lambda *_, **__: pytest.fail("proven"))

    return begin


def test_what_is_made_is_there_for_the_first_call(small_bundle_path, cache, no_work):
    made = warm(small_bundle_path, [1, 3], **ON)
    assert sorted(made) == sorted(entry.path for entry in cache.entries())
    assert len(made) == 2
    no_work()
    assert warm(Bundle.open(small_bundle_path), [1, 3], **ON) == []
    with Sampler.open(small_bundle_path, "openvino", precision="fp32", threads=1) as sampler:
        assert len(sampler.sample(3, steps=2)) == 3


@pytest.mark.parametrize(("size", "extents"), [(None, (16, 16)), ((4, 12), (8, 24))])
def test_the_first_picture_compiles_nothing(latent_bundle_path, cache, no_work, size, extents):
    """Of latents: decoded, encoded to begin from, and previewed."""
    made = warm(latent_bundle_path, [1, 2], sizes=[size], features=(), **ON)
    files = {(e.record.key.graph, e.record.key.profiles[0][0], e.record.key.precision) for e in cache.entries()}
    graphs = ("step-fp32.onnx", "decode-fp32.onnx", "encode-fp32.onnx", "preview-fp32.onnx")
    assert files == {(graph, batch, "fp32") for graph in graphs for batch in (1, 2)}
    assert len(made) == len(files)
    no_work()
    assert warm(latent_bundle_path, [1, 2], sizes=[size], features=(), **ON) == []
    with Sampler.open(latent_bundle_path, "openvino", precision="fp32", threads=1) as sampler:
        pictures = sampler.sample(2, steps=2, size=size)
        assert pictures.shape == (2, 3, *extents)
        init = np.zeros((1, 3, *extents), np.float32)
        assert sampler.sample(init=init, strength=0.5, steps=2).shape == init.shape
        assert sampler.preview(sampler.encode(init)).shape == init.shape


def test_a_part_that_is_not_kept_is_said(latent_bundle_path, monkeypatch):
    store = EngineCache.store

    def of_steps_alone(cache, key, *args, **options):
        if key.graph.startswith("decode"):
            raise EngineError("full")
        return store(cache, key, *args, **options)

    monkeypatch.setattr(EngineCache, "store", of_steps_alone)
    with pytest.raises(EngineError, match="the model of part decode for batch 1 was compiled, and is not kept: set EP"):
        warm(latent_bundle_path, [1], features=(), **ON)


@pytest.mark.skipif(not openvino_cpu.has_bf16(), reason="this processor has neither AVX512-BF16 nor AMX")
def test_a_proof_is_made_too(bundle_path, no_work):
    made = warm(bundle_path, [2], "openvino", features=(), threads=1)
    assert [path.name.endswith(".parity.bin") for path in made] == [*[False] * (len(made) - 1), True]
    no_work()
    assert warm(bundle_path, [2], "openvino", features=(), threads=1) == []
    with Sampler.open(bundle_path, "openvino", threads=1) as sampler:
        assert sampler.engine.precision == "bf16"
        sampler.sample(2, steps=2)


def test_by_default_1_and_the_largest_batch_of_every_graph(bundle_path, cache):
    warm(bundle_path, **ON)
    keys = [entry.record.key for entry in cache.entries()]
    assert {(key.graph, key.profiles[0][0]) for key in keys} == {
        (graph, batch) for graph in ("step-fp32.onnx", "step-guidance-fp32.onnx") for batch in (1, 8)
    }


def test_features_and_sizes_are_chosen(bundle_path, sized_bundle_path, cache):
    warm(bundle_path, [1], features=["guidance"], **ON)
    assert [entry.record.key.graph for entry in cache.entries()] == ["step-guidance-fp32.onnx"]
    made = warm(sized_bundle_path, [1], sizes=[None, (12, 8)], **ON)
    sizes = {entry.record.key.options["size"] for entry in cache.entries() if entry.path in made}
    assert sizes == {"8x8", "12x8"}


def test_an_engine_that_compiles_nothing_makes_nothing(small_bundle_path, cache, monkeypatch):
    assert warm(small_bundle_path, [1], "onnxruntime", threads=1) == []
    monkeypatch.delenv("EPSRT_CACHE")
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert warm(small_bundle_path, [1], "onnxruntime", threads=1) == []


def test_without_filelock_onnxruntime_is_opened(small_bundle_path):
    code = "import sys, epsrt; print(epsrt.warm(sys.argv[1], [1], threads=1))"
    done = run_python(code, small_bundle_path, blocked=("filelock", "openvino"))
    assert done.stdout == "[]\n", done.stderr


def test_bad_arguments(small_bundle_path, tmp_path, no_work):
    no_work()
    with pytest.raises(InputError, match="a batch of 9 is outside 1 … 4"):
        warm(small_bundle_path, [1, 9], **ON)
    with pytest.raises(InputError, match="a size of 9 × 9 is not 8 × 8"):
        warm(small_bundle_path, [1], sizes=[(9, 9)], **ON)
    with pytest.raises(epsrt.BundleError, match="does not exist"):
        warm(tmp_path / "nowhere.epsrt")


def test_a_cache_that_keeps_nothing_is_said(small_bundle_path, cache, monkeypatch, no_work):
    no_work()
    cache.directory.write_text("a file")
    with pytest.raises(EngineError, match="cannot be made .*: set EPSRT_CACHE to a directory that you can write"):
        warm(small_bundle_path, [1], **ON)


def test_a_model_that_is_not_kept_is_said(small_bundle_path, monkeypatch):
    monkeypatch.setattr(EngineCache, "store", lambda *_, **__: (_ for _ in ()).throw(EngineError("full")))
    with pytest.raises(EngineError, match="the model for batch 1 was compiled, and is not kept: set EPSRT_CACHE"):
        warm(small_bundle_path, [1], **ON)


def test_another_process_that_keeps_the_model_is_waited_for(small_bundle_path, cache, monkeypatch, caplog):
    """It is not for long, and a sentence says so."""
    monkeypatch.setattr(compiled, "KEEPING", 0.3)
    with open_engine(Bundle.open(small_bundle_path), "openvino", precision="fp32", threads=1) as engine:
        key = engine._key(1, (1, 8, 8), 1)
        said = "another process is keeping the model for batch 1"
        with cache.lock(key), pytest.raises(EngineError, match=f"{said} for more than 0.3 s: try again"):
            warm_in_a_thread(small_bundle_path)
    assert f"{said}: waiting for it, 0.3 s at most" in caplog.messages
    assert len(warm(small_bundle_path, [1], **ON)) == 1  # as the sentence says


def warm_in_a_thread(path):
    """The lock is a thread's own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(warm, path, [1], **ON).result()


def test_more_than_the_cache_keeps_is_said_before_the_work(small_bundle_path, monkeypatch, no_work):
    no_work()
    monkeypatch.setattr(openvino_cpu.OpenVino, "most_kept", 2)
    with pytest.raises(InputError, match="the engine cache keeps 2 models of a graph, not 3: ask for fewer"):
        warm(small_bundle_path, [1, 2, 3], **ON)
