"""Request and its keywords: one definition for sample, stream, invert and latents, and what it refuses."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from epsrt import EpsrtError, InputError, Plan, Request, Sampler, Schedule, solvers
from epsrt.noise_levels import Network
from epsrt.request import OWN, PER_SAMPLE, Arguments
from epsrt.solvers import METHODS, Options
from epsrt.timesteps import SPACINGS
from numpy_engine import NumpyEngine, bundle

STEPS = 6


@pytest.fixture
def sampler():
    return Sampler(NumpyEngine(bundle()))


def images(n, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, 1, 2, 4)).astype(np.float32)


EVERYTHING = {
    "method": "ddpm",
    "steps": STEPS,
    "seed": 3,
    "first": 2,
    "labels": [1, 2, None],
    "guidance": [1.0, 2.0, 3.0],
    "guidance_rescale": 0.5,
    "guidance_interval": (10, 90),
    "classifier": 2.0,
    "targets": [0, 1, 2],
    "init": images(3),
    "strength": 0.5,
    "known": images(3, seed=1),
    "mask": np.tri(2, 4),
    "resample": 2,
    "jump": 1,
    "variance": "fixed_large",
    "clip": 0.9,
    "spacing": "linspace",
}
FORMS = [{}, {"labels": [1, 2], "seeds": [5, 6]}, EVERYTHING]


class TestOneDefinition:
    @pytest.mark.parametrize("asked", FORMS, ids=["nothing", "lists", "everything"])
    def test_a_request_is_its_keywords(self, sampler, asked):
        n = None if "labels" in asked else 2
        request = Request(n, **{"steps": STEPS, **asked})
        mine = sampler.sample(request)
        np.testing.assert_array_equal(mine, sampler.sample(n, **{"steps": STEPS, **asked}))
        np.testing.assert_array_equal(mine, sampler.sample(request))
        for whole, part in zip(
            sampler.stream(request, every=2), sampler.stream(n, every=2, **{"steps": STEPS, **asked}), strict=True
        ):
            np.testing.assert_array_equal(whole, part)
        np.testing.assert_array_equal(whole, mine)

    def test_latents_and_inversion_take_one_too(self, sampler):
        asked = {"labels": [1, 2], "steps": STEPS}
        latents = sampler.latents(Request(seed=4, **asked))
        np.testing.assert_array_equal(latents, sampler.latents(seed=4, **asked))
        np.testing.assert_array_equal(latents, sampler.latents(2, seed=4))
        inverted = sampler.invert(Request(init=images(2), **asked))
        np.testing.assert_array_equal(inverted, sampler.invert(images(2), **asked))

    def test_inversion_is_undone(self, sampler):
        asked = {"labels": [1, 2], "steps": 100}
        inverted = sampler.invert(images(2), **asked)
        assert np.abs(inverted - images(2)).mean() > 0.2
        assert np.abs(sampler.sample(x=inverted, **asked) - images(2)).mean() < 0.1
        np.testing.assert_array_equal(sampler.invert(images(2), method="ddim", **asked), inverted)
        plan = sampler.plan("ddim-inversion", 100)
        np.testing.assert_array_equal(sampler.invert(images(2), labels=[1, 2], plan=plan), inverted)

    def test_inversion_does_not_guide_unless_told(self):
        from epsrt.manifest import Sampling

        sampler = Sampler(NumpyEngine(bundle(sampling=Sampling(guidance=3.0))))
        asked = {"labels": [1, 2], "steps": STEPS}
        plain = sampler.invert(images(2), **asked)
        np.testing.assert_array_equal(plain, sampler.invert(images(2), guidance=1.0, **asked))
        assert np.abs(plain - sampler.invert(images(2), guidance=3.0, **asked)).max() > 0.1
        assert np.abs(sampler.sample(**asked) - sampler.sample(guidance=1.0, **asked)).max() > 0.1

    def test_both_at_once_are_refused(self, sampler):
        request = Request(2, steps=STEPS)
        message = "seed was given beside a Request, which says all: put it in there"
        for function in (sampler.sample, sampler.stream, sampler.latents):
            with pytest.raises(InputError, match=message):
                function(request, seed=3)
        with pytest.raises(InputError, match=message):
            sampler.invert(Request(init=images(1)), seed=3)


class TestValue:
    def test_iterators_survive_two_uses(self, sampler):
        request = Request(
            steps=STEPS,
            seeds=iter([5, 6]),
            labels=(label for label in (1, 2)),
            guidance=(w for w in (2.0, 3.0)),
            guidance_rescale=iter([0.1, 0.2]),
            classifier=map(float, (1, 2)),
            targets=iter(range(2)),
        )
        asked = {
            "seeds": [5, 6],
            "labels": [1, 2],
            "guidance": [2.0, 3.0],
            "guidance_rescale": [0.1, 0.2],
            "classifier": [1.0, 2.0],
            "targets": [0, 1],
        }
        assert request.asked == {"steps": STEPS, **asked}
        assert set(asked) == set(PER_SAMPLE)
        first = sampler.sample(request)
        np.testing.assert_array_equal(first, sampler.sample(request))
        np.testing.assert_array_equal(first, sampler.sample(steps=STEPS, **asked))

    def test_arrays_of_one_a_sample_are_lists(self):
        request = Request(labels=np.array([1, 2]), guidance=np.float64(2.0), seeds=np.arange(2, dtype=np.uint64))
        assert request.labels == [1, 2]
        assert request.guidance.weight == 2.0
        assert request.seeds.seeds == [0, 1]

    def test_but_changes_some_and_keeps_the_rest(self):
        request = Request(3, **EVERYTHING)
        other = request.but(seed=9, steps=4)
        assert type(other) is Request
        assert (other.n, other.choice.steps, other.seeds.seed) == (3, 4, 9)
        assert other.asked == {**EVERYTHING, "seed": 9, "steps": 4}
        assert (request.choice.steps, request.seeds.seed) == (STEPS, 3)
        assert request.but(n=5).n == 5
        assert request.but(labels=None).labels is None

    def test_each_keyword_lands_where_it_belongs(self):
        plan = Plan.of("some", t=1.0)
        r = Request(3, **EVERYTHING, x=1, plan=plan, size=(4, 4), eta=0.5)
        assert (r.n, r.size, r.labels) == (3, (4, 4), [1, 2, None])
        assert (r.choice.method, r.choice.steps, r.choice.plan) == ("ddpm", STEPS, plan)
        assert r.choice.options == {"variance": "fixed_large", "clip": 0.9, "spacing": "linspace", "eta": 0.5}
        assert (r.seeds.seed, r.seeds.first, r.seeds.seeds) == (3, 2, None)
        g = r.guidance
        assert (g.weight, g.rescale, g.interval, g.classifier) == ([1.0, 2.0, 3.0], 0.5, (10, 90), 2.0)
        assert g.targets == [0, 1, 2]
        assert (r.begin.init is EVERYTHING["init"], r.begin.strength, r.begin.x) == (True, 0.5, 1)
        assert (r.known.images is EVERYTHING["known"], r.known.mask is EVERYTHING["mask"]) == (True, True)
        assert (r.known.resample, r.known.jump) == (2, 1)

    def test_without_keywords_it_asks_for_nothing(self):
        r = Request()
        assert (r.n, r.labels, r.size, r.choice.options) == (None, None, None, {})
        assert (r.choice.method, r.choice.steps, r.choice.plan) == (None, None, None)
        assert (r.seeds.seed, r.seeds.first, r.seeds.seeds) == (0, 0, None)
        assert (r.guidance.weight, r.guidance.rescale, r.guidance.classifier) == (None, 0.0, 0.0)
        assert (r.known.resample, r.known.jump) == (1, 10)

    def test_it_shows_what_it_is_in_a_line(self):
        assert repr(Request(4, steps=50, labels=[3])) == "Request(4, steps=50, labels=[3])"
        assert repr(Request(init=np.zeros((2, 1, 8, 8)))) == "Request(init=<float64 [2, 1, 8, 8]>)"
        assert repr(Request()) == "Request()"

    def test_seeds_are_a_list(self):
        with pytest.raises(InputError, match="seeds = 5 are not one a sample: give a list, or seed="):
            Request(seeds=5)
        with pytest.raises(InputError, match="seeds = 'ab' are not one a sample"):
            Request(seeds="ab")
        assert Request(seeds=None).seeds.seeds is None


class TestTypedArguments:
    def test_options_are_what_methods_and_spacings_take(self):
        taken = {name for method in METHODS for name in solvers.options_of(method)}
        taken |= {name for options in SPACINGS.values() for name in options} | {"spacing", "timesteps"}
        assert set(Options.__annotations__) == taken | set(Network.__annotations__)

    def test_solvers_take_their_own_options_and_the_networks(self):
        for method in METHODS.values():
            parameters = inspect.signature(method.solver).parameters.values()
            assert [p.name for p in parameters][:2] == ["schedule", "timesteps"]
            assert [p.name for p in parameters if p.kind is p.VAR_KEYWORD] == ["network"]

    def test_arguments_are_what_a_request_reads(self):
        """Every keyword that is no option of a sampler changes some field of a request."""

        def fields(request):
            parts = (request.choice, request.seeds, request.guidance, request.begin, request.known)
            others = request.labels, request.size, request.conditions, request.null_conditions
            return [*(vars(part) for part in parts), *others]

        assert set(Arguments.__annotations__) - set(Options.__annotations__) == OWN
        for name in OWN:
            value = [7] if name == "seeds" else {"a": 1} if "conditions" in name else object()
            assert fields(Request(**{name: value})) != fields(Request()), name
        assert fields(Request(nonsense=1)) != fields(Request())  # goes to the sampler's options, and is refused there

    @pytest.mark.parametrize("call", ["sample", "stream", "latents"])
    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("labls", "ddim takes no option 'labls'"),
            ("giudance", "ddim takes no option 'giudance'"),
            ("et", "ddim takes no option 'et': did you mean eta"),
            ("s_churn", "ddim takes no option 's_churn', which is for euler, heun"),
            ("rho", "trailing spacing takes no option 'rho'; its options: shift"),
        ],
    )
    def test_a_wrong_keyword_is_one_sentence(self, sampler, call, word, message):
        with pytest.raises(InputError, match=message) as caught:
            getattr(sampler, call)(2, **{word: 1.0})
        assert "\n" not in str(caught.value)

    def test_an_option_of_every_method_passes(self):
        options = {"s_churn": 0.5, "s_tmax": 20.0, "eta": 0.5, "each": 2, "variance": "fixed_large"}
        for method in METHODS:
            own = {name: value for name, value in options.items() if name in solvers.options_of(method)}
            assert len(solvers.make(method, Schedule(T=100), steps=4, **own)) >= 4

    def test_a_wrong_type_is_one_sentence(self, sampler):
        with pytest.raises(EpsrtError, match="eta = 'much' is not a number"):
            sampler.sample(2, eta="much")
