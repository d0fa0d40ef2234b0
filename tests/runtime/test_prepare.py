"""epsrt.prepare and epsrt.guidance: what a request becomes, on a bundle and an engine that no file holds."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from epsrt import BundleError, InputError, LimitError, Plan, Request, Sampler, noise
from epsrt.manifest import Sampling, Sizes
from epsrt.plan import CLIP_OFF
from epsrt.prepare import prepare
from epsrt.solvers import make
from numpy_engine import NULL, NumpyEngine, bundle, gradient, network

STEPS = 10
GUIDED = {"labels": [1, 2], "steps": STEPS, "spacing": "linspace"}


@pytest.fixture
def sampler():
    return Sampler(NumpyEngine(bundle()))


def images(n, seed=0, size=(2, 4)):
    return np.random.default_rng(seed).uniform(-1, 1, (n, 1, *size)).astype(np.float32)


def work(*args, on=None, **asked):
    return prepare(on or bundle(), Request(*args, **asked))


def labels_of(made):
    return [sample.conditions["label"] for sample in made.samples]


def ddim(seed, index, label, steps=STEPS, w=1.0, s=0.0, target=0, rederive=True, inside=lambda t: True):
    """One sample by DDIM's equation 12 in float64, guided."""
    schedule, plan = bundle().manifest.schedule, make("ddim", bundle().manifest.schedule, steps=steps)
    ts = plan["t"]
    bars = [*schedule.alpha_bar[ts.astype(int)], 1.0]
    x = noise.normals(seed, index, noise.START, 0, 8).reshape(1, 1, 2, 4).astype(np.float64)
    for i, t in enumerate(ts):
        A, B = bars[i], bars[i + 1]
        eps = c = network(x, [t], [label])
        if inside(t):
            u = network(x, [t], [NULL])
            eps = u + w * (c - u) - s * np.sqrt(1 - A) * gradient(x, [t], [target])
        x0 = np.clip((x - np.sqrt(1 - A) * eps) / np.sqrt(A), -1, 1)
        if rederive:
            eps = (x - np.sqrt(A) * x0) / np.sqrt(1 - A)
        x = np.sqrt(B) * x0 + np.sqrt(1 - B) * eps
    return x[0]


