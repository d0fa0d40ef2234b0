"""What a bundle says where the caller does not: plans, graphs, labels and shapes; of a bundle that no file holds."""

from __future__ import annotations

import numpy as np
import pytest

from epsrt import BundleError, InputError, Plan, Schedule
from epsrt.manifest import Sampling, Sizes
from epsrt.solvers import make
from numpy_engine import NULL, bundle

T100 = bundle().manifest.schedule


def same(plan, *args, schedule=T100, **options):
    truth = make(*args, schedule, **options)
    np.testing.assert_array_equal(plan.table, truth.table)
    assert (plan.name, plan.start, plan.level) == (truth.name, truth.start, truth.level)


class TestPlan:
    def test_by_default(self):
        same(bundle().plan(), "ddim", steps=50, spacing="trailing", clip=1.0)

    def test_the_owners_choice(self):
        options = {"variance": "fixed_large", "eta": 0.5, "steps_offset": 1}
        on = bundle(sampling=Sampling("ddpm", 7, "leading", options))
        own = {"variance": "fixed_large", "spacing": "leading", "steps_offset": 1}
        same(on.plan(), "ddpm", steps=7, **own)
        same(on.plan(steps=5), "ddpm", steps=5, **own)
        same(on.plan("DDPM"), "ddpm", steps=7, **own)
        same(on.plan("ddim"), "ddim", steps=50, spacing="leading", steps_offset=1, eta=0.5)
        same(on.plan("ddim", 9, eta=0.25), "ddim", steps=9, spacing="leading", steps_offset=1, eta=0.25)
        same(on.plan("dpmpp-2m", 6), "dpmpp-2m", steps=6, spacing="leading", steps_offset=1)
        same(on.plan(variance="fixed_small"), "ddpm", steps=7, spacing="leading", steps_offset=1)

    def test_a_callers_spacing_or_timesteps_are_instead_of_the_owners(self):
        on = bundle(sampling=Sampling("ddim", 7, "karras", {"rho": 5.0, "sigma_min": 0.1}))
        same(on.plan(), "ddim", steps=7, spacing="karras", rho=5.0, sigma_min=0.1)
        same(on.plan(rho=3.0), "ddim", steps=7, spacing="karras", rho=3.0, sigma_min=0.1)
        same(on.plan(spacing="trailing"), "ddim", steps=50, spacing="trailing")
        same(on.plan(steps=4, spacing="trailing"), "ddim", steps=4, spacing="trailing")
        same(on.plan(timesteps=[9, 4]), "ddim", timesteps=[9, 4])

    def test_a_respacing_string_is_for_its_own_count(self):
        on = bundle(sampling=Sampling("ddpm", None, "ddim10"))
        same(on.plan(), "ddpm", spacing="ddim10")
        same(on.plan(steps=6), "ddpm", steps=6, spacing="trailing")
        same(on.plan("ddim"), "ddim", steps=50, spacing="trailing")

    def test_the_networks_facts(self):
        ve = Schedule("ve", T=100)
        on = bundle(schedule=ve, prediction="edm", sigma_data=0.7, clip=None)
        same(on.plan("heun", 5), "heun", schedule=ve, steps=5, prediction="edm", sigma_data=0.7, clip=None)
        same(on.plan("heun", 5, clip=2.0), "heun", schedule=ve, steps=5, prediction="edm", sigma_data=0.7, clip=2.0)
        same(bundle(clip=0.8).plan("ddim", 5), "ddim", steps=5, clip=0.8)
        same(bundle(clip=0.8).plan("langevin", 5), "langevin", steps=5, clip=None)

    def test_a_learned_variance_is_ddpms(self):
        on = bundle(variance="learned_range", features=())
        same(on.plan("ddpm", 5), "ddpm", steps=5, variance="learned_range")
        same(on.plan("ddpm", 5, variance="fixed_small"), "ddpm", steps=5)
        same(on.plan("ddim", 5), "ddim", steps=5)


