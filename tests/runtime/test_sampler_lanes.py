"""epsrt.sampler and an engine's lanes: in which order they are called, who closes what, and many threads at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from epsrt import EpsrtError, Sampler, noise
from epsrt.engine import Sample, check_sample, check_threads
from epsrt.errors import OutOfMemoryError
from numpy_engine import NumpyEngine, NumpyLanes, bundle

STEPS = 6
KEPT = 8  # lanes objects, of all batches and graphs


@pytest.fixture
def engine():
    return NumpyEngine(bundle())


class TestOnStep:
    def test_steps_have_run_when_it_hears_of_them(self, engine):
        """A GPU's have not, until it is waited for."""
        sampler = Sampler(engine)

        def hear(done, total):
            (lanes,) = engine.made
            lanes.heard.append(f"told {done}")

        sampler.sample(2, steps=STEPS, every=4, on_step=hear)
        (lanes,) = engine.made
        assert lanes.heard == ["write"] * 2 + ["advance", "wait", "told 4", "advance", "wait", "told 6"] + ["read"] * 2

    def test_without_it_nothing_waits_and_all_rows_go_at_once(self, engine):
        Sampler(engine).sample(3, steps=STEPS, every=2)
        (lanes,) = engine.made
        assert lanes.heard == ["write"] * 3 + ["advance"] + ["read"] * 3


class TestClosing:
    def test_lanes_are_closed_when_a_step_raises(self, engine):
        sampler = Sampler(engine)
        whole = sampler.sample(2, steps=STEPS)
        kept = engine.made[0]
        engine.fails_at = sampler.plan(steps=STEPS)["t"][3]
        with pytest.raises(RuntimeError, match="the step failed"):
            sampler.sample(2, steps=STEPS)
        assert kept.closed
        engine.fails_at = None
        np.testing.assert_array_equal(sampler.sample(2, steps=STEPS), whole)
        assert len(engine.made) == 2  # what failed is not used again
        assert not engine.made[1].closed

    def test_lanes_are_closed_when_a_sample_cannot_be_written(self, engine, monkeypatch):
        def fail(self, index, sample, state=None):
            raise MemoryError

        monkeypatch.setattr(NumpyLanes, "write", fail)
        with pytest.raises(MemoryError):
            Sampler(engine).sample(1, steps=STEPS)
        assert engine.made[0].closed

    def test_lanes_of_a_stream_that_is_left_are_closed(self, engine):
        stream = Sampler(engine).stream(6, steps=STEPS)  # of two lanes objects
        next(stream)
        assert [lanes.closed for lanes in engine.made] == [0, 0]
        stream.close()
        assert all(lanes.closed for lanes in engine.made)

    def test_an_engine_that_was_given_stays_open(self, engine):
        with Sampler(engine) as sampler:
            images = sampler.sample(2, steps=STEPS, seed=3)
        assert not engine.closed
        assert all(lanes.closed for lanes in engine.made)
        np.testing.assert_array_equal(Sampler(engine).sample(2, steps=STEPS, seed=3), images)
        with pytest.raises(EpsrtError, match="the sampler of toy.epsrt is closed: open it again"):
            sampler.sample(1, steps=2)

    def test_an_engine_that_it_opened_is_closed(self, engine, monkeypatch):
        asked = []

        def opening(bundle, name, **options):
            asked.append((bundle, name, options))
            return engine

        monkeypatch.setattr("epsrt.sampler.open_engine", opening)
        monkeypatch.setattr("epsrt.sampler.Bundle.open", lambda path, require_signature: path)
        with Sampler.open("toy.epsrt", "numpy", precision="fp32", threads=1, trust_engines=True) as sampler:
            sampler.sample(2, steps=STEPS)
            assert not engine.closed
        assert engine.closed == 1
        options = {"precision": "fp32", "threads": 1, "trust_engines": True, "may_build": True}
        assert asked == [("toy.epsrt", "numpy", options)]
        Sampler.open("toy.epsrt", may_build=False)
        options = {"precision": None, "threads": None, "trust_engines": False, "may_build": False}
        assert asked[1:] == [("toy.epsrt", "auto", options)]

    def test_an_engine_is_closed_where_the_sampler_cannot_be_made(self, engine, monkeypatch):
        class Mine(Sampler):
            def __init__(self, engine, **options):
                super().__init__(engine, **options)
                raise LookupError("mine")

        monkeypatch.setattr("epsrt.sampler.open_engine", lambda bundle, name, **options: engine)
        monkeypatch.setattr("epsrt.sampler.Bundle.open", lambda path, require_signature: path)
        with pytest.raises(LookupError, match="mine"):
            Mine.open("toy.epsrt")
        assert engine.closed == 1

    def test_all_are_closed_where_one_fails(self, engine, monkeypatch):
        def failing(close):
            def fail(self):
                close(self)
                raise RuntimeError("the driver is gone")

            return fail

        for kind in (NumpyLanes, NumpyEngine):
            monkeypatch.setattr(kind, "close", failing(kind.close))
        sampler = Sampler(engine)
        for features in ({}, {"guidance": 2.0}, {"classifier": 2.0}):
            sampler.sample(steps=2, labels=[1, 2], **features)
        with pytest.raises(RuntimeError, match="the driver is gone"):
            sampler.close()
        every = [*engine.made, *(lanes for opened in engine.opened for lanes in opened.made)]
        assert [lanes.closed for lanes in every] == [1, 1, 1]
        assert [opened.closed for opened in engine.opened] == [1, 1]
        assert not sampler._pool.free

    def test_graphs_that_it_opened_are_closed_once(self, engine):
        with Sampler(engine) as sampler:
            for _ in range(2):
                sampler.sample(steps=STEPS, labels=[1, 2], guidance=2.0)
            sampler.sample(steps=STEPS, labels=[1, 2], classifier=2.0)
            assert [opened.graph.features for opened in engine.opened] == [("guidance",), ("classifier",)]
            assert not any(opened.closed for opened in engine.opened)
        assert [opened.closed for opened in engine.opened] == [1, 1]
        assert not engine.closed
        assert all(lanes.closed for opened in engine.opened for lanes in opened.made)
        sampler.close()
        assert [opened.closed for opened in engine.opened] == [1, 1]

    def test_lanes_that_come_back_after_it_was_closed_are_closed(self, engine):
        sampler = Sampler(engine)
        stream = sampler.stream(2, steps=STEPS, every=STEPS - 1)
        next(stream)
        sampler.close()
        assert not engine.made[0].closed  # in work
        list(stream)
        assert engine.made[0].closed