class TestGuidance:
    @pytest.mark.parametrize("w", [-2.0, -0.01, 0.0, 0.3, 1.0, 1.01, 4.0])
    def test_epsilon_is_derived_anew_where_guidance_can_leave_the_bounds(self, sampler, w):
        """Below 0 and above 1; between, x0 lies between those of two networks."""
        mine = sampler.sample(labels=[2], seed=6, steps=STEPS, guidance=w)
        anew = not 0 <= w <= 1
        np.testing.assert_allclose(mine[0], ddim(6, 0, 2, w=w, rederive=anew), rtol=0, atol=1e-4)
        other = ddim(6, 0, 2, w=w, rederive=not anew)
        assert np.abs(mine[0] - other).max() > 1e-3

    @pytest.mark.parametrize("s", [-1.0, 1.0])
    def test_a_classifier_of_either_sign_derives_it_anew(self, sampler, s):
        mine = sampler.sample(labels=[2], seed=6, steps=STEPS, classifier=s, targets=1)
        np.testing.assert_allclose(mine[0], ddim(6, 0, 2, s=s, target=1), rtol=0, atol=1e-4)

    def test_each_sample_has_its_own(self, sampler):
        weights, classifier, targets = [1.0, 3.0, 1.0, -1.0], [0.0, 0.0, 2.0, 1.0], [0, 1, 2, 0]
        mine = sampler.sample(
            labels=[0, 1, 2, 3], seed=1, steps=STEPS, guidance=weights, classifier=classifier, targets=targets
        )
        for i, (w, s, target) in enumerate(zip(weights, classifier, targets, strict=True)):
            truth = ddim(1, i, i, w=w, s=s, target=target, rederive=w != 1 or s != 0)
            np.testing.assert_allclose(mine[i], truth, rtol=0, atol=1e-4)

    @pytest.mark.parametrize(("first", "last"), [(2, 5), (0, 0), (9, 9), (0, 9)])
    def test_an_interval_that_ends_on_visited_timesteps_holds_them(self, first, last):
        t = bundle().plan(steps=STEPS, spacing="linspace")["t"]
        made = work(**GUIDED, guidance=3.0, classifier=2.0, guidance_interval=(t[last], t[first]))
        inside = np.arange(STEPS)
        inside = (inside >= first) & (inside <= last)
        for name, on, off in (("w", 3.0, 1.0), ("s", 2.0, 0.0)):
            np.testing.assert_array_equal(made.own[name], np.where(inside, on, off)[:, None].repeat(2, 1))
        narrow = work(**GUIDED, guidance=3.0, guidance_interval=(t[last] - 1e-6, t[first] + 1e-6))
        np.testing.assert_array_equal(narrow.own["w"], made.own["w"])

    def test_an_interval_is_of_the_schedules_timesteps(self):
        """An edm network is told ¼ ln σ."""
        on = bundle(prediction="edm")
        t = on.manifest.timesteps(on.plan(steps=STEPS, spacing="linspace")["t"])
        assert t[0] == pytest.approx(99)
        made = work(on=on, **GUIDED, guidance=3.0, guidance_interval=(20, 60))
        np.testing.assert_array_equal(made.own["w"][:, 0] == 3.0, (t >= 20) & (t <= 60))

    @pytest.mark.parametrize(
        ("interval", "message"),
        [
            ((60, 20), r"guidance_interval = \(60, 20\) is not \(low, high\), two timesteps that ascend"),
            ((1, 2, 3), "is not .low, high."),
            (5, "is not .low, high."),
            (("a", 2), "is not .low, high."),
            ((float("nan"), 5), "is not .low, high."),
            ((1000, 2000), r"= \(1000, 2000\) holds none of the plan's timesteps, 0 … 99"),
        ],
    )
    def test_intervals_that_are_none(self, interval, message):
        with pytest.raises(InputError, match=message):
            work(**GUIDED, guidance=3.0, guidance_interval=interval)

    def test_an_interval_may_be_one_timestep(self):
        t = bundle().plan(steps=STEPS, spacing="linspace")["t"]
        made = work(**GUIDED, guidance=3.0, guidance_interval=(t[4], t[4]))
        assert (made.own["w"] == 3.0).sum() == 2

    @pytest.mark.parametrize(("phi", "fits"), [(0.0, True), (1.0, True), (-0.01, False), (1.01, False)])
    def test_the_range_of_rescale(self, phi, fits):
        if fits:
            assert (work(**GUIDED, guidance=3.0, guidance_rescale=phi).own["phi"] == phi).all()
        else:
            with pytest.raises(InputError, match=r"guidance_rescale = .* is outside \[0, 1\]: 0.7 is usual"):
                work(**GUIDED, guidance=3.0, guidance_rescale=phi)
            with pytest.raises(InputError, match="guidance_rescale = .* is outside"):
                work(**GUIDED, guidance=3.0, guidance_rescale=[0.5, phi])

    @pytest.mark.parametrize("weight", [1e6, -1e6])
    def test_the_largest_weight(self, weight):
        assert (work(**GUIDED, guidance=weight).own["w"] == weight).all()
        with pytest.raises(InputError, match="is not a number within ±1e\\+06, or one a sample"):
            work(**GUIDED, guidance=weight + np.sign(weight) / 2)
        with pytest.raises(InputError, match="is not a number within ±1e\\+06, or one a sample"):
            work(**GUIDED, guidance=[2 * weight, 1.0])

    @pytest.mark.parametrize("weight", ["2", True, None, float("inf"), [[1.0, 2.0]], [1.0, "a"], 10**400])
    def test_weights_that_are_no_numbers(self, weight):
        with pytest.raises(InputError, match="classifier = .* is not a number within"):
            work(**GUIDED, classifier=weight)

    def test_a_rescale_or_an_interval_of_nothing_is_refused(self):
        for asked in ({"guidance_rescale": 0.5}, {"guidance_interval": (0, 50)}):
            with pytest.raises(InputError, match=f"{next(iter(asked))} is for guided samples: give guidance"):
                work(**GUIDED, **asked)
        with pytest.raises(InputError, match="guidance_rescale is for guided samples"):
            work(**GUIDED, classifier=2.0, guidance_rescale=0.5)
        assert "s" in work(**GUIDED, classifier=2.0, guidance_interval=(0, 50)).own

    def test_the_null_label_is_not_weighed(self):
        made = work(labels=[1, None, None], steps=STEPS, guidance=3.0)
        np.testing.assert_array_equal(made.own["w"][0], [3.0, 1.0, 1.0])
        assert work(labels=[None], steps=STEPS).own == {}
        with pytest.raises(InputError, match="guidance weighs a label against none: give labels"):
            work(2, steps=STEPS, guidance=3.0)
        with pytest.raises(InputError, match="guidance weighs a label against none: give labels"):
            work(2, steps=STEPS, guidance=[1.0, 3.0])
        assert work(2, steps=STEPS, guidance=1.0).own == {}

    def test_the_bundles_own_weight_is_for_labels_alone(self):
        on = bundle(sampling=Sampling(guidance=2.5))
        assert (work(on=on, **GUIDED).own["w"] == 2.5).all()
        assert "w" not in work(on=on, **GUIDED, guidance=1.0).own
        assert work(2, on=on, steps=STEPS).own == {}
        assert work(on=bundle(sampling=Sampling(guidance=2.5), null_label=None), **GUIDED).own == {}

    def test_the_graph_has_what_is_asked_and_no_more(self):
        known = {"known": images(2), "mask": np.ones((2, 4))}
        for asked, features in (
            ({}, ()),
            ({"guidance": 1.0}, ()),
            ({"classifier": 0.0}, ()),
            ({"guidance": 2.0}, ("guidance",)),
            ({"classifier": 2.0}, ("classifier",)),
            (known, ("mask",)),
            ({"guidance": [1.0, 2.0], "classifier": [1.0, 0.0], **known}, ("guidance", "classifier", "mask")),
        ):
            assert work(**GUIDED, **asked).features == features

    def test_a_plan_of_ones_own_has_no_classifier(self):
        plan = Plan.of("mine", t=[2, 1], a=1.0)
        with pytest.raises(InputError, match="plan 'mine' has no column j, what a classifier's gradient adds"):
            work(labels=[1], plan=plan, classifier=2.0)
        assert "s" in work(labels=[1], plan=Plan.of("mine", t=[2, 1], j=[0, 1.0]), classifier=2.0).own

    def test_targets(self):
        made = work(labels=[1, 2], steps=STEPS, classifier=2.0)
        assert [s.target for s in made.samples] == labels_of(made) == [1, 2]
        alone = work(steps=STEPS, classifier=2.0, targets=[0, 2])
        assert [(label, s.target) for label, s in zip(labels_of(alone), alone.samples, strict=True)] == [
            (NULL, 0),
            (NULL, 2),
        ]
        one = work(3, steps=STEPS, classifier=[2.0, 0.0, 1.0], targets=2, labels=3)
        assert [(label, s.target) for label, s in zip(labels_of(one), one.samples, strict=True)] == [(3, 2)] * 3
        with pytest.raises(InputError, match="targets are what the classifier guides to: give its weight"):
            work(steps=STEPS, labels=1, targets=2)
        with pytest.raises(InputError, match="a classifier guides to a class: give targets, or labels"):
            work(2, steps=STEPS, classifier=2.0)
        with pytest.raises(InputError, match="target 3 is outside 0 … 2, the classes of toy.epsrt"):
            work(labels=[3], steps=STEPS, classifier=2.0)
        with pytest.raises(BundleError, match="toy.epsrt has no classifier: export it again with --classifier"):
            work(labels=[1], on=bundle(classifier=None), steps=STEPS, classifier=2.0)

    def test_labels_of_an_unconditional_network_are_the_classifiers(self):
        on = bundle(classes=0, null_label=None, features=("classifier", "mask"))
        made = work(on=on, labels=[1, 2], classifier=2.0, steps=STEPS)
        assert [(dict(s.conditions), s.target) for s in made.samples] == [({}, 1), ({}, 2)]


