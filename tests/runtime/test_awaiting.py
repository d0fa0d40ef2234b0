"""Sampler.sample_async and stream_async: a task that is cancelled stops its work, and goes on once that has ended."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import numpy as np
import pytest

from epsrt import Cancelled, DeadlineExceeded, InputError, NotFiniteError, Sampler
from numpy_engine import NumpyEngine, bundle

STEPS = 8
ASKED = {"method": "ddpm", "steps": STEPS, "seed": 3}
CPU = ("onnxruntime", "openvino")


class Slow(NumpyEngine):
    """Each step is longer than the time between two looks; `after` is called after it."""

    taken, after = 0, staticmethod(lambda taken: None)

    def step(self, given, made):
        super().step(given, made)
        time.sleep(0.012)
        self.taken += 1
        self.after(self.taken)


@pytest.fixture
def engine():
    return Slow(bundle())


@pytest.fixture
def sampler(engine):
    return Sampler(engine)


def run(make):
    """What a coroutine returns. Nothing that a loop complains about may be left."""
    complaints = []

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        try:
            return await make()
        finally:
            gc.collect()
            await asyncio.sleep(0)

    try:
        return asyncio.run(main())
    finally:
        gc.collect()
        assert not complaints


async def free(sampler, engine):
    """No step runs any more, and the lanes wait for the next call."""
    taken = engine.taken
    assert not sampler._graphs.calls
    await asyncio.sleep(0.03)
    assert engine.taken == taken


class TestSample:
    def test_it_is_sample(self, sampler):
        async def several():
            return await asyncio.gather(*(sampler.sample_async(2, **{**ASKED, "seed": seed}) for seed in range(5)))

        for seed, images in enumerate(run(several)):
            np.testing.assert_array_equal(images, sampler.sample(2, **{**ASKED, "seed": seed}))

    def test_the_loop_goes_on_and_the_context_is_the_tasks(self, sampler):
        who, heard, ticks = contextvars.ContextVar("who"), [], []

        async def tick():
            while True:
                ticks.append(1)
                await asyncio.sleep(0.001)

        async def main():
            who.set("me")
            ticking = asyncio.create_task(tick())
            on_step = lambda done, total: heard.append((done, who.get(), threading.current_thread()))  # noqa: E731
            await sampler.sample_async(1, on_step=on_step, every=4, **ASKED)
            ticking.cancel()

        run(main)
        assert [(done, name) for done, name, _ in heard] == [(4, "me"), (8, "me")]
        assert heard[0][2] is not threading.current_thread()
        assert len(ticks) > 3

    @pytest.mark.parametrize("at", [1, 5])
    def test_a_timeout_stops_the_work_within_a_step(self, sampler, engine, at):
        async def main():
            loop, reached = asyncio.get_running_loop(), asyncio.Event()
            engine.after = lambda taken: taken == at and loop.call_soon_threadsafe(reached.set)
            task = asyncio.create_task(sampler.sample_async(2, **ASKED))
            await reached.wait()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await task
            assert at <= engine.taken <= at + 1
            await free(sampler, engine)

        run(main)
        (lanes,) = engine.made
        assert not lanes.closed
        np.testing.assert_array_equal(sampler.sample(2, **ASKED), Sampler(NumpyEngine(bundle())).sample(2, **ASKED))
        assert engine.made == [lanes]

    def test_the_task_goes_on_only_once_the_work_has_ended_however_often_it_is_cancelled(self, sampler, engine):
        reached, go = threading.Event(), threading.Event()

        def wait(taken):
            if taken == 2:
                reached.set()
                go.wait(60)

        engine.after = wait

        async def main():
            task = asyncio.create_task(sampler.sample_async(1, **ASKED))
            await asyncio.to_thread(reached.wait)
            for _ in range(3):
                task.cancel()
                await asyncio.wait([task], timeout=0.02)
                assert not task.done()
            go.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert engine.taken == 2
            await free(sampler, engine)

        run(main)

    def test_one_that_waits_for_a_thread_never_begins(self, sampler, engine):
        busy = threading.Event()

        async def main():
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
            other = asyncio.create_task(asyncio.to_thread(busy.wait))
            task = asyncio.create_task(sampler.sample_async(1, **ASKED))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not other.done()
            busy.set()
            await other
            return await sampler.sample_async(1, **ASKED)

        np.testing.assert_array_equal(run(main), sampler.sample(1, **ASKED))
        assert len(engine.made) == 1

    def test_errors_come_out_as_themselves(self, sampler, engine):
        flag = threading.Event()
        flag.set()

        def fail(done, total):
            raise LookupError("mine")

        for asked, error, message in (
            ({"n": 0}, InputError, "n = 0: ask for at least 1 sample"),
            ({"n": 1, "cancel": 3}, InputError, r"cancel = 3 has no is_set\(\)"),
            ({"n": 1, "cancel": flag}, Cancelled, "the call was cancelled before the first step"),
            ({"n": 1, "deadline": time.monotonic() + 0.02}, DeadlineExceeded, "the deadline (had )?passed"),
            ({"n": 1, "on_step": fail}, LookupError, "mine"),
        ):
            with pytest.raises(error, match=message):
                run(lambda asked=asked: sampler.sample_async(**{**ASKED, **asked}))
        engine.step = lambda given, made: made["x_next"].fill(np.nan)
        with pytest.raises(NotFiniteError, match="lane 0 "):
            run(lambda: sampler.sample_async(1, **ASKED))

    def test_a_flag_of_ones_own_stops_it_too(self, sampler, engine):
        flag = threading.Event()
        engine.after = lambda taken: flag.set() if taken == 3 else None
        with pytest.raises(Cancelled, match=f"after 3 of {STEPS} steps"):
            run(lambda: sampler.sample_async(1, cancel=flag, **ASKED))

    def test_an_interrupt_of_the_program_stops_it(self, sampler, engine):
        main = threading.main_thread().ident
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever runs the tests has another
        engine.after = lambda taken: signal.pthread_kill(main, signal.SIGINT) if taken == 2 else None
        try:
            with pytest.raises(KeyboardInterrupt):
                asyncio.run(sampler.sample_async(1, **ASKED))
        finally:
            signal.signal(signal.SIGINT, before)
        assert engine.taken in (2, 3)
        engine.after = lambda taken: None
        assert len(sampler.sample(1, **ASKED)) == 1

    def test_a_task_whose_loop_has_gone_stops_its_work(self, sampler, engine):
        async def main():
            coroutine = sampler.sample_async(1, **ASKED)
            coroutine.send(None)
            while not engine.taken:
                await asyncio.sleep(0.001)
            coroutine.close()
            del coroutine
            while sampler._graphs.calls:
                await asyncio.sleep(0.001)
            assert engine.taken < STEPS

        run(main)

    @pytest.mark.parametrize("fails", [False, True])
    @pytest.mark.parametrize("ended", [False, True])
    def test_a_task_whose_loop_is_closed_stops_its_work_and_complains_of_nothing(self, sampler, engine, ended, fails):
        complaints, go, loop = [], threading.Event(), asyncio.new_event_loop()
        loop.set_exception_handler(lambda loop, context: complaints.append(context))

        def wait(taken):
            if taken == 2 and not ended:
                go.wait(60)
            if taken == 2 and fails:
                raise LookupError("mine")

        engine.after = wait

        async def main():
            coroutine = sampler.sample_async(1, **ASKED)
            future = coroutine.send(None)
            while engine.taken < 2 or (ended and sampler._graphs.calls):
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.01)
            return coroutine, future

        coroutine, future = loop.run_until_complete(main())
        threads = loop._default_executor
        loop.close()
        coroutine.close()
        go.set()
        threads.shutdown()
        del coroutine, future
        gc.collect()
        assert not complaints
        assert not sampler._graphs.calls
        assert ended or engine.taken == 2


class TestStream:
    def test_it_is_stream(self, sampler):
        async def all_of(seed):
            return [images async for images in sampler.stream_async(3, every=3, **{**ASKED, "seed": seed})]

        async def several():
            return await asyncio.gather(all_of(3), all_of(4))

        for seed, previews in zip((3, 4), run(several), strict=True):
            whole = list(sampler.stream(3, every=3, **{**ASKED, "seed": seed}))
            np.testing.assert_array_equal(previews, whole)

    @pytest.mark.parametrize("how", ["closed", "dropped"])
    def test_one_that_is_left_frees_its_lanes(self, sampler, engine, how):
        async def main():
            if how == "closed":
                async with aclosing(sampler.stream_async(3, **ASKED)) as stream:
                    await anext(stream)
            else:
                async for _ in sampler.stream_async(3, **ASKED):
                    break
                gc.collect()
                await asyncio.sleep(0.01)
            await free(sampler, engine)

        run(main)
        assert engine.made[0].closed
        assert engine.taken == 1

    def test_a_timeout_stops_a_step_of_it(self, sampler, engine):
        async def main():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05), aclosing(sampler.stream_async(3, every=STEPS, **ASKED)) as stream:
                    await anext(stream)
            assert engine.taken < STEPS
            await free(sampler, engine)

        run(main)

    def test_bad_input_is_refused_at_the_first_step(self, sampler, engine):
        async def main():
            await anext(sampler.stream_async(0))

        with pytest.raises(InputError, match="n = 0: ask for at least 1 sample"):
            run(main)
        assert engine.made == []


@pytest.mark.parametrize("name", CPU)
def test_engines_serve_tasks_and_timeouts(name, bundle_path):
    if name == "openvino":
        pytest.importorskip("openvino")
    with Sampler.open(bundle_path, name, precision="fp32", threads=1) as sampler:
        asked = {"method": "ddpm", "steps": 100, "labels": [1, 2, 3]}
        whole = [sampler.sample(seed=seed, **asked) for seed in range(3)]

        async def late():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    while True:
                        await sampler.sample_async(seed=9, **asked)

        async def main():
            await late()
            drawn, *_ = await asyncio.gather(
                asyncio.gather(*(sampler.sample_async(seed=seed, **asked) for seed in range(3))), late(), late()
            )
            return drawn

        np.testing.assert_array_equal(run(main), whole)


def test_who_awaits_nothing_loads_no_event_loop():
    from helpers import run_python

    done = run_python("import sys, epsrt; print('asyncio' in sys.modules)")
    assert done.stdout.split() == ["False"], done.stderr