class TestKeptLanes:
    def test_at_most_so_many_are_kept_and_the_oldest_go_first(self, engine):
        sampler = Sampler(engine)
        for size in range(1, 5):
            for features in ({}, {"guidance": 2.0}, {"classifier": 2.0}):
                sampler.sample(steps=2, labels=[1] * size, **features)
        every = [*engine.made, *(lanes for opened in engine.opened for lanes in opened.made)]
        assert len(every) == 12
        assert sum(not lanes.closed for lanes in every) == KEPT
        assert [lanes.closed for lanes in engine.made] == [1, 1, 0, 0]  # of one and of two samples

    def test_use_makes_lanes_young(self, engine):
        sampler = Sampler(engine)
        sampler.sample(1, steps=2)
        for size in (2, 3, 4):
            sampler.sample(size, steps=2)
            sampler.sample(steps=2, labels=[1] * size, guidance=2.0)
        sampler.sample(1, steps=2)
        for size in (1, 2, 3):
            sampler.sample(steps=2, labels=[1] * size, classifier=2.0)
        assert not engine.made[0].closed
        assert engine.made[1].closed
        assert engine.made[0].heard.count("write") == 2

    def test_room_is_made_where_memory_runs_out(self):
        engine = NumpyEngine(bundle(), most_lanes=1)
        sampler = Sampler(engine)
        sampler.sample(1, steps=2)
        sampler.sample(2, steps=2)
        assert [lanes.closed for lanes in engine.made] == [1, 0]
        with pytest.raises(OutOfMemoryError):  # both in work
            list(sampler.stream(3, steps=2, batch=2))

    def test_threads_never_share_lanes(self, monkeypatch):
        """More threads than are kept: none gets what another has, and each sample is what it is alone."""
        engine = NumpyEngine(bundle(max_batch=2))
        sampler, threads = Sampler(engine), KEPT + 4
        together, held, clashes = threading.Barrier(threads), {}, []

        class Watched(NumpyLanes):
            def write(self, index, sample, state=None):
                if held.setdefault(id(self), threading.get_ident()) != threading.get_ident():
                    clashes.append(sample)
                super().write(index, sample, state)

            def read(self, index, what="x"):
                image = super().read(index, what)
                if index == self.batch - 1:
                    del held[id(self)]
                return image

        monkeypatch.setattr("numpy_engine.NumpyLanes", Watched)

        def meet(done, total):
            if done == 3:
                together.wait(60)  # all are in work at once

        def one(seed):
            count, again = 1 + seed % 2, [lambda done, total: time.sleep(0)] * 4
            return [sampler.sample(count, steps=STEPS, seed=seed, on_step=hear) for hear in (meet, *again)]

        with ThreadPoolExecutor(threads) as pool:
            drawn = list(pool.map(one, range(threads)))
        assert not clashes
        assert threads <= len(engine.made) < 5 * threads  # some were used again
        assert sum(not lanes.closed for lanes in engine.made) == KEPT
        for seed, several in enumerate(drawn):
            alone = Sampler(NumpyEngine(engine.bundle)).sample(1 + seed % 2, steps=STEPS, seed=seed)
            for images in several:
                np.testing.assert_array_equal(images, alone)
        sampler.close()
        assert [lanes.closed for lanes in engine.made] == [1] * len(engine.made)