class TestCount:
    @pytest.mark.parametrize(
        ("asked", "count"),
        [
            ({}, 1),
            ({"n": 3}, 3),
            ({"n": np.int64(2)}, 2),
            ({"labels": [1, 2, 3]}, 3),
            ({"labels": [1]}, 1),
            ({"labels": [1], "guidance": [2.0, 3.0]}, 2),
            ({"seeds": [4, 5]}, 2),
            ({"n": 2, "labels": [1]}, 2),
            ({"init": images(3), "strength": 0.5}, 3),
            ({"init": images(1), "strength": 0.5, "labels": [1, 2]}, 2),
            ({"x": images(2)}, 2),
            ({"known": images(2), "mask": np.ones((2, 4))}, 2),
            ({"labels": 1, "classifier": [1.0, 2.0]}, 2),
            ({"labels": 1, "classifier": 1.0, "targets": [1, 2, 0]}, 3),
            ({"labels": 1, "guidance": 2.0, "guidance_rescale": [0.1, 0.2]}, 2),
        ],
    )
    def test_whatever_is_one_a_sample_says_how_many(self, asked, count):
        asked = dict(asked)
        assert len(work(asked.pop("n", None), steps=STEPS, **asked).samples) == count

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"n": 2, "seeds": [1]}, "1 seeds for 2 samples: give one each"),
            ({"labels": [1, 2], "guidance": [1.0, 2.0, 3.0]}, "3 guidance for 2 samples: give one each"),
            ({"labels": [1, 2], "init": images(3), "strength": 0.5}, "3 init images for 2 samples: give one each"),
            ({"labels": []}, "n = 0: ask for at least 1 sample"),
        ],
    )
    def test_counts_that_differ(self, asked, message):
        asked = dict(asked)
        with pytest.raises(InputError, match=message):
            work(asked.pop("n", None), steps=STEPS, **asked)

    def test_samples_that_no_memory_holds_are_refused(self):
        each = 8 * 4 * 8 + 512  # a result and seven images in lanes, and what a sample takes besides
        most = ((64 << 30) - STEPS * 512) // each
        with pytest.raises(LimitError, match=f"n = {most + 1} samples at once take 64 GiB: draw them in several runs"):
            work(most + 1, steps=STEPS)
        with pytest.raises(InputError, match="known and mask go together"):  # what is looked at next
            work(most - 1, steps=STEPS, known=images(1))
        with pytest.raises(LimitError, match="n = 1000000000 samples at once take 715 GiB"):
            work(10**9, steps=STEPS)

    def test_seeds_and_indices(self):
        def pairs(*args, **asked):
            return [(s.seed, s.index) for s in work(*args, steps=2, **asked).samples]

        assert pairs(3) == [(0, 0), (0, 1), (0, 2)]
        assert pairs(2, seed=7, first=5) == [(7, 5), (7, 6)]
        assert pairs(seeds=[7, 9, 7], first=5) == [(7, 5), (9, 5), (7, 5)]
        assert pairs(seed=2**64 - 1) == [(2**64 - 1, 0)]
        assert pairs(2, first=2**32 - 2) == [(0, 2**32 - 2), (0, 2**32 - 1)]
        for asked, message in (
            ({"seeds": [2**64]}, r"seed 18446744073709551616 is outside 0 … 2\^64 − 1"),
            ({"seeds": [1], "first": 2**32}, r"sample index 4294967296 is outside 0 … 2\^32 − 1"),
            ({"seeds": [True]}, "seed True is not an integer"),
        ):
            with pytest.raises(InputError, match=message):
                pairs(**asked)


