"""Cancelling, deadlines: a call ends between two of its steps, says how far it was, and leaves the sampler whole."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from epsrt import Cancelled, DeadlineExceeded, EpsrtError, InputError, Sampler, errors
from epsrt.control import LOOK, Control
from numpy_engine import NumpyEngine, bundle

STEPS = 6
CPU = ("onnxruntime", "openvino")
ASKED = {"method": "ddpm", "steps": STEPS, "seed": 3}


class Slow(NumpyEngine):
    """Each step is longer than the time between two looks, and `after` is called with the number of steps taken."""

    taken, after = 0, staticmethod(lambda taken: None)

    def step(self, given, made):
        super().step(given, made)
        time.sleep(1.2 * LOOK)
        self.taken += 1
        self.after(self.taken)

    def on(self, graph):
        self.opened.append(Slow(self.bundle, graph))
        self.opened[-1].after = self.after
        return self.opened[-1]


class Looks:
    """A flag that counts how often it was looked at, and is set from the look number `at` on."""

    def __init__(self, at: float = float("inf")) -> None:
        self.count, self.at = 0, at

    def is_set(self) -> bool:
        self.count += 1
        return self.count > self.at


def setting(flag, at):
    return lambda taken: flag.set() if taken == at else None


@pytest.fixture
def engine():
    return Slow(bundle())


class TestCancel:
    @pytest.mark.parametrize("at", [1, 4, STEPS - 1])
    def test_no_step_is_taken_after_the_one_in_which_it_was_set(self, engine, at):
        flag, sampler = threading.Event(), Sampler(engine)
        engine.after = setting(flag, at)
        with pytest.raises(Cancelled, match=f"^the call was cancelled after {at} of {STEPS} steps$"):
            sampler.sample(2, cancel=flag, **ASKED)
        assert engine.taken == at

    def test_what_is_finished_is_given_back(self, engine):
        flag = threading.Event()
        engine.after = setting(flag, STEPS)
        assert len(Sampler(engine).sample(2, cancel=flag, **ASKED)) == 2

    def test_the_lanes_serve_the_next_call_and_give_the_same_bits(self, engine):
        flag, sampler = threading.Event(), Sampler(engine)
        whole = Sampler(NumpyEngine(bundle())).sample(2, **ASKED)
        engine.after = setting(flag, 2)
        with pytest.raises(Cancelled):
            sampler.sample(2, seed=9, cancel=flag, method="dpmpp-2m", steps=STEPS)
        np.testing.assert_array_equal(sampler.sample(2, **ASKED), whole)
        assert [lanes.closed for lanes in engine.made] == [0]

    def test_batches_steps_heard_of_and_a_flag_together(self, engine):
        flag, told, sampler = threading.Event(), [], Sampler(engine)
        engine.after = setting(flag, STEPS + 5)
        with pytest.raises(Cancelled, match=f"after {STEPS + 5} of {3 * STEPS} steps"):
            sampler.sample(5, batch=2, cancel=flag, every=4, on_step=lambda *told_of: told.append(told_of), **ASKED)
        assert told == [(done, 3 * STEPS) for done in (4, 6, 10)]

    def test_on_step_may_set_it_and_stopping_by_false_is_no_error(self, engine):
        flag, sampler = threading.Event(), Sampler(engine)
        with pytest.raises(Cancelled, match=f"after 2 of {STEPS} steps"):
            sampler.sample(1, cancel=flag, on_step=lambda done, total: flag.set() if done == 2 else None, **ASKED)
        flag.clear()
        assert len(sampler.sample(1, cancel=flag, on_step=lambda done, total: done < 2, **ASKED)) == 1

    def test_a_stream_of_several_lanes(self, engine):
        flag, sampler = threading.Event(), Sampler(engine)
        whole = list(sampler.stream(6, every=2, **ASKED))
        stream = sampler.stream(6, every=2, cancel=flag, **ASKED)
        np.testing.assert_array_equal(next(stream), whole[0])
        flag.set()
        with pytest.raises(Cancelled, match=f"after 4 of {2 * STEPS} steps"):
            next(stream)
        for mine, theirs in zip(sampler.stream(6, every=2, cancel=Looks(), **ASKED), whole, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        assert [lanes.closed for lanes in engine.made] == [0, 0]

    def test_inversion_guidance_and_resampling(self, engine):
        sampler, image = Sampler(engine), np.zeros((1, 1, 2, 4), np.float32)
        asked = {"known": image, "mask": np.ones((2, 4)), "labels": 2, "guidance": 2.0, "resample": 3, "jump": 2}
        for call, total in (
            (lambda flag: sampler.invert(image, steps=STEPS, cancel=flag), STEPS),
            (lambda flag: sampler.sample(1, cancel=flag, **asked, **ASKED), STEPS + 2 * 4),
        ):
            call(Looks())
            with pytest.raises(Cancelled, match=f"after 3 of {total} steps"):
                call(Looks(at=4))  # one look before anything, and one before each step

    def test_any_flag_that_says_whether_it_is_set(self, engine):
        flag = multiprocessing.get_context("spawn").Event()
        flag.set()
        with pytest.raises(Cancelled, match="the call was cancelled before the first step"):
            Sampler(engine).sample(1, cancel=flag, **ASKED)
        for odd in (True, 3.0, "now", lambda: False):
            with pytest.raises(
                InputError, match=r"^cancel = .* has no is_set\(\): give a threading.Event, or the like$"
            ):
                Sampler(engine).sample(1, cancel=odd, **ASKED)

    def test_a_flag_that_fails_says_so_itself(self, engine):
        class Broken(Looks):
            def is_set(self):
                if super().is_set():
                    raise ConnectionError("the queue is gone")

        with pytest.raises(ConnectionError, match="the queue is gone"):
            Sampler(engine).sample(1, cancel=Broken(at=2), **ASKED)
        assert engine.made[0].closed

    @pytest.mark.parametrize("kind", [Cancelled, DeadlineExceeded])
    def test_lanes_are_not_kept_where_a_signals_handler_raises_it_in_mid_step(self, engine, kind):
        def fail(taken):
            raise kind("from a handler")

        engine.after = fail
        with pytest.raises(kind, match="from a handler"):
            Sampler(engine).sample(1, **ASKED)
        assert engine.made[0].closed


class TestDeadline:
    def test_no_step_begins_after_it(self, engine, monkeypatch):
        sampler, clock = Sampler(engine), SimpleNamespace(monotonic=lambda: 100.0 + engine.taken)
        monkeypatch.setattr("epsrt.control.time", clock)
        said = f"^the deadline passed after 4 of {STEPS} steps: allow more time, or ask for less$"
        with pytest.raises(DeadlineExceeded, match=said):
            sampler.sample(1, deadline=104.0, **ASKED)
        assert engine.taken == 4
        whole = Sampler(NumpyEngine(bundle())).sample(1, **ASKED)
        np.testing.assert_array_equal(sampler.sample(1, deadline=100.5 + engine.taken + STEPS, **ASKED), whole)
        assert len(engine.made) == 1

    @pytest.mark.parametrize("call", ["sample", "stream", "invert"])
    def test_one_that_has_passed_is_refused_before_anything_is_made(self, engine, call, monkeypatch):
        monkeypatch.setattr("epsrt.sampler.prepare", None)  # it would be called
        with pytest.raises(
            DeadlineExceeded, match=r"had passed by .* s before the first step: give a time of time.mono"
        ):
            getattr(Sampler(engine), call)(np.zeros((1, 1, 2, 4)), deadline=5)  # seconds from now, somebody thought
        assert engine.made == []

    def test_one_that_passes_before_the_first_step_asks_for_more_time(self, engine, monkeypatch):
        """As where a step graph is opened first: the caller did give a time of time.monotonic()."""
        now, on = [100.0], engine.on

        def slowly(graph):
            now[0] += 5
            return on(graph)

        monkeypatch.setattr("epsrt.control.time", SimpleNamespace(monotonic=lambda: now[0]))
        engine.on, sampler = slowly, Sampler(engine)
        said = "^the deadline passed before the first step: allow more time, or ask for less$"
        with pytest.raises(DeadlineExceeded, match=said):
            sampler.sample(1, labels=1, guidance=2.0, deadline=104.0, **ASKED)
        assert len(sampler.sample(1, labels=1, guidance=2.0, deadline=109.0, **ASKED)) == 1

    def test_it_is_a_timeout_as_others_raise_it(self, engine):
        with pytest.raises(TimeoutError):
            Sampler(engine).sample(1, deadline=time.monotonic() - 1, **ASKED)

    @pytest.mark.parametrize("odd", ["5", float("nan"), True, [1]])
    def test_what_is_no_time(self, engine, odd):
        with pytest.raises(
            InputError, match=r"deadline = .* is not a number: give a time of time.monotonic\(\), such as"
        ):
            Sampler(engine).sample(1, deadline=odd, **ASKED)

    def test_infinity_is_never(self, engine):
        assert len(Sampler(engine).sample(1, deadline=np.float32("inf"), **ASKED)) == 1


class TestCost:
    def test_short_steps_are_taken_several_at_once(self):
        engine, flag = NumpyEngine(bundle()), Looks()
        steps = 99
        Sampler(engine).sample(1, steps=steps, cancel=flag)
        advances = engine.made[0].heard.count("advance")
        assert flag.count == advances + 1 < steps / 2
        assert engine.made[0].heard[1:5] == ["advance", "wait ahead", "advance", "wait ahead"]

    def test_slices_grow_and_shrink_with_the_time_they_take(self, monkeypatch):
        """A step takes 0 s, then 4 ms, then 1 s: from below half of LOOK to above it."""
        now, took = [0.0], [0.004] + [0.0] * 6 + [0.007] * 30 + [1.0] * 50
        monkeypatch.setattr("epsrt.control.time", SimpleNamespace(monotonic=lambda: now[0]))
        lanes = SimpleNamespace(wait=lambda ahead=0: None)
        control, sizes = Control(Looks()), []
        for steps in control.slices(0, len(took), [lanes]):
            sizes.append(steps.stop - steps.start)
            now[0] += sum(took[steps])
        assert sizes[:3] == [1, 2, 4]
        assert sizes[3:8] == [8, 4, 2, 1, 1]
        assert set(sizes[8:]) == {1}
        assert sum(sizes) == control.done == len(took)

    def test_long_steps_one_by_one(self, engine):
        flag = Looks()
        Sampler(engine).sample(1, cancel=flag, **ASKED)
        assert flag.count == STEPS + 1


@pytest.mark.parametrize("name", CPU)
class TestEngines:
    """On the engines of a CPU, a flag that another thread sets."""

    def test_a_call_ends_soon_and_the_next_one_is_as_ever(self, name, bundle_path):
        if name == "openvino":
            pytest.importorskip("openvino")
        with Sampler.open(bundle_path, name, precision="fp32", threads=1) as sampler:
            asked = {"method": "ddpm", "steps": 100, "seed": 5, "labels": [1, 2, 3]}
            whole = sampler.sample(**asked)
            flag, begun, ended = threading.Event(), threading.Event(), []

            def run():
                try:
                    while True:
                        begun.set()
                        sampler.sample(batch=2, cancel=flag, **asked)
                except EpsrtError as error:
                    ended.append((time.monotonic(), error))

            thread = threading.Thread(target=run)
            thread.start()
            begun.wait()
            time.sleep(0.05)
            set_at = time.monotonic()
            flag.set()
            thread.join(60)
            ((at, error),) = ended
            assert isinstance(error, Cancelled)
            assert at - set_at < 1  # of a step, and a busy machine
            np.testing.assert_array_equal(sampler.sample(cancel=threading.Event(), **asked), whole)


ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EpsrtError)]


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_reach_other_processes(kind):
    again = pickle.loads(pickle.dumps(kind("what is wrong: the way out")))
    assert (type(again), str(again)) == (kind, "what is wrong: the way out")
