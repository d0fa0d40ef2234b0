"""The openvino engine: against onnxruntime, its precisions and their proof, its compiled models, what it refuses."""

import gc
import logging
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from epsrt import (
    Bundle,
    BundleError,
    EngineError,
    InputError,
    NotFiniteError,
    Sample,
    Sampler,
    idle_row,
    open_engine,
    solvers,
)
from epsrt.engines import probe, proof
from epsrt.engines.cache.store import EngineCache
from epsrt.engines.cpu import compiled
from epsrt.engines.cpu import openvino as openvino_cpu
from epsrt.machine import physical_cores
from epsrt.parity.measure import LIMITS, relative_l2
from epsrt.timesteps import spaced
from helpers import forge, run_python

bf16 = pytest.mark.skipif(not openvino_cpu.has_bf16(), reason="this processor has neither AVX512-BF16 nor AMX")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty one."""
    monkeypatch.setenv("EPSRT_CACHE", str(tmp_path / "cache"))
    return EngineCache()


@pytest.fixture(scope="module")
def rival(bundle_path):
    return open_engine(Bundle.open(bundle_path), "onnxruntime", threads=1)


@pytest.fixture(scope="module")
def engine(bundle_path):
    return open_engine(Bundle.open(bundle_path), "openvino", precision="fp32", threads=1)


def drawn(engine, batch, rows, label=0):
    with engine.lanes(batch) as lanes:
        for i in range(batch):
            labels = {"label": (label + i) % 10} if engine.bundle.labelled else {}
            lanes.write(i, Sample(seed=3, index=i, conditions=labels))
        lanes.advance(np.repeat(rows[:, None], batch, axis=1))
        return np.stack([lanes.read(i) for i in range(batch)])


def first_step(engine, t, x):
    """The network's output."""
    row = idle_row(engine.columns)
    for name, value in {"a": 0, "h": 1, "t": t}.items():
        row[engine.columns.index(name)] = value
    with engine.lanes(1) as lanes:
        lanes.write(0, Sample(start=(1.0, 0.0), init=x))
        lanes.advance(row[None, None])
        return lanes.read(0)