class TestBeginning:
    @pytest.mark.parametrize(
        ("steps", "strength", "run"),
        [
            (10, 1.0, 10),
            (10, 1, 10),
            (10, 0.6, 6),
            (10, 0.55, 6),  # to even, as Python rounds
            (10, 0.45, 4),
            (10, 0.44, 4),
            (10, 0.46, 5),
            (10, 0.04, 1),  # at least one
            (10, 1e-9, 1),
            (10, np.float32(0.5), 5),
            (3, 0.5, 2),
            (1, 0.1, 1),
            (7, 0.9, 6),
        ],
    )
    def test_strength_is_rounded_to_whole_steps(self, steps, strength, run):
        asked = {"steps": steps, "spacing": "linspace"} if steps > 1 else {"steps": 1}
        whole = bundle().plan(**asked)
        made = work(init=images(2), strength=strength, **asked)
        assert len(made.plan) == run
        np.testing.assert_array_equal(made.plan.table, whole.table[-run:])
        alpha, sigma = whole.levels[steps - run]
        assert made.plan.start == (alpha, sigma)
        for sample, image in zip(made.samples, images(2), strict=True):
            assert (sample.start, sample.stream) == (made.plan.start, noise.FORWARD)
            np.testing.assert_array_equal(sample.init, image)

    @pytest.mark.parametrize("strength", [0.0, -0.1, 1.0001, True, "0.5", None])
    def test_strengths_that_are_none(self, strength):
        with pytest.raises(InputError, match=r"strength = .* is outside \(0, 1\]|begins from noise: give strength"):
            work(init=images(2), strength=strength, steps=STEPS)

    def test_latents_are_taken_as_they_are_and_x0_is_not_clipped(self):
        latents = 5 * images(2)
        made = work(x=latents, steps=STEPS)
        assert made.plan.start == (1.0, 0.0)
        assert (made.plan["clip"] == CLIP_OFF).all()
        assert [s.stream for s in made.samples] == [noise.START] * 2
        np.testing.assert_array_equal([s.init for s in made.samples], latents)
        assert (work(x=latents, steps=STEPS, clip=1.0).plan["clip"] == 1).all()
        plan = bundle().plan(steps=STEPS)
        assert (work(x=latents, plan=plan).plan["clip"] == 1).all()
        assert (work(2, steps=STEPS).plan["clip"] == 1).all()

    @pytest.mark.parametrize("method", ["heun", "flow-euler", "euler"])
    def test_latents_are_in_the_networks_units(self, method):
        on = bundle()
        plan = on.plan(method, STEPS)
        alpha, sigma = on.manifest.schedule.at(plan["t"][:1])
        scale = {"flow-euler": 1 / (alpha + sigma)}.get(method, 1 / alpha)[0]
        made = work(x=images(2), method=method, steps=STEPS, on=on)
        assert made.plan.start == (pytest.approx(scale, rel=1e-12), 0.0)
        assert on.own_scale(plan) == pytest.approx(scale, rel=1e-12)
        assert on.own_scale(on.plan("ddim", STEPS)) == pytest.approx(1.0, rel=1e-12)
        assert on.own_scale(Plan.of("mine", t=50.0)) == 1.0

    def test_images_may_lie_a_little_beyond_the_range(self):
        for edge, fits in ((1.19, True), (1.21, False), (-1.19, True), (-1.21, False)):
            given = np.full((1, 1, 2, 4), edge)
            if fits:
                assert len(work(init=given, strength=0.5, steps=STEPS).samples) == 1
            else:
                with pytest.raises(InputError, match="init holds values from .*, and the bundle's images -1 to 1"):
                    work(init=given, strength=0.5, steps=STEPS)
        wide = np.full((1, 1, 2, 4), 9.0)
        assert len(work(init=wide, strength=0.5, steps=STEPS, on=bundle(clip=None)).samples) == 1
        assert len(work(x=wide, steps=STEPS).samples) == 1

    def test_a_plan_that_begins_from_noised_images_takes_states_of_any_size(self):
        plan = bundle().plan(steps=STEPS).cut(4, start=(1.0, 0.0))
        made = work(init=np.full((1, 1, 2, 4), 9.0), plan=plan)
        assert made.samples[0].stream == noise.START
        noised = bundle().plan(steps=STEPS).begun(4)
        with pytest.raises(InputError, match="init holds values from 9 to 9"):
            work(init=np.full((1, 1, 2, 4), 9.0), plan=noised)
        assert work(init=images(1), plan=noised).samples[0].stream == noise.FORWARD

    def test_what_is_given_may_change_afterwards(self):
        given = images(2)
        made = work(init=given, strength=0.5, steps=STEPS)
        given[:] = 0
        np.testing.assert_array_equal(made.samples[1].init, images(2)[1])

    def test_known_pixels_and_masks(self):
        mask = np.tri(2, 4)
        made = work(known=images(1), mask=mask, labels=[1, 2], steps=STEPS)
        for sample in made.samples:
            np.testing.assert_array_equal(sample.known, images(1)[0])
            np.testing.assert_array_equal(sample.mask, mask[None])
        assert work(2, steps=STEPS).samples[0].mask is None
        resampled = work(known=images(1), mask=mask, steps=STEPS, method="ddpm", resample=2, jump=2)
        assert len(resampled.plan) == STEPS + 2 * 4

    def test_sizes(self):
        on = bundle(sizes=Sizes(2, 8))
        assert work(2, on=on, steps=STEPS).shape == (1, 2, 4)
        assert work(2, on=on, steps=STEPS, size=(8, 6)).shape == (1, 8, 6)
        assert work(init=images(2, size=(4, 8)), strength=0.5, on=on, steps=STEPS).shape == (1, 4, 8)
        assert work(x=images(2, size=(4, 8)), on=on, steps=STEPS).shape == (1, 4, 8)
        given = {"known": images(2, size=(8, 2)), "mask": np.ones((8, 2))}
        assert work(**given, on=on, steps=STEPS).shape == (1, 8, 2)
        with pytest.raises(InputError, match=r"init is float32 \[2, 1, 4, 8\], not float \[2, 1, 2, 4\]"):
            work(init=images(2, size=(4, 8)), strength=0.5, steps=STEPS)