class TestGraph:
    def test_the_smallest_that_has_the_features(self):
        on = bundle()
        for features in ((), ("mask",), ("guidance", "mask"), ("mask", "classifier", "guidance")):
            assert set(on.graph("fp32", features).features) == set(features)
        assert all(map(on.has, ("guidance", "classifier", "mask")))
        assert not on.has("thresholding")

    @pytest.mark.parametrize(
        ("changes", "precision", "features", "message"),
        [
            ({}, "fp16", (), "toy.epsrt has no fp16 step graph, only fp32: export it again with that one"),
            ({"null_label": None, "features": ()}, "fp32", ("guidance",), "toy.epsrt has no null label, so guidance"),
            ({"features": ()}, "fp32", ("guidance",), "no step graph with guidance: export it again$"),
            ({"features": ()}, "fp32", ("mask",), r"no step graph with mask: export it again with --masked \(mask"),
            ({"features": ("mask",)}, "fp32", ("classifier",), r"export it again with --classifier \(classifier=\)$"),
            ({"features": ()}, "fp32", ("mask", "classifier"), r"with classifier and mask: .*--masked .* and --cla"),
            ({}, "fp32", ("learned variance",), "toy.epsrt has no learned variance: its network was not exported"),
            ({}, "fp32", ("thresholding", "mask"), "toy.epsrt has no thresholding: its network was not"),
        ],
    )
    def test_what_it_lacks_and_how_to_get_it(self, changes, precision, features, message):
        with pytest.raises(BundleError, match=message):
            bundle(**changes).graph(precision, features)

    def test_features_that_are_there_but_apart(self):
        import msgspec

        on = bundle()
        graphs = tuple(g for g in on.manifest.graphs if len(g.features) < 2)
        apart = type(on)(on.path, msgspec.structs.replace(on.manifest, graphs=graphs))
        with pytest.raises(BundleError, match="no step graph with guidance and mask at once: leave one of them out"):
            apart.graph("fp32", ("guidance", "mask"))


class TestLabels:
    @pytest.mark.parametrize(("label", "number"), [(0, 0), (3, 3), (np.int64(2), 2), (None, NULL)])
    def test_those_that_there_are(self, label, number):
        found = bundle().label_of(label)
        assert (found, type(found)) == (number, int)

    @pytest.mark.parametrize("label", [-1, 5, 1.0, True, "1", 4.0])
    def test_those_that_there_are_not(self, label):
        with pytest.raises(InputError, match="label .* is outside 0 … 3, the classes of toy.epsrt"):
            bundle().label_of(label)

    def test_a_null_label_inside_the_classes(self):
        assert bundle(null_label=0).label_of(None) == 0
        with pytest.raises(InputError, match="label 4 is outside 0 … 3"):
            bundle(null_label=0).label_of(4)

    def test_without_a_null_label_one_is_needed(self):
        with pytest.raises(InputError, match="toy.epsrt needs labels, 0 … 3, and knows no null label"):
            bundle(null_label=None).label_of(None)
        assert bundle(null_label=None).label_of(3) == 3

    def test_unconditional(self):
        on = bundle(classes=0, null_label=None)
        assert not on.labelled
        assert bundle(classes=1).labelled
        assert on.label_of(None) == 0
        with pytest.raises(InputError, match="label 0 was given, but toy.epsrt is unconditional: leave labels out"):
            on.label_of(0)

    @pytest.mark.parametrize("target", [-1, 3, 1.0, None])
    def test_targets(self, target):
        assert [bundle().target_of(t) for t in (0, 2)] == [0, 2]
        with pytest.raises(InputError, match="target .* is outside 0 … 2, the classes of toy.epsrt"):
            bundle().target_of(target)


class TestShape:
    def test_its_own(self):
        assert bundle().image_shape() == bundle().image_shape((2, 4)) == bundle().image_shape([2, 4]) == (1, 2, 4)
        assert bundle(sizes=Sizes(2, 8)).image_shape() == (1, 2, 4)
        with pytest.raises(InputError, match="a size of 4 × 2 is not 2 × 4, the one that toy.epsrt has: export"):
            bundle().image_shape((4, 2))

    @pytest.mark.parametrize("size", [(2, 2), (8, 8), (4, 6), np.array([8, 2])])
    def test_others(self, size):
        found = bundle(sizes=Sizes(2, 8)).image_shape(size)
        assert found == (1, *size)
        assert all(type(n) is int for n in found)

    @pytest.mark.parametrize("size", [(0, 2), (10, 2), (2, 10), (3, 2), (2, 3), (-2, 2), (1, 1)])
    def test_sizes_that_there_are_not(self, size):
        message = f"a size of {size[0]} × {size[1]} is none of toy.epsrt: height and width are multiples of 2 up to 8"
        with pytest.raises(InputError, match=message):
            bundle(sizes=Sizes(2, 8)).image_shape(size)

    @pytest.mark.parametrize("size", [8, (8,), (8, 8, 8), (8.0, 8), (8, True), ("8", 8)])
    def test_what_is_no_size(self, size):
        with pytest.raises(InputError, match=r"is not \(height, width\), two whole numbers of pixels"):
            bundle(sizes=Sizes(2, 8)).image_shape(size)


def test_units_are_of_the_first_row_alone():
    on = bundle()
    sigma = on.manifest.schedule.at(np.array([50]))[1][0]
    assert on.own_scale(Plan.of("own", level=(1.0, 2.0), t=[50, 12345])) == pytest.approx(2 / sigma)
