"""How calls end: signals, errors, closing in mid-call, streams that are dropped; and what can be sent to a process."""

from __future__ import annotations

import copy
import gc
import linecache
import multiprocessing
import pickle
import signal
import sys
import threading
import time

import numpy as np
import pytest

from epsrt import Bundle, InputError, Plan, Request, Sample, Sampler, graphs
from epsrt.prepare import prepare
from numpy_engine import NumpyEngine, bundle

STEPS = 6
ASKED = {"method": "ddpm", "steps": STEPS, "seed": 3}
CPU = ("onnxruntime", "openvino")


@pytest.fixture(params=CPU)
def opened(request, bundle_path):
    if request.param == "openvino":
        pytest.importorskip("openvino")
    with Sampler.open(bundle_path, request.param, precision="fp32", threads=1) as sampler:
        yield sampler


@pytest.fixture
def owning():
    """A sampler that closes its engine, as Sampler.open's does."""
    sampler = Sampler(NumpyEngine(bundle()))
    sampler._graphs.own.append(sampler.engine)
    return sampler


class TestSignals:
    def test_an_interrupt_in_mid_sample_leaves_the_sampler_as_it_was(self, opened):
        asked = {"method": "ddpm", "steps": 50, "seed": 5, "labels": [1, 2, 3], "batch": 2}
        whole = opened.sample(**asked)

        def interrupt(number, frame):
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            for i in range(12):
                with pytest.raises(KeyboardInterrupt):
                    signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.003 * i)
                    while True:
                        opened.sample(**{**asked, "seed": i})
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        np.testing.assert_array_equal(opened.sample(**asked), whole)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, StopIteration])
    def test_what_on_step_raises_comes_out_and_the_next_call_is_as_ever(self, opened, error):
        asked = {"method": "ddpm", "steps": STEPS, "seed": 5, "labels": [1, 2]}
        whole = opened.sample(**asked)

        def fail(done, total):
            raise error("mine")

        with pytest.raises(error, match="mine"):
            opened.sample(every=2, on_step=fail, **asked)
        assert not any(opened._pool.free.values())
        np.testing.assert_array_equal(opened.sample(**asked), whole)

    def test_one_at_any_line_of_graphs_leaves_no_call_counted(self, owning):
        """Or the engines would never be closed."""
        lines = 0
        while interrupted(lambda: owning.sample(1, **ASKED), lines):
            assert not owning._graphs.calls, lines
            lines += 1
        assert lines > 8
        owning.close()
        assert owning.engine.closed == 1


def interrupted(call, at):
    """Whether it came to line number `at` of graphs.running, where a signal's handler raises; not in its clean-up."""
    left, before = [at], sys.gettrace()

    def trace(frame, event, argument):
        if frame.f_code.co_filename != graphs.__file__ or frame.f_code.co_name != "running":
            return trace if event == "call" else None
        if event == "line" and "self.calls.discard" not in linecache.getline(graphs.__file__, frame.f_lineno):
            left[0] -= 1
            if left[0] < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


class TestStreams:
    def test_one_that_is_dropped_frees_its_lanes(self):
        sampler = Sampler(NumpyEngine(bundle()))
        stream = sampler.stream(6, **ASKED)
        next(stream)
        loop = [stream]
        loop.append(loop)
        del stream, loop
        gc.collect()
        assert [lanes.closed for lanes in sampler.engine.made] == [1, 1]
        assert not sampler._graphs.calls

    def test_one_that_is_collected_while_the_sampler_works_waits_for_nothing(self):
        """The collector runs anywhere, within the sampler's own locks too."""
        sampler = Sampler(NumpyEngine(bundle()))
        stream = sampler.stream(2, **ASKED)
        next(stream)
        with sampler._graphs._lock, sampler._pool._lock:
            stream.close()
        assert sampler.engine.made[0].closed

    def test_one_of_an_open_engine_goes_on_in_other_threads(self, opened):
        whole = list(opened.stream(3, batch=2, **ASKED))
        stream, found = opened.stream(3, batch=2, **ASKED), []
        for _ in whole:
            thread = threading.Thread(target=lambda: found.append(next(stream)))
            thread.start()
            thread.join()
        for mine, theirs in zip(found, whole, strict=True):
            np.testing.assert_array_equal(mine, theirs)