class TestPlans:
    def test_a_plan_that_is_given_is_taken(self):
        plan = Plan.of("mine", t=[2, 1], a=0.5)
        assert work(plan=plan).plan is plan
        for asked, word in (({"steps": 4}, "steps"), ({"method": "ddim"}, "method"), ({"eta": 0.5}, "eta")):
            with pytest.raises(InputError, match=f"{word} was given beside a plan, which has settled it"):
                work(plan=plan, **asked)
        with pytest.raises(InputError, match="plan = 3 is no Plan: give one, or method and steps"):
            work(plan=3)

    @pytest.mark.parametrize("method", ["langevin", "ddim-inversion"])
    def test_methods_that_would_not_be_themselves_do_not_clip_unless_asked(self, method):
        schedule = bundle().manifest.schedule
        assert (bundle().plan(method, 5)["clip"] == CLIP_OFF).all()
        assert (make(method, schedule, steps=5)["clip"] == CLIP_OFF).all()
        assert (make(method, schedule, steps=5, clip=0.7)["clip"] == 0.7).all()
        assert (bundle().plan(method, 5, clip=0.7)["clip"] == 0.7).all()
        assert (bundle().plan("ddpm", 5)["clip"] == 1).all()

    def test_whoever_says_what_epsilon_is_has_settled_it(self, sampler):
        asked = {"labels": [2], "seed": 6, "steps": STEPS, "guidance": 3.0}
        own = sampler.sample(rederive=False, **asked)
        np.testing.assert_allclose(own[0], ddim(6, 0, 2, w=3.0, rederive=False), rtol=0, atol=1e-4)
        owners = Sampling(options={"rederive": False})
        of_owner = Sampler(NumpyEngine(bundle(sampling=owners))).sample(**asked)
        np.testing.assert_array_equal(of_owner, own)
        plan = sampler.plan(steps=STEPS)
        given = sampler.sample(labels=[2], seed=6, guidance=3.0, plan=plan)
        np.testing.assert_array_equal(given, own)
        other = work(**{**GUIDED, "method": "ddpm"}, guidance=3.0)
        assert set(other.own) == {"w", "phi"}

    def test_guided_samples_from_latents_are_not_clipped_either(self):
        made = work(x=images(2), **GUIDED, guidance=3.0)
        assert "a" in made.own
        assert (made.plan["clip"] == CLIP_OFF).all()
        assert "clip" not in made.own

    def test_the_manifest_is_replaced_by_nothing(self):
        """Preparing reads the bundle and changes nothing of it."""
        on = bundle()
        before = msgspec.json.encode(on.manifest)
        work(on=on, **GUIDED, guidance=3.0)
        assert msgspec.json.encode(on.manifest) == before