class TestSteps:
    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize("batch", [1, 2, 3, 4])
    def test_as_onnxruntime(self, schedule, bundle_path, rival, batch, threads):
        """Odd batches are one part, even ones two on two threads; noise is the same."""
        if threads > physical_cores():
            pytest.skip(f"this machine has {physical_cores()} cores")
        engine = open_engine(Bundle.open(bundle_path), "openvino", precision="fp32", threads=threads)
        assert (engine.name, engine.device, engine.precision, engine.threads) == ("openvino", "cpu", "fp32", threads)
        for make in (solvers.ddpm, solvers.ddim):
            rows = make(schedule, spaced(schedule.T, 12)).rows(engine.columns)
            np.testing.assert_allclose(drawn(engine, batch, rows), drawn(rival, batch, rows), atol=2e-5)

    def test_guided_by_the_sampler(self, engine, rival):
        with Sampler(engine) as ours, Sampler(rival) as theirs:
            for asked in ({"guidance": [1, 2]}, {"method": "heun"}):
                a, b = (s.sample(labels=[3, 8], steps=6, seed=5, **asked) for s in (ours, theirs))
                np.testing.assert_allclose(a, b, atol=5e-5)

    def test_lanes_are_refilled_and_idle(self, schedule, engine):
        rows = solvers.ddpm(schedule, spaced(schedule.T, 8)).rows(engine.columns)
        whole = drawn(engine, 1, rows)
        idle = np.tile(idle_row(engine.columns), (len(rows), 1))
        with engine.lanes(2) as lanes:
            lanes.write(0, Sample(seed=9))
            lanes.advance(np.stack([rows, idle], axis=1)[:3])
            lanes.write(1, Sample(seed=3, conditions={"label": 0}))
            lanes.advance(np.stack([idle, rows], axis=1))
            np.testing.assert_allclose(lanes.read(1), whole[0], atol=1e-6)

    def test_two_threads(self, schedule, engine):
        rows = solvers.ddim(schedule, spaced(schedule.T, 8)).rows(engine.columns)
        alone, got = [drawn(engine, 2, rows, label) for label in (1, 5)], {}
        runs = [
            threading.Thread(target=lambda i=i, y=y: got.update({i: drawn(engine, 2, rows, y)}))
            for i, y in enumerate((1, 5))
        ]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        for i in range(2):
            np.testing.assert_array_equal(got[i], alone[i])

    def test_two_threads_on_a_new_batch_compile_once(self, small_bundle_path, cache, monkeypatch):
        engine = open_engine(Bundle.open(small_bundle_path), "openvino", precision="fp32", threads=1)
        compiled, make, barrier = [], openvino_cpu.OpenVino._compile, threading.Barrier(2)

        def slowly(self, batch, *more):
            compiled.append(batch)
            time.sleep(0.3)  # the other thread comes while this one compiles
            return make(self, batch, *more)

        monkeypatch.setattr(openvino_cpu.OpenVino, "_compile", slowly)

        def open_lanes():
            barrier.wait()
            engine.lanes(3).close()

        threads = [threading.Thread(target=open_lanes) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert compiled == [3]
        assert len(engine._models) == 1

    def test_nan_names_its_lane(self, engine):
        row = idle_row(engine.columns)
        row[engine.columns.index("a")] = np.nan
        with engine.lanes(2) as lanes:
            lanes.advance(np.stack([idle_row(engine.columns), row])[None])
            lanes.read(0)
            with pytest.raises(NotFiniteError, match="lane 1"):
                lanes.read(1)

    def test_sizes(self, sized_bundle_path):
        ours, theirs = (
            Sampler.open(sized_bundle_path, name, precision="fp32", threads=1) for name in ("openvino", "onnxruntime")
        )
        with ours, theirs:
            for size in (None, (12, 16)):
                a, b = (s.sample(2, steps=3, size=size) for s in (ours, theirs))
                np.testing.assert_allclose(a, b, atol=1e-4)

    def test_models_beyond_the_last_few_go(self, engine):
        for batch in (1, 2, 3, 4, 5, 6):
            engine.lanes(batch).close()
        assert len(engine._models) == openvino_cpu.KEPT_MODELS


class TestPrecision:
    @bf16
    def test_auto_takes_it_in_bf16_once_proven(self, bundle_path, cache, monkeypatch):
        monkeypatch.setitem(LIMITS, ("cpu", "bf16"), (1e-2, 38.0))  # the tiny network's DDIM-50 has 41 dB
        opened, told = Bundle.open(bundle_path), []
        engine = open_engine(opened, on_progress=lambda what, share: told.append(what))
        assert (engine.name, engine.precision, engine.graph.precision) == ("openvino", "bf16", "fp32")
        assert told[0] == "bf16 network"
        rungs = engine.proof().kept()
        assert {r.precision for r in rungs} == {"bf16"}
        assert all(r.passed for r in rungs)
        monkeypatch.setattr(proof, "verify", lambda *_, **__: pytest.fail("measured again"))
        assert open_engine(Bundle.open(bundle_path)).precision == "bf16"

    @bf16
    def test_bf16_computes_in_bf16(self, bundle_path, engine):
        half = open_engine(Bundle.open(bundle_path), "openvino", precision="bf16", threads=1)
        x = np.random.default_rng(0).standard_normal((1, 8, 8), dtype=np.float32)
        assert 5e-4 < relative_l2(first_step(half, 50, x), first_step(engine, 50, x)) < 1e-2

    @bf16
    def test_bf16_tells_large_timesteps_apart(self, bundle_path, engine):
        """A bf16 has 8 bits: 666 would be 664, and the sines of its embedding those of another t."""
        half = open_engine(Bundle.open(bundle_path), "openvino", precision="bf16", threads=1)
        x = np.random.default_rng(0).standard_normal((1, 8, 8), dtype=np.float32)
        for t in (301, 666, 957, 999):
            assert relative_l2(first_step(half, t, x), first_step(engine, t, x)) < 1e-2

    def test_weights_are_rounded_to_the_nearest_bf16_ties_to_even(self):
        bits = np.random.default_rng(0).integers(0, 2**32, 64 * 64, dtype=np.uint32)
        bits[:4] = [0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000]  # halfway: down to even, up to even; negative
        weights = bits.view(np.float32)
        weights[~np.isfinite(weights) | (np.abs(weights) > 1e38)] = 1.0
        op = openvino_cpu.opset13
        given = op.parameter([1, 64], np.float32, name="x")
        model = openvino_cpu.ov.Model([op.matmul(given, op.constant(weights.reshape(64, 64)), False, False)], [given])
        openvino_cpu.halve_weights(model)
        (halved,) = [n for n in model.get_ordered_ops() if n.get_type_name() == "Constant"]
        assert halved.get_element_type() == openvino_cpu.ov.Type.bf16
        got = halved.get_tensor_view().data.view(np.uint16).ravel()

        low = weights.view(np.uint32) >> 16
        below, above = ((k << 16).view(np.float32).astype(np.float64) for k in (low, low + 1))
        to_below, to_above = np.abs(weights - below), np.abs(above - weights)
        nearest = np.where(to_below == to_above, low + (low & 1), np.where(to_below < to_above, low, low + 1))
        np.testing.assert_array_equal(got, nearest)
        assert got[:4].tolist() == [0x3F80, 0x3F82, 0xBF80, 0xBF82]

    @bf16
    def test_fp32_where_bf16_misses_a_rung(self, bundle_path, cache, monkeypatch, caplog):
        monkeypatch.setitem(LIMITS, ("cpu", "bf16"), (1e-6, 42.0))
        with caplog.at_level(logging.INFO, "epsrt"):
            engine = open_engine(Bundle.open(bundle_path), "openvino")
        assert engine.precision == "fp32"
        assert "runs in fp32: in bf16 it misses network" in caplog.text

    @bf16
    def test_fp32_unproven_where_nothing_may_be_measured(self, bundle_path, cache):
        assert open_engine(Bundle.open(bundle_path), "openvino", may_build=False).precision == "fp32"

    def test_a_processor_without_bf16(self, bundle_path, monkeypatch):
        monkeypatch.setattr(openvino_cpu, "has_bf16", lambda: False)
        assert open_engine(Bundle.open(bundle_path), "openvino").precision == "fp32"
        with pytest.raises(
            EngineError, match=r"precision bf16 needs a processor with AVX512-BF16 or AMX, and .*: use fp32"
        ):
            open_engine(Bundle.open(bundle_path), "openvino", precision="bf16")
        with pytest.raises(EngineError, match="no engine runs here; precision bf16 needs a processor"):
            open_engine(Bundle.open(bundle_path), precision="bf16")

    def test_where_no_engine_has_the_precision_each_says_its_own(self, bundle_path, monkeypatch):
        monkeypatch.setattr(probe, "available", lambda: ("onnxruntime",))
        with pytest.raises(EngineError, match="no engine runs here; engine onnxruntime runs in .*, not in bf16"):
            open_engine(Bundle.open(bundle_path), precision="bf16")

    def test_fp16_is_another_engines(self, bundle_path):
        with pytest.raises(EngineError, match="engine openvino runs in bf16 or fp32.*, not in fp16: ask for another"):
            open_engine(Bundle.open(bundle_path), "openvino", precision="fp16")
        assert open_engine(Bundle.open(bundle_path), precision="fp16").name == "onnxruntime"


class TestCompiledModels:
    def opened(self, path):
        return open_engine(Bundle.open(path), "openvino", precision="fp32", threads=1)

    def test_are_kept(self, small_bundle_path, cache, schedule, monkeypatch):
        first = self.opened(small_bundle_path)
        rows = solvers.ddim(schedule, spaced(schedule.T, 4)).rows(first.columns)
        want = drawn(first, 2, rows)
        (entry,) = cache.entries()
        key = entry.record.key
        assert (key.engine, key.precision, key.profiles) == ("openvino", "fp32", ((2, 2, 2),))
        assert key.gpu == openvino_cpu.processor()
        monkeypatch.setattr(openvino_cpu.OpenVino, "_compile", lambda *_: pytest.fail("compiled again"))
        np.testing.assert_array_equal(drawn(self.opened(small_bundle_path), 2, rows), want)

    def test_are_not_waited_for_to_be_kept(self, small_bundle_path, cache, caplog):
        engine, made = self.opened(small_bundle_path), []
        with cache.lock(engine._key(2, (1, 8, 8), 1)):
            compiling = threading.Thread(target=lambda: made.append(engine.lanes(2)))
            compiling.start()
            compiling.join(20)
            assert len(made) == 1
        assert cache.entries() == []
        assert not caplog.text

    def test_damaged_ones_are_compiled_again(self, small_bundle_path, cache, caplog):
        self.opened(small_bundle_path).lanes(1)
        (entry,) = cache.entries()
        entry.path.write_bytes(b"x" * entry.path.stat().st_size)
        self.opened(small_bundle_path).lanes(1)
        assert "not taken from the engine cache" in caplog.text
        self.opened(small_bundle_path).lanes(1)
        assert caplog.text.count("not taken from the engine cache") == 1  # it was put in its place

    def test_without_a_cache_it_runs(self, small_bundle_path, cache, caplog, monkeypatch):
        cache.directory.mkdir(parents=True)
        cache.directory.chmod(0o777)  # others can write it
        self.opened(small_bundle_path).lanes(1)
        assert "a compiled model is not kept" in caplog.text
        assert not cache.entries()

    def test_what_openvino_cannot_read_is_compiled(self, small_bundle_path, cache, caplog):
        """A blob of the right bytes that another build of the library wrote."""
        self.opened(small_bundle_path).lanes(1)
        (entry,) = cache.entries()
        cache.store(entry.record.key, b"no model", bundle_name="small")
        self.opened(small_bundle_path).lanes(1)
        assert "not taken from the engine cache" in caplog.text

    def test_weights_stay_in_the_kept_file(self, small_bundle_path, cache, schedule):
        """They are mapped: lanes still run when their engine is closed and the file removed."""
        self.opened(small_bundle_path).lanes(1)
        engine = self.opened(small_bundle_path)
        rows = solvers.ddim(schedule, spaced(schedule.T, 4)).rows(engine.columns)
        want = drawn(engine, 1, rows)
        with engine.lanes(1) as lanes:
            lanes.write(0, Sample(seed=3))
            (entry,) = cache.entries()
            assert str(entry.path) in Path("/proc/self/maps").read_text()
            engine.close()
            cache.remove(entry)
            del engine
            gc.collect()
            lanes.advance(rows[:, None])
            np.testing.assert_array_equal(lanes.read(0), want[0])

    @bf16
    def test_kept_ones_have_bf16_weights(self, digits_bundle_path, cache):
        for precision in ("fp32", "bf16"):
            open_engine(Bundle.open(digits_bundle_path), "openvino", precision=precision, threads=1).lanes(1)
        sizes = {entry.record.key.precision: entry.record.size for entry in cache.entries()}
        assert sizes["bf16"] < 0.8 * sizes["fp32"]

    def test_without_a_place_for_a_cache_it_runs(self, small_bundle_path, monkeypatch, caplog):
        def nowhere(*_):
            raise EngineError("there is no home directory to keep engines in")

        monkeypatch.setattr(compiled, "EngineCache", nowhere)
        self.opened(small_bundle_path).lanes(1)
        assert "not taken from the engine cache: there is no home directory" in caplog.text

    def test_those_used_longest_ago_go(self, small_bundle_path, cache, monkeypatch):
        monkeypatch.setattr(compiled, "KEPT_FILES", 2)
        engine = self.opened(small_bundle_path)
        for batch in (1, 2):
            engine.lanes(batch)
        first = next(e for e in cache.entries() if e.record.key.profiles == ((1, 1, 1),))
        second = next(e for e in cache.entries() if e != first)
        os.utime(second.record_path, (0, 0))
        self.opened(small_bundle_path).lanes(3)
        assert sorted(e.record.key.profiles[0][0] for e in cache.entries()) == [1, 3]


class TestRefusals:
    def test_without_the_library(self, small_bundle_path):
        code = """
import sys
from epsrt import Bundle, EngineError, open_engine
try:
    print(open_engine(Bundle.open(sys.argv[1]), sys.argv[2]).name)
except EngineError as error:
    print(error)
"""
        done = run_python(code, small_bundle_path, "openvino", blocked=("openvino",))
        assert done.stdout.startswith("engine openvino needs its library (")
        assert done.stdout.strip().endswith('pip install "epsrt[openvino]"')
        done = run_python(code, small_bundle_path, "auto", blocked=("openvino",), env={"CUDA_VISIBLE_DEVICES": ""})
        assert done.stdout.strip() == "onnxruntime"

    def test_threads(self, small_bundle_path):
        with pytest.raises(InputError, match="threads = 4096 is outside"):
            open_engine(Bundle.open(small_bundle_path), "openvino", threads=4096)

    def test_a_file_that_is_no_graph(self, copy_of, small_bundle_path):
        path = copy_of(small_bundle_path)
        (path / "step-fp32.onnx").write_bytes(b"not a graph")
        forge(path)
        engine = open_engine(Bundle.open(path), "openvino", precision="fp32")
        with pytest.raises(BundleError, match=r"step-fp32.onnx: it .*; no engine is given it: export"):
            engine.lanes(1)

    @pytest.mark.parametrize(("field", "name"), [("shape", "x"), ("classes", "label")])
    def test_a_manifest_of_another_graph(self, copy_of, small_bundle_path, field, name):
        path = copy_of(small_bundle_path)
        other = {"shape": [3, 8, 8], "classes": None if Bundle.open(path).labelled else 2}[field]
        forge(path, lambda manifest: manifest.update({field: other}))
        engine = open_engine(Bundle.open(path), "openvino", precision="fp32")
        with pytest.raises(EngineError, match=f"step-fp32.onnx: {name} is .* the manifest implies"):
            engine.lanes(1)

    def test_a_step_that_fails(self, engine, monkeypatch):
        def wait(self):
            raise RuntimeError("Exception from src/plugins:\n  no memory")

        monkeypatch.setattr("openvino.InferRequest.wait", wait)
        with engine.lanes(1) as lanes, pytest.raises(EngineError) as e:
            lanes.advance(idle_row(engine.columns)[None, None])
        expected = f"OpenVINO failed in a step of {engine.bundle.path}: Exception from src/plugins: no memory"
        assert str(e.value) == expected

    def test_the_other_parts_are_cancelled_when_one_fails(self, bundle_path, monkeypatch):
        """Or they would go on writing into buffers that somebody reads or frees."""
        if physical_cores() < 2:
            pytest.skip("this machine has one core")
        engine = open_engine(Bundle.open(bundle_path), "openvino", precision="fp32", threads=2)
        calls, wait, cancel = [], openvino_cpu.ov.InferRequest.wait, openvino_cpu.ov.InferRequest.cancel

        def waits(request):
            calls.append(("wait", request))
            if len(calls) == 1:
                raise RuntimeError("no memory")
            wait(request)

        def cancels(request):
            calls.append(("cancel", request))
            cancel(request)

        monkeypatch.setattr("openvino.InferRequest.wait", waits)
        monkeypatch.setattr("openvino.InferRequest.cancel", cancels)
        with engine.lanes(2) as lanes:
            with pytest.raises(EngineError, match="OpenVINO failed in a step of .*: no memory"):
                lanes.advance(np.tile(idle_row(engine.columns), (1, 2, 1)))
            first, second = calls[0][1], calls[-1][1]
            assert first is not second
            assert [name for name, _ in calls] == ["wait", "cancel", "wait", "cancel", "wait"]
            assert [request for _, request in calls[1:]] == [first, first, second, second]

    def test_elsewhere_than_on_x86_onnxruntime_comes_first(self, monkeypatch):
        cpus = [n for n in probe.available() if probe.info_of(n).device == "cpu"]
        assert cpus == ["openvino", "onnxruntime"]
        monkeypatch.setattr("platform.machine", lambda: "aarch64")
        assert [n for n in probe.available() if probe.info_of(n).device == "cpu"] == cpus[::-1]


def test_a_signal_after_the_plugin_is_gone_is_a_signal(small_bundle_path, tmp_path):
    """Opened and closed by whichever thread: none is left with a stack for signals that the plugin has freed."""
    code = """
import faulthandler, gc, signal, sys, threading
from epsrt import Sampler
faulthandler.enable()  # gives the main thread such a stack, as pytest does
heard = []
signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
def aside(call):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
def here(call): call()
for opens in (here, aside):
    for closes in (here, aside):
        made = []
        opens(lambda: made.append(Sampler.open(sys.argv[1], "openvino", precision="fp32", threads=1)))
        opens(lambda: made[0].sample(1, steps=2))
        closes(lambda: made.pop().close())
        gc.collect()
        signal.raise_signal(signal.SIGUSR1)
assert len(heard) == 4
"""
    done = run_python(code, small_bundle_path, env={"EPSRT_CACHE": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
