"""Limits: what one call may take, refused before anything is allocated, whatever is given."""

from __future__ import annotations

import tracemalloc
from itertools import count, repeat

import numpy as np
import pytest

from epsrt import InputError, LimitError, Limits, Plan, Request, Sampler, solvers
from epsrt.condition import Condition
from epsrt.limits import bytes_of
from epsrt.manifest import Sizes
from numpy_engine import SCHEDULE, NumpyEngine, bundle

STEPS = 10
HUGE = 10**5000  # Python prints no such number
IMAGE = np.zeros((1, 1, 2, 4), np.float32)
MASKED = {"known": IMAGE, "mask": np.ones((2, 4))}
LIMITS = Limits(bytes=1 << 20, samples=100, steps=60)
RUNS = "draw them in several runs, with first="
SEEDED = "draw them in several runs, of fewer seeds"
LESS = "ask for fewer steps or a smaller size"


@pytest.fixture
def engine():
    return NumpyEngine(bundle(sizes=Sizes(2, 1 << 30)))


@pytest.fixture
def sampler(engine):
    return Sampler(engine, limits=LIMITS)


@pytest.fixture
def free(engine):
    """A sampler without limits."""
    return Sampler(engine)


def refused(engine, call, message, most=200_000):
    """It is, with few bytes allocated, no lanes made and no step graph opened; the error's class."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as error:
            call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most
    assert engine.made == engine.opened == []
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    return error.type


def images(*shape):
    """All of one number: they take no memory."""
    return np.broadcast_to(np.float32(0), shape)


OVER = "over 100 values, one a sample, are more than one call takes here:"
OVER_SAMPLES = f"{OVER} {RUNS}"
HOSTILE = [
    ({"n": 101}, f"n = 101 is over samples = 100, this sampler's limit: {RUNS}"),
    ({"n": 10**18}, "n = 1000000000000000000 is over samples = 100"),
    ({"n": HUGE}, "n is a number of 5001 digits"),
    ({"labels": count()}, f"labels: {OVER_SAMPLES}"),
    ({"labels": repeat(None)}, f"labels: {OVER_SAMPLES}"),
    ({"labels": np.broadcast_to(1, (1, 10**12))}, f"labels: {OVER_SAMPLES}"),
    ({"seeds": range(10**30)}, f"seeds: {OVER} {SEEDED}"),
    ({"labels": 1, "guidance": repeat(2.0)}, f"guidance: {OVER_SAMPLES}"),
    ({"init": images(10**9, 1, 2, 4), "strength": 0.5}, "n = 1000000000 is over samples = 100"),
    ({"x": images(10**9, 1, 2, 4)}, "n = 1000000000 is over samples = 100"),
    ({"mask": images(10**9, 1, 2, 4), "known": IMAGE}, r"mask is float32 \[1000000000, 1, 2, 4\], not"),
    ({"init": range(10**12), "strength": 0.5}, "init = .* is no array of images: give one"),
    ({"n": 1, "steps": 61}, "61 steps are over steps = 60, this sampler's limit: ask for fewer steps"),
    ({"n": 1, "steps": 10**9}, "1000000000 steps are over steps = 60"),
    ({"n": 1, "steps": 31, "method": "heun"}, "61 rows of the plan are over steps = 60"),
    ({"n": 1, "steps": 6, "method": "langevin", "each": 1000}, "6000 steps are over steps = 60"),
    ({"n": 1, "steps": 31, "method": "langevin", "each": 2}, "62 steps are over steps = 60"),
    ({"n": 1, "timesteps": range(10**9, -1, -1)}, "1000000001 steps are over steps = 60"),
    ({"n": 1, "timesteps": range(10**30, -1, -1)}, "steps are over steps = 60"),
    ({"n": 1, "timesteps": np.broadcast_to(3.0, 10**11)}, "100000000000 steps are over steps = 60"),
    ({"n": 1, "timesteps": count()}, r"timesteps = count\(0\) is not a list of numbers"),
    ({"n": 1, "timesteps": np.array(3)}, r"timesteps = array\(3\) is not a list of numbers"),
    ({"n": 1, "steps": STEPS, "resample": 1000, "jump": 2, **MASKED}, "are 8002 rows: give fewer, 60 at most"),
    ({"n": 1, "steps": STEPS, "resample": 10**9, **MASKED}, "resample = 1000000000 is outside 1 … 1000"),
    ({"n": 1, "steps": STEPS, "resample": HUGE, **MASKED}, "resample is a number of 5001 digits"),
    ({"n": 1, "plan": Plan.of("mine", t=np.arange(70.0, 9, -1), a=1.0)}, "61 rows of the plan are over steps = 60"),
    ({"n": 1, "size": (1 << 20, 1 << 20)}, "n = 1 samples at once take 32768 GiB"),
    (
        {"n": 1, "size": (128, 512)},
        "n = 1 samples at once take .* bytes, over bytes = 1048576, this sampler's limit: ask",
    ),
    ({"n": 1, "size": count(2, 2)}, "is not .height, width., two whole numbers of pixels"),
    ({"n": 1, "size": (HUGE, 2)}, "size is a number of 5001 digits"),
    ({"n": 2, "size": (128, 512)}, f"n = 2 samples at once take .* over bytes = 1048576, this sampler's limit: {LESS}"),
    ({"n": 90, "size": (64, 64)}, f"n = 90 samples at once take .* over bytes = 1048576, this sampler's limit: {RUNS}"),
]


class TestRefusals:
    @pytest.mark.parametrize(("asked", "message"), HOSTILE)
    @pytest.mark.parametrize("call", ["sample", "stream"])
    def test_what_is_over_them_is_refused_before_anything_is_allocated(self, sampler, engine, call, asked, message):
        most = 300_000 if "plan" in asked or "method" in asked else 200_000
        refused(engine, lambda: getattr(sampler, call)(**{"steps": None} | asked), message, most)

    def test_inversion_latents_and_plans_too(self, sampler, engine):
        for call, message in (
            (lambda: sampler.invert(images(10**9, 1, 2, 4)), "n = 1000000000 is over samples = 100"),
            (lambda: sampler.invert(IMAGE, steps=61), "61 steps are over steps = 60"),
            (lambda: sampler.latents(10**18), "n = 1000000000000000000 is over samples = 100"),
            (lambda: sampler.latents(labels=count()), "labels: over 100 values"),
            (lambda: sampler.latents(64, size=(128, 128)), "n = 64 samples at once take .* over bytes = 1048576"),
            (lambda: sampler.plan(steps=10**9, spacing="karras"), "1000000000 steps are over steps = 60"),
            (lambda: sampler.plan("heun", 31), "61 rows of the plan are over steps = 60"),
        ):
            assert refused(engine, call, message) is LimitError

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"method": "heun", "steps": 10**6, "spacing": "karras"}, "1000000 steps take 512000000 bytes"),
            ({"method": "langevin", "steps": 90, "each": 1000}, "90000 steps take 46080000 bytes"),
            ({"steps": 10**4000, "each": 10**4000}, "9223372036854775807 steps take"),
            ({"timesteps": np.broadcast_to(3.0, 10**6)}, "1000000 steps take 512000000 bytes"),
            ({"timesteps": range(10**30, -1, -1)}, "steps take"),
        ],
    )
    def test_bytes_alone_hold_the_plan_before_it_is_made(self, engine, asked, message):
        sampler = Sampler(engine, limits=Limits(bytes=1 << 20))
        for call in (sampler.sample, sampler.stream, sampler.latents):
            said = f"{message}.*over bytes = 1048576, this sampler's limit: ask for fewer steps$"
            assert refused(engine, lambda call=call: call(1, **asked), said) is LimitError
        assert refused(engine, lambda: sampler.plan(**asked), message) is LimitError

    def test_a_plan_that_somebody_made_is_held_to_bytes(self, engine):
        plan = Plan.of("mine", t=np.arange(70.0, 9, -1), a=1.0)
        said = "61 rows of the plan take 31232 bytes, over bytes = 31231, this sampler's limit: ask for fewer steps$"
        sampler = Sampler(engine, limits=Limits(bytes=31231))
        assert refused(engine, lambda: sampler.sample(1, plan=plan), said) is LimitError

    def test_a_request_that_somebody_built_is_held_to_them(self, sampler, engine):
        request = Request(labels=[1] * 101, steps=STEPS)
        assert refused(engine, lambda: sampler.sample(request), "n = 101 is over samples = 100") is LimitError

    def test_what_is_within_them_is_drawn(self, sampler, free):
        asked = {"labels": [1] * 100, "steps": 30, "method": "heun"}
        np.testing.assert_array_equal(sampler.sample(**asked), free.sample(**asked))
        assert len(sampler.sample(np.int64(2), steps=60)) == 2
        assert len(sampler.sample(1, steps=STEPS, resample=4, jump=4, method="ddpm", **MASKED)) == 1

    def test_their_advice_works(self, sampler, free):
        whole = free.sample(150, seed=3, steps=STEPS)
        parts = [sampler.sample(min(100, 150 - first), seed=3, steps=STEPS, first=first) for first in (0, 100)]
        np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=1e-5)

    def test_seeds_go_into_several_runs_without_first(self, engine, free):
        sampler, seeds = Sampler(engine, limits=Limits(samples=2)), [3, 1, 4]
        for asked in ({"seeds": seeds}, {"seeds": iter(seeds)}, {"n": Request(seeds=seeds, steps=STEPS)}):
            with pytest.raises(LimitError, match=f"{SEEDED}$"):
                sampler.sample(**asked)
        parts = [sampler.sample(seeds=seeds[:2], steps=STEPS), sampler.sample(seeds=seeds[2:], steps=STEPS)]
        np.testing.assert_allclose(np.concatenate(parts), free.sample(seeds=seeds, steps=STEPS), rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        "asked",
        [
            {},
            {"init": images(6, 1, 2, 4), "strength": 1.0},
            {"known": images(6, 1, 2, 4), "mask": np.ones((6, 1, 2, 4))},
            {"labels": [1] * 5 + [None], "guidance": 2.0},
            {"seeds": range(6)},
        ],
    )
    def test_several_runs_are_the_way_only_where_one_sample_would_fit(self, engine, asked):
        def refused_by(most, **asked):
            with pytest.raises(LimitError) as error:
                Sampler(engine, limits=Limits(bytes=most)).sample(**asked)
            return str(error.value)

        whole = {**asked, "n": 6, "steps": STEPS}
        single = {**{name: value[:1] if np.ndim(value) else value for name, value in asked.items()}, "n": 1}
        single["steps"] = STEPS
        least = int(refused_by(5700, **single).split(" take ")[1].split()[0])
        assert refused_by(least - 1, **whole).endswith(LESS)
        assert refused_by(least, **whole).endswith(SEEDED if "seeds" in asked else RUNS)
        assert len(Sampler(engine, limits=Limits(bytes=least)).sample(**single)) == 1

    @pytest.mark.parametrize("odd", [0, -1, 1.5, "3", True, np.array([1, 2])])
    @pytest.mark.parametrize("name", ["bytes", "samples", "steps"])
    def test_limits_that_are_none(self, name, odd):
        with pytest.raises(InputError, match=f"^{name} = .* (is not a whole number|give at least 1)$"):
            Limits(**{name: odd})

    def test_what_is_no_limits(self, engine):
        with pytest.raises(InputError, match=r"limits = 3 are none: give epsrt.Limits\("):
            Sampler(engine, limits=3)

    def test_what_is_no_limits_is_refused_before_an_engine_is_opened(self, monkeypatch):
        monkeypatch.setattr("epsrt.sampler.open_engine", None)  # it would be called
        with pytest.raises(InputError, match=r"limits = {'samples': 3} are none: give epsrt.Limits\("):
            Sampler.open("toy.epsrt", limits={"samples": 3})

    def test_open_takes_them(self, bundle_path):
        with Sampler.open(bundle_path, "onnxruntime", threads=1, limits=Limits(samples=2)) as opened:
            assert len(opened.sample(2, steps=2)) == 2
            with pytest.raises(LimitError, match="n = 3 is over samples = 2"):
                opened.sample(3, steps=2)


class TestWithout:
    """What no sampler takes is one sentence all the same."""

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"n": 10**18}, f"n = 1000000000000000000 samples at once take .* GiB: {RUNS}"),
            ({"n": HUGE}, "n is a number of 5001 digits: give one that a float holds"),
            ({"n": -HUGE}, "n is a number of 5001 digits"),
            ({"n": 1, "seed": HUGE}, "seed is a number of 5001 digits"),
            ({"seeds": [1, HUGE]}, "seeds is a number of 5001 digits"),
            ({"n": 1, "eta": HUGE}, "eta is a number of 5001 digits"),
            ({"n": 1, "batch": HUGE}, "batch is a number of 5001 digits"),
            ({"n": 1, "steps": 10**9, "spacing": "karras"}, "steps = 1000000000 is outside 1 … 1000000"),
            ({"n": 1, "timesteps": range(10**30, -1, -1)}, "the list of timesteps has .*: give 1000000 at most"),
            (
                {"n": 1, "timesteps": np.broadcast_to(3.0, 10**11)},
                "the list of timesteps has 100000000000: give 1000000",
            ),
            ({"labels": np.broadcast_to(1, 10**12)}, f"labels: over 16777216 values, one a sample.*: {RUNS}"),
            (
                {"n": 1, "size": (1 << 29, 1 << 29)},
                "n = 1 samples at once take .* GiB: ask for fewer steps or a smaller",
            ),
        ],
    )
    def test_what_no_sampler_takes(self, free, engine, asked, message):
        refused(engine, lambda: free.sample(**asked), message)

    @pytest.mark.parametrize("endless", [count(), repeat(3), range(10**30)])
    def test_iterators_without_end_are_read_no_further_than_there_may_be_samples(self, endless, monkeypatch):
        monkeypatch.setattr("epsrt.limits.MOST_SAMPLES", 1000)
        for call in (lambda: Request(labels=endless), lambda: Request(1).but(seeds=endless)):
            with pytest.raises(LimitError, match="over 1000 values, one a sample, are more than one call takes here"):
                call()

    def test_langevins_steps(self, monkeypatch):
        monkeypatch.setattr("epsrt.solvers.MOST_STEPS", 10_000)
        with pytest.raises(InputError, match="90 levels of each = 1000 steps are over 10000: give fewer"):
            solvers.make("langevin", SCHEDULE, steps=90, each=1000)


class TestBytes:
    """`bytes` is what the arrays of a call come to."""

    @pytest.mark.parametrize(
        ("asked", "images", "own"),
        [
            ({"n": 6}, 6 + 7 * 4, 0),
            ({"n": 6, "batch": 2}, 6 + 7 * 2, 0),
            ({"n": 2}, 2 + 7 * 2, 0),
            ({"n": 6, "known": images(1, 1, 2, 4), "mask": np.ones((2, 4))}, 6 + 2 + 11 * 4, 0),
            ({"n": 6, "known": images(6, 1, 2, 4), "mask": np.ones((6, 1, 2, 4))}, 6 + 12 + 11 * 4, 0),
            ({"n": 6, "init": images(6, 1, 2, 4), "strength": 1.0}, 12 + 7 * 4, 0),
            ({"n": 6, "x": images(1, 1, 2, 4)}, 7 + 7 * 4, 0),
            ({"n": 6, "labels": 1, "guidance": 2.0}, 6 + 7 * 4, 0),
            ({"labels": [1] * 6, "guidance": 2.0}, 6 + 7 * 4, 0),
            ({"labels": [1] * 5 + [None], "guidance": 2.0}, 6 + 7 * 4, 6),
            ({"n": 6, "labels": 1, "guidance": [2.0] * 6}, 6 + 7 * 4, 6),
            ({"labels": 1, "classifier": [2.0] * 6}, 6 + 7 * 4, 6),
        ],
    )
    def test_the_least_that_a_call_may_be_given(self, engine, asked, images, own):
        need = images * 32 + 512 * len_of(asked) + 512 * STEPS + 176 * STEPS * own
        asked = {"steps": STEPS, **asked}
        Sampler(engine, limits=Limits(bytes=need)).sample(**asked)
        with pytest.raises(LimitError, match=f"take {need} bytes, over bytes = {need - 1}, this sampler's limit"):
            Sampler(engine, limits=Limits(bytes=need - 1)).sample(**asked)

    @pytest.mark.parametrize(
        ("asked", "own"),
        [
            ({}, 0),
            ({"guidance": 1.0}, 0),
            ({"guidance": 2.0}, 6),
            ({"guidance": [1.0] * 5 + [2.0]}, 6),
            ({"classifier": 2.0, "targets": 1}, 0),
            ({"labels": [1] * 5 + [None]}, 0),
        ],
    )
    @pytest.mark.parametrize("guided", [True, False])
    def test_conditions_count_as_they_are_given_and_in_lanes(self, asked, own, guided):
        """And row by row only where they may be guided apart."""
        style = Condition("style", (3,), "float32", "vector", guided, 0.0)
        engine = NumpyEngine(bundle(conditions=(style,)))
        own = own if guided or isinstance(asked.get("guidance"), list) else 0
        lanes = 4 * 12 * (1 + guided)
        need = (6 + 7 * 4) * 32 + 6 * 512 + STEPS * (512 + 176 * own) + 6 * 12 + lanes
        asked = {"steps": STEPS, "labels": 1, "conditions": {"style": np.ones((6, 3), np.float32)}, **asked}
        assert len(Sampler(engine, limits=Limits(bytes=need)).sample(**asked)) == 6
        with pytest.raises(LimitError, match=f"take {need} bytes, over bytes = {need - 1}, this sampler's limit"):
            Sampler(engine, limits=Limits(bytes=need - 1)).sample(**asked)

    def test_latents_are_in_no_lanes(self, engine):
        need = 6 * (32 + 512) + 512 * STEPS
        assert len(Sampler(engine, limits=Limits(bytes=need)).latents(6, steps=STEPS)) == 6
        with pytest.raises(LimitError, match=f"take {need} bytes"):
            Sampler(engine, limits=Limits(bytes=need - 1)).latents(6, steps=STEPS)

    def test_values_are_read_no_further_than_their_samples_fit(self, engine):
        with pytest.raises(LimitError, match="labels: over 10 values, one a sample"):
            Sampler(engine, limits=Limits(bytes=10 * 512)).sample(labels=count())

    def test_a_stream_has_all_in_lanes(self, engine):
        need = 8 * 6 * 32 + 512 * 6 + 512 * STEPS
        assert list(Sampler(engine, limits=Limits(bytes=need)).stream(6, steps=STEPS))
        with pytest.raises(LimitError, match=f"take {need} bytes"):
            Sampler(engine, limits=Limits(bytes=need - 1)).stream(6, steps=STEPS)

    def test_rows_that_resampling_adds(self, engine):
        rows = STEPS + 3 * 2 * 4
        need = (1 + 2 + 11) * 32 + 512 + 512 * rows
        asked = {"steps": STEPS, "resample": 4, "jump": 2, "method": "ddpm", **MASKED}
        Sampler(engine, limits=Limits(bytes=need)).sample(1, **asked)
        with pytest.raises(LimitError, match=f"take {need} bytes"):
            Sampler(engine, limits=Limits(bytes=need - 1)).sample(1, **asked)

    @pytest.mark.parametrize("masked", [False, True])
    def test_it_is_about_what_a_call_allocates(self, engine, masked, monkeypatch):
        size, n = (256, 256), 16
        given = {"known": images(n, 1, *size), "mask": np.ones((n, 1, *size))} if masked else {}
        asked = {"steps": STEPS, "method": "ddpm", "size": size, **given}
        need = bytes_of(n, (1, *size), given=2 * n * masked, lanes=4, masked=masked, rows=STEPS)
        monkeypatch.setattr(
            NumpyEngine, "step", lambda self, given, made: made["x_next"].fill(0.5)
        )  # not the network's
        tracemalloc.start()
        Sampler(engine).sample(n, **asked)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 0.9 * need < peak < 1.3 * need


def len_of(asked):
    return asked.get("n") or next(len(v) for v in asked.values() if isinstance(v, list))
