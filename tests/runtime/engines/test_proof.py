"""What is measured once and kept, and which file of a step graph an engine then runs."""

from __future__ import annotations

import logging
import threading

import msgspec
import numpy as np
import pytest

from epsrt import Bundle, BundleError, EngineError, OutOfMemoryError, open_engine
from epsrt.engines import dialects, proof
from epsrt.engines.cache.key import Key
from epsrt.engines.cache.store import EngineCache
from epsrt.engines.dialects import open_in_dialect
from epsrt.engines.proof import Proof
from epsrt.manifest import Rung
from epsrt.parity.golden import GoldenError
from helpers import DATA

KEY = Key("d" * 64, "step-fp16.cuda.onnx", "onnxruntime-cuda", "1.0", "A GPU", ("sm_90",), "fp16", (), {"proof": True})
RUNG = Rung("network", "e", "fp16", 1e-4, 3e-3, "relative L2")
MISSED = msgspec.structs.replace(RUNG, figure=0.5)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty one."""
    monkeypatch.setenv("EPSRT_CACHE", str(tmp_path / "cache"))
    return EngineCache()


class TestProof:
    def test_it_is_measured_once(self, monkeypatch, bundle_path):
        engine = open_engine(Bundle.open(bundle_path), "onnxruntime", threads=1)
        made, told = Proof(KEY, "what"), []
        assert made.of(engine, may_measure=False) is None
        rungs = made.of(engine, lambda name, share: told.append(name))
        assert [rung.name for rung in rungs] == ["network", "conditions", "step", "ddim-50", "ddpm-100", "batch"]
        assert told[0] == "what network"
        monkeypatch.setattr(proof, "verify", lambda *_, **__: pytest.fail("measured again"))
        assert made.of(engine) == made.of(engine, may_measure=False) == rungs == made.kept()

    @pytest.mark.parametrize(
        "other",
        [{"bundle": "e" * 64}, {"graph": "g"}, {"version": "2"}, {"gpu": "B"}, {"capabilities": ("sm_89",)},
         {"precision": "fp32"}, {"options": {"proof": True, "fuse": "1"}}],
        ids=lambda changed: next(iter(changed)),
    )  # fmt: skip
    def test_it_holds_for_its_key_alone(self, other):
        Proof(KEY, "").keep([RUNG])
        assert Proof(KEY, "").kept() == [RUNG]
        assert Proof(msgspec.structs.replace(KEY, **other), "").kept() is None

    def test_one_that_cannot_be_kept_is_said(self, monkeypatch, caplog):
        monkeypatch.setattr(EngineCache, "keep_blob", lambda *_: False)
        Proof(KEY, "bf16").keep([])
        assert "what bf16 is worth is not kept, and measured again next time: set EPSRT_CACHE" in caplog.text

    def test_without_a_place_for_a_cache_it_is_measured_all_the_same(self, monkeypatch, caplog):
        def nowhere(*_):
            raise EngineError("there is no home directory to keep engines in")

        monkeypatch.setattr(proof, "EngineCache", nowhere)
        monkeypatch.setattr(proof, "verify", lambda *_, **__: [RUNG])
        assert Proof(KEY, "bf16").of(None) == [RUNG]
        assert "not kept, and measured again next time: there is no home directory" in caplog.text

    def test_a_golden_file_that_does_not_suffice_proves_nothing(self, monkeypatch, caplog):
        def lacking(*_, **__):
            raise GoldenError("golden.safetensors lacks step.x")

        monkeypatch.setattr(proof, "verify", lacking)
        assert Proof(KEY, "bf16").of(None) is None
        assert Proof(KEY, "bf16").kept() is None
        assert "bf16 cannot be proven: golden.safetensors lacks step.x" in caplog.text

    def test_a_bundle_that_is_replaced_meanwhile_is_no_verdict(self, monkeypatch):
        """It would be run in another precision than a fresh process runs it in."""

        def replaced(engine, *_, **__):
            raise engine.bundle.contents.replaced("golden.safetensors")

        engine = open_engine(Bundle.open(DATA / "tiny.epsrt"), "onnxruntime", threads=1)
        monkeypatch.setattr(proof, "verify", replaced)
        with pytest.raises(BundleError, match="replaced since it was opened"):
            Proof(KEY, "bf16").of(engine)
        assert Proof(KEY, "bf16").kept() is None

    def test_threads_wait_for_one_that_measures(self, monkeypatch):
        measured, gate = [], threading.Event()

        def slow(*_, **__):
            measured.append(1)
            gate.wait(5)
            return [RUNG]

        monkeypatch.setattr(proof, "verify", slow)
        threads = [threading.Thread(target=lambda: Proof(KEY, "").of(None)) for _ in range(3)]
        for thread in threads:
            thread.start()
        gate.set()
        for thread in threads:
            thread.join()
        assert len(measured) == 1

    def test_another_process_is_waited_for_with_a_word_and_no_longer_than_a_minute(self, cache, monkeypatch, caplog):
        """What was measured without the lock is not kept: the other one keeps its own."""
        assert proof.WAIT <= 60
        monkeypatch.setattr(proof, "WAIT", 0.3)
        monkeypatch.setattr(proof, "verify", lambda *_, **__: [RUNG])
        told, got = [], []
        with cache.lock(KEY):
            other = threading.Thread(target=lambda: got.append(Proof(KEY, "bf16").of(None, lambda *a: told.append(a))))
            other.start()
            other.join(20)
            assert got == [[RUNG]]
        assert Proof(KEY, "bf16").kept() is None
        assert told == [("bf16 waits for another process", 0.0)]
        assert "another process is measuring what bf16 is worth: waiting for it, 0.3 s at most" in caplog.text
        assert Proof(KEY, "bf16").of(None) == Proof(KEY, "bf16").kept() == [RUNG]


class Spoken:
    """An engine that only says which dialect it was opened in."""

    def __init__(self, dialect, rungs):
        self.dialect, self._rungs, self.closed = dialect, rungs, False

    def proof(self):
        rungs = self._rungs

        class Told:
            def of(self, engine, on_progress, may_measure):
                if isinstance(rungs, BaseException):
                    raise rungs
                return rungs

        return Told()

    def close(self):
        self.closed = True


def opened(bundle, rungs, name="onnxruntime-cuda"):
    made = []

    def make(dialect):
        made.append(Spoken(dialect, rungs))
        return made[-1]

    return open_in_dialect(name, bundle, bundle.graph("fp32"), make), made


class TestDialects:
    @pytest.mark.parametrize("name", dialects.DIALECTS)
    def test_a_proven_one_is_taken(self, bundle_path, name, caplog):
        engine, made = opened(Bundle.open(bundle_path), [RUNG], name)
        assert engine.dialect == dialects.DIALECTS[name] == ("cuda" if name == "onnxruntime-cuda" else "tensorrt")
        assert len(made) == 1
        assert not engine.closed
        assert not caplog.text

    @pytest.mark.parametrize(
        ("rungs", "reason"),
        [
            ([RUNG, MISSED], "there it misses network, which is 0.5 relative L2 (at most 0.003 allowed)"),
            ([msgspec.structs.replace(RUNG, figure=None)], "it misses network, which is not finite"),
            (None, "it is not proven, and cannot be now: open the engine once with may_build=True"),
            (EngineError("onnxruntime cannot run it"), "it cannot run there: onnxruntime cannot run it"),
        ],
    )
    def test_the_plain_graph_runs_in_its_place(self, bundle_path, rungs, reason, caplog):
        engine, (refused, taken) = opened(Bundle.open(bundle_path), rungs)
        assert (engine, engine.dialect, refused.closed, taken.closed) == (taken, "cpu", True, False)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "onnxruntime-cuda runs step-fp32.onnx, not its dialect cuda: " in record.getMessage()
        assert reason in record.getMessage()

    def test_without_the_memory_to_prove_it_a_batch_of_one_runs(self, bundle_path, caplog):
        """The ladder runs the bundle's largest batch, which nobody may have asked for."""
        engine, (refused, _) = opened(Bundle.open(bundle_path), OutOfMemoryError("a batch of 8 needs more"))
        assert (engine.dialect, refused.closed) == ("cpu", True)
        assert "the GPU's memory does not suffice to prove it: a batch of 8 needs more" in caplog.text

    def test_what_interrupts_a_proof_closes_the_engine(self, bundle_path):
        made = []

        def make(dialect):
            made.append(Spoken(dialect, KeyboardInterrupt()))
            return made[-1]

        bundle = Bundle.open(bundle_path)
        with pytest.raises(KeyboardInterrupt):
            open_in_dialect("onnxruntime-cuda", bundle, bundle.graph("fp32"), make)
        assert made[0].closed

    def test_a_bundle_of_an_older_format_has_none(self, caplog):
        engine, made = opened(Bundle.open(DATA / "format-4.epsrt"), [RUNG])
        assert (engine.dialect, len(made)) == ("cpu", 1)
        assert "format-4.epsrt was exported without the dialect of onnxruntime-cuda" in caplog.text

    def test_a_graph_that_is_the_same_in_both_says_nothing(self, bundle_path, caplog):
        bundle = Bundle.open(bundle_path)
        graphs = tuple(msgspec.structs.replace(g, dialects={}) for g in bundle.manifest.graphs)
        bundle = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, graphs=graphs))
        engine, made = opened(bundle, [RUNG])
        assert (engine.dialect, len(made), caplog.text) == ("cpu", 1, "")


def test_cpu_engines_run_the_plain_graph_of_a_bundle_with_dialects(bundle_path):
    bundle = Bundle.open(bundle_path)
    assert set(bundle.graph("fp32").files()) == {"cpu", "tensorrt", "cuda"}
    with open_engine(bundle, "onnxruntime", threads=1) as engine, engine.lanes(1) as lanes:
        assert np.isfinite(lanes.read(0)).all()