class TestClosing:
    def test_a_call_in_work_runs_to_its_end_and_its_engines_are_closed_then(self, owning):
        engine, reached, go, found = owning.engine, threading.Event(), threading.Event(), []
        whole = Sampler(NumpyEngine(bundle())).sample(5, labels=2, guidance=2.0, **ASKED)

        def wait(done, total):
            if done == 2:
                reached.set()
                go.wait(60)

        def run():
            found.append(owning.sample(5, labels=2, guidance=2.0, batch=2, on_step=wait, **ASKED))

        thread = threading.Thread(target=run)
        thread.start()
        reached.wait(60)
        owning.close()
        for call in (owning.sample, owning.stream):
            with pytest.raises(InputError, match="the sampler of toy.epsrt is closed: open it again"):
                call(1, **ASKED)
        (guided,) = engine.opened
        assert (engine.closed, guided.closed) == (0, 0)
        go.set()
        thread.join(60)
        np.testing.assert_allclose(found[0], whole, rtol=0, atol=1e-5)
        assert (engine.closed, guided.closed) == (1, 1)
        assert all(lanes.closed for lanes in guided.made)
        owning.close()
        assert (engine.closed, guided.closed) == (1, 1)

    def test_a_stream_holds_the_engine_from_its_first_next_on(self, owning):
        begun, never = owning.stream(1, **ASKED), owning.stream(1, **ASKED)
        next(begun)
        owning.close()
        assert owning.engine.closed == 0
        with pytest.raises(InputError, match="closed: open it again"):
            next(never)
        begun.close()
        assert owning.engine.closed == 1

    def test_in_on_step_of_a_call_of_ones_own(self, owning):
        owning.sample(2, on_step=lambda done, total: owning.close(), **ASKED)
        assert owning.engine.closed == 1

    def test_real_engines_finish_what_is_in_work(self, opened):
        asked = {"method": "ddpm", "steps": 40, "seed": 5, "labels": [1, 2, 3, 4, 5], "batch": 2}
        whole, begun, found = opened.sample(**asked), threading.Event(), []

        def hear(done, total):
            begun.set()
            time.sleep(0.001)

        thread = threading.Thread(target=lambda: found.append(opened.sample(on_step=hear, **asked)))
        thread.start()
        begun.wait(60)
        opened.close()
        thread.join(60)
        np.testing.assert_array_equal(found[0], whole)


def drawn(path: str, request: Request, plan: Plan) -> list[np.ndarray]:
    with Sampler.open(path, "onnxruntime", threads=1) as sampler:
        return [sampler.sample(request), sampler.sample(request.but(plan=plan, method=None, steps=None))]


class TestOtherProcesses:
    def test_a_sampler_and_an_engine_say_how_to_open_them_there(self, opened, bundle_path):
        way = r"open another where it is needed, with epsrt.Sampler.open\('.*tiny.epsrt'\)$"
        lanes = opened.engine.lanes(1)
        kinds = {opened: f"a Sampler is of the process that opened it, and cannot be pickled or copied: {way}"}
        kinds |= {opened.engine: f"and cannot be pickled or copied: {way}", lanes: "a HostLanes is of the process"}
        for each, said in kinds.items():
            for copied in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(InputError, match=said):
                    copied(each)
        with pytest.raises(InputError, match=way) as refused:
            multiprocessing.get_context("spawn").Process(target=print, args=(opened,)).start()
        path = str(refused.value).split("'")[1]
        with Sampler.open(path, "onnxruntime", threads=1) as again:
            assert again.bundle.manifest.digest == opened.bundle.manifest.digest

    def test_bundle_plan_and_request_come_back_equal_in_use(self, bundle_path, sampler):
        bundle = Bundle.open(bundle_path)
        init = np.full((1, 1, 8, 8), 0.5, np.float32)
        request = Request(
            2, labels=iter([1, None]), guidance=2.0, init=init, strength=0.5, eta=0.5, **ASKED | {"method": "ddim"}
        )
        plan = bundle.plan("ddpm", 5).begun(2)
        for way in (lambda value: pickle.loads(pickle.dumps(value)), copy.deepcopy, copy.copy):
            again, other, same = way(bundle), way(request), way(plan)
            assert again == bundle
            assert again.golden().network.x.shape == bundle.golden().network.x.shape
            assert repr(other) == repr(request)
            assert not same.table.flags.writeable
            assert (same.start, same.name, same.level) == (plan.start, plan.name, plan.level)
            np.testing.assert_array_equal(same.table, plan.table)
            mine, theirs = prepare(again, other), prepare(bundle, request)
            np.testing.assert_array_equal(mine.plan.table, theirs.plan.table)
            np.testing.assert_array_equal(sampler.sample(other), sampler.sample(request))

    def test_a_spawned_process_draws_the_same(self, bundle_path, sampler):
        request, plan = Request(2, labels=[1, 2], **ASKED), sampler.plan("euler", 4)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            theirs = pool.apply(drawn, (str(bundle_path), request, plan))
        mine = [sampler.sample(request), sampler.sample(request.but(plan=plan, method=None, steps=None))]
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_samples_and_work_too(self):
        work = pickle.loads(pickle.dumps(prepare(bundle(), Request(2, labels=[1, 2], guidance=[2.0, 3.0], **ASKED))))
        assert [s.conditions["label"] for s in work.samples] == [1, 2]
        assert pickle.loads(pickle.dumps(Sample(seed=3))) == Sample(seed=3)