class TestGraphs:
    @pytest.mark.parametrize("closes", [False, True])
    def test_a_call_waits_for_no_other_graph_to_be_opened(self, engine, closes):
        opening, go, found, on = threading.Event(), threading.Event(), [], engine.on

        def slowly(graph):
            opening.set()
            go.wait(60)
            return on(graph)

        sampler, asked = Sampler(engine), {"steps": 2, "labels": 1}
        engine.on = slowly
        with ThreadPoolExecutor(3) as pool:
            guided = [pool.submit(lambda: found.append(sampler.sample(1, guidance=2.0, **asked))) for _ in range(2)]
            opening.wait(60)
            plain = pool.submit(sampler.sample, 1, deadline=time.monotonic() + 30, **asked)
            try:
                assert len(plain.result(20)) == 1
                if closes:
                    sampler.close()
            finally:
                go.set()
            for each in guided:
                each.result(60)
        (opened,) = engine.opened
        assert opened.closed == closes
        assert len(found) == 2
        sampler.close()
        assert opened.closed == 1


class TestChecks:
    def test_a_sample_is_noise_without_conditions_unless_told(self):
        fresh = Sample()
        assert (fresh.seed, fresh.index, fresh.target, fresh.stream) == (0, 0, 0, noise.START)
        assert fresh.conditions == fresh.null_conditions == {}
        assert fresh.start == (0.0, 1.0)
        assert fresh.init is fresh.known is fresh.mask is None

    def test_a_mask_is_for_a_graph_that_has_one(self, engine):
        image = np.zeros((1, 2, 4), np.float32)
        plain, masked = engine.graph, engine.bundle.graph("fp32", ("mask",))
        check_sample(Sample(known=image, mask=image), image.shape, masked, engine.bundle.manifest)
        check_sample(Sample(init=image), image.shape, plain, engine.bundle.manifest)
        check_sample(Sample(), image.shape, masked, engine.bundle.manifest)
        with pytest.raises(EpsrtError, match=r"step-fp32.onnx takes no mask: open the engine with features=\['mask'\]"):
            check_sample(Sample(known=image, mask=image), image.shape, plain, engine.bundle.manifest)
        for one in ({"known": image}, {"mask": image}):
            with pytest.raises(EpsrtError, match="known and mask go together: give both, or neither"):
                check_sample(Sample(**one), image.shape, masked, engine.bundle.manifest)
        for name in ("init", "known", "mask"):
            given = {"known": image, "mask": image, name: image[:, :1]}
            with pytest.raises(EpsrtError, match=rf"{name} has shape \[1, 1, 4\], the network wants \[1, 2, 4\]"):
                check_sample(Sample(**given), image.shape, masked, engine.bundle.manifest)

    def test_threads_are_at_most_the_cores(self, monkeypatch):
        for cores, most in ((4, 4), (None, 1)):
            monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
            for threads in (None, 1, most):
                check_threads(threads)
            for threads in (0, -1, most + 1):
                with pytest.raises(EpsrtError, match=f"threads = {threads} is outside 1 … {most}, this machine"):
                    check_threads(threads)