class TestWork:
    def test_rows_are_the_plans_and_each_samples_own(self):
        made = work(labels=[1, 2, 3], steps=STEPS, guidance=[1.0, 2.0, 3.0])
        columns = bundle().graph("fp32", made.features).columns
        table = made.plan.rows(columns)
        rows = made.rows(columns, table, slice(2, 5), slice(1, 3))
        assert rows.shape == (3, 2, len(columns))
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows[:, :, columns.index("w")], [[2.0, 3.0]] * 3)
        np.testing.assert_array_equal(rows[:, 0, columns.index("t")], made.plan["t"][2:5])
        anew = bundle().plan(steps=STEPS, rederive=True)
        np.testing.assert_array_equal(rows[:, 1, columns.index("a")], np.float32(anew["a"][2:5]))
        whole = made.rows(columns, table, slice(0, STEPS), slice(0, 3))
        np.testing.assert_array_equal(whole[:, 0, columns.index("a")], np.float32(made.plan["a"]))
        plain = work(2, steps=STEPS)
        shared = plain.rows(columns[:5], plain.plan.rows(columns[:5]), slice(0, 4), slice(0, 2))
        assert shared.strides[1] == 0  # one row in memory for all


class TestMasks:
    @pytest.mark.parametrize("masked", [(0, 1), (0,), (1,)])
    def test_known_pixels_are_noised_to_the_next_level_and_joined(self, sampler, masked):
        """arXiv 2201.09865, algorithm 1 without resampling; the noise of what is known is its own."""
        known, schedule = images(2), bundle().manifest.schedule
        masks = np.zeros((2, 1, 2, 4), np.float32)
        for lane in masked:
            masks[lane] = np.array([[1, 0.25, 0, 1], [0, 1, 1, 0]])
        asked = {"labels": [1, 2], "seed": 5, "steps": 4, "method": "ddpm"}
        mine = sampler.sample(known=known, mask=masks, **asked)
        plan = sampler.plan("ddpm", 4)
        ts = plan["t"].astype(int)
        levels = [*zip(*schedule.at(ts), strict=True), (1.0, 0.0)]
        for i in range(2):

            def drawn(stream, n, i=i):
                return noise.normals(5, i, stream, n, 8).reshape(1, 1, 2, 4).astype(np.float64)

            x = drawn(noise.START, 0)
            for row, t in enumerate(ts):
                k = {name: plan[name][row] for name in "pqabd"}
                x0 = np.clip(k["p"] * x + k["q"] * network(x, [t], [i + 1]), -1, 1)
                x = k["a"] * x + k["b"] * x0 + k["d"] * drawn(noise.STEP, row)
                alpha, sigma = levels[row + 1]
                kept = alpha * known[i] + sigma * drawn(noise.KNOWN, row)
                x = masks[i] * kept + (1 - masks[i]) * x
            np.testing.assert_allclose(mine[i], x[0], rtol=0, atol=1e-5)
