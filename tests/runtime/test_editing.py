"""img2img, inpainting, outpainting, inversion and interpolation, on real step graphs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from epsrt import BundleError, EpsrtError, Sampler, canvas, noise, slerp
from epsrt.solvers import METHODS
from helpers import DATA

STEPS = 10


@pytest.fixture(scope="module")
def sampler(edited_bundle_path):
    with Sampler.open(edited_bundle_path, "onnxruntime", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def digits():
    """Real digits of classes 0 … 7, float32 [8, 1, 8, 8] in −1 … 1."""
    return np.load(DATA / "digits.npy").astype(np.float32) / 8 - 1


@pytest.fixture
def lower():
    """The upper half is known, the lower half redrawn."""
    mask = np.zeros((8, 8), bool)
    mask[:4] = True
    return mask


class TestImageToImage:
    def test_it_begins_from_forward_noise_of_its_own_stream(self, sampler, digits):
        images = digits[:2]
        mine = sampler.sample(init=images, strength=0.6, steps=STEPS, seed=3, labels=[0, 1], method="ddpm")
        plan = sampler.plan("ddpm", STEPS)
        first = STEPS - 6
        alpha, sigma = sampler.bundle.manifest.schedule.at(plan["t"][first : first + 1])
        z = noise.normals(3, [0, 1], noise.FORWARD, 0, 64).reshape(2, 1, 8, 8)
        x = (alpha * images + sigma * z).astype(np.float32)
        rest = sampler.sample(
            plan=plan.cut(first, start=(1.0, 0.0)), init=x, seed=3, labels=[0, 1]
        )  # whose rows keep their noise
        np.testing.assert_allclose(mine, rest, rtol=0, atol=1e-5)

    def test_less_strength_stays_nearer(self, sampler, digits):
        distances = [
            np.abs(sampler.sample(init=digits, strength=s, steps=20, seed=1, labels=list(range(8))) - digits).mean()
            for s in (0.1, 0.4, 0.7, 1.0)
        ]
        assert distances == sorted(distances)
        assert distances[0] < distances[-1] / 2

    def test_one_image_serves_many_samples(self, sampler, digits):
        many = sampler.sample(3, init=digits[:1], strength=0.7, steps=STEPS, seed=5, labels=0)
        np.testing.assert_array_equal(
            many, sampler.sample(init=np.repeat(digits[:1], 3, 0), strength=0.7, steps=STEPS, seed=5, labels=0)
        )
        assert np.abs(many[0] - many[1]).max() > 0.05

    @pytest.mark.parametrize("method", [m for m in METHODS if m not in ("ddim-inversion", "langevin")])
    def test_every_method_begins_midway(self, sampler, digits, method):
        """With little noise all of them come back near the image."""
        near = sampler.sample(init=digits, strength=0.1, steps=20, method=method, seed=2, labels=list(range(8)))
        assert np.abs(near - digits).mean() < 0.2


class TestMasks:
    @pytest.mark.parametrize("method", [m for m in METHODS if m != "ddim-inversion"])
    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_known_pixels_come_back_exactly(self, edited_bundle_path, digits, lower, method, precision):
        with Sampler.open(edited_bundle_path, "onnxruntime", precision=precision, threads=1) as opened:
            mine = opened.sample(known=digits, mask=lower, steps=4, method=method, labels=list(range(8)), seed=1)
        np.testing.assert_array_equal(mine[..., :4, :], digits[..., :4, :])
        assert np.abs(mine[..., 4:, :] - digits[..., 4:, :]).max() > 0.1

    def test_an_empty_mask_is_the_plain_sampler(self, sampler, digits):
        options = {"steps": STEPS, "seed": 4, "labels": list(range(8)), "method": "ddpm"}
        masked = sampler.sample(known=digits, mask=np.zeros((8, 8)), **options)
        np.testing.assert_allclose(masked, sampler.sample(**options), rtol=0, atol=1e-5)

    def test_masks_are_each_samples_own_and_broadcast(self, sampler, digits):
        masks = np.zeros((8, 1, 8, 8), np.float32)
        for i in range(8):
            masks[i, :, :i] = 1
        mine = sampler.sample(known=digits, mask=masks, steps=STEPS, labels=list(range(8)))
        for i in range(8):
            alone = sampler.sample(known=digits[i : i + 1], mask=masks[i, 0], steps=STEPS, labels=i, first=i)
            np.testing.assert_allclose(mine[i], alone[0], rtol=0, atol=1e-5)
            np.testing.assert_array_equal(mine[i, :, :i], digits[i, :, :i])

    def test_guided_and_by_a_classifier(self, sampler, digits, lower):
        options = {"known": digits, "mask": lower, "steps": STEPS, "labels": list(range(8)), "seed": 2}
        plain = sampler.sample(**options)
        for more in ({"guidance": 3.0}, {"classifier": 4.0}):
            mine = sampler.sample(**options, **more)
            np.testing.assert_array_equal(mine[..., :4, :], digits[..., :4, :])
            assert np.abs(mine - plain).max() > 0.05

    def test_lanes_forget_a_mask(self, sampler, digits, lower):
        """Kept lanes: a call without a mask after one with it, on the masked graph both."""
        from epsrt.engines import Sample

        with sampler._graphs.running(("mask",)) as engine, engine.lanes(1) as lanes:
            rows = sampler.plan("ddim", 3).rows(engine.columns)[:, None]
            lanes.write(0, Sample(seed=1, known=digits[0], mask=np.ones((1, 8, 8), np.float32)))
            lanes.advance(rows)
            np.testing.assert_array_equal(lanes.read(0), digits[0])
            lanes.write(0, Sample(seed=1, conditions={"label": 10}))
            lanes.advance(rows)
            np.testing.assert_allclose(lanes.read(0), sampler.sample(1, steps=3, seed=1)[0], rtol=0, atol=1e-5)

    def test_resampling_runs_more_rows_and_changes_the_rest_alone(self, sampler, digits, lower):
        steps = []
        options = {"known": digits, "mask": lower, "steps": STEPS, "labels": list(range(8)), "method": "ddpm"}
        again = sampler.sample(**options, resample=3, jump=2, on_step=lambda done, total: steps.append(total))
        assert set(steps) == {len(steps)}
        assert len(steps) == STEPS + 2 * 4 * 2
        np.testing.assert_array_equal(again[..., :4, :], digits[..., :4, :])
        assert np.abs(again - sampler.sample(**options)).max() > 0.1


class TestInversion:
    def test_there_and_back_gets_better_with_steps(self, sampler, digits):
        labels = list(range(8))
        errors = []
        for steps in (5, 20, 100):
            latents = sampler.invert(digits, steps=steps, labels=labels)
            back = sampler.sample(x=latents, steps=steps, labels=labels)
            errors.append(float(np.square((back - digits) / 2).mean()))
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < errors[0] / 4

    @pytest.mark.parametrize("method", [m for m in METHODS if m != "ddim-inversion"])
    def test_latents_of_a_seed_are_what_it_begins_from(self, sampler, method):
        """Whatever units the method keeps x in."""
        plan = sampler.plan(method, STEPS)
        latents = sampler.latents(seeds=[4, 9], plan=plan)
        mine = sampler.sample(x=latents, plan=plan, seeds=[4, 9], labels=[1, 2])
        np.testing.assert_allclose(mine, sampler.sample(plan=plan, seeds=[4, 9], labels=[1, 2]), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("method", ["euler", "flow-euler", "dpmpp-2m", "heun"])
    def test_other_methods_begin_from_the_same_latents(self, sampler, digits, method):
        """All go to the same place as steps grow: latents are in the network's units, not the method's."""
        labels = list(range(8))
        latents = sampler.invert(digits, steps=100, labels=labels)
        back = sampler.sample(x=latents, method=method, steps=50, labels=labels)
        assert np.square((back - digits) / 2).mean() < 0.01

    def test_a_stochastic_sampler_is_refused(self, sampler, digits):
        with pytest.raises(
            EpsrtError, match="ddpm is stochastic, and its noise cannot be undone: invert with ddim-inv"
        ):
            sampler.invert(digits, steps=STEPS, method="ddpm", labels=0)
        with pytest.raises(EpsrtError, match="dpmpp-2m has no inverse here: invert with ddim-inversion"):
            sampler.invert(digits, steps=STEPS, method="dpmpp-2m", labels=0)
        with pytest.raises(EpsrtError, match="is deterministic and takes no option 'eta'"):
            sampler.invert(digits, steps=STEPS, eta=0.5, labels=0)


class TestInterpolation:
    def test_the_sphere(self):
        a, b = noise.normals(1, [0, 1], noise.START, 0, 64).reshape(2, 1, 8, 8)
        path = slerp(a, b, [0, 0.25, 0.5, 1])
        assert path.dtype == np.float32
        np.testing.assert_allclose(path[[0, 3]], [a, b], rtol=0, atol=1e-6)
        norms = np.linalg.norm(path.reshape(4, -1), axis=1)
        assert norms.min() > 0.98 * min(norms[0], norms[3])
        assert np.linalg.norm((a + b) / 2) < 0.8 * norms[2]
        angles = [np.arccos(float((path[0] * p).sum()) / norms[0] / n) for p, n in zip(path, norms, strict=True)]
        unit = [p / np.linalg.norm(p) for p in slerp(a / norms[0], b / norms[3], [0, 0.25, 0.5, 0.75, 1])]
        turns = [np.arccos(float((p * q).sum())) for p, q in pairwise(unit)]
        np.testing.assert_allclose(turns, angles[3] / 4, rtol=1e-4)

    def test_neighbours_and_opposites(self):
        a = noise.normals(1, 0, noise.START, 0, 16).reshape(1, 4, 4)
        np.testing.assert_allclose(slerp(a, 2 * a, [0.5])[0], 1.5 * a, rtol=1e-6)
        with pytest.raises(EpsrtError, match="opposite directions"):
            slerp(a, -a, [0.5])

    @pytest.mark.parametrize(
        ("b", "fractions", "message"),
        [
            (np.ones((1, 4, 4)), "abc", "a list of fractions"),
            (np.ones((1, 4, 4)), 0.5, "a list of fractions"),
            (np.zeros((1, 4, 5), np.float32), [0.5], r"two latents of one shape, float, not float32 \[1, 4, 4\] and "),
            (np.zeros((1, 4, 4), np.int64), [0.5], "two latents of one shape, float, not .* and int64"),
            (np.full((1, 4, 4), np.nan), [0.5], "NaN or infinity"),
            (np.ones((1, 4, 4)), [np.inf], "NaN or infinity"),
        ],
    )
    def test_refusals(self, b, fractions, message):
        with pytest.raises(EpsrtError, match=message):
            slerp(np.ones((1, 4, 4)) if b.dtype == np.float64 else np.ones((1, 4, 4), np.float32), b, fractions)


class TestCanvas:
    def test_images_lie_where_they_are_told(self, digits):
        known, mask = canvas(digits[:2], (16, 12))
        np.testing.assert_array_equal(known[:, :, 4:12, 2:10], digits[:2])
        assert mask.shape == (2, 1, 16, 12)
        assert mask.sum() == 2 * 64
        known, mask = canvas(digits[:2], (8, 16), at=(0, 8))
        np.testing.assert_array_equal(known[..., 8:], digits[:2])
        assert not mask[..., :8].any()

    @pytest.mark.parametrize(("size", "at"), [(12, None), ((12, 12, 3), None), ((12, 12), 3)])
    def test_pairs_that_are_none(self, digits, size, at):
        with pytest.raises(EpsrtError, match="is not a pair of whole numbers, down and across"):
            canvas(digits[:1], size, at)

    @pytest.mark.parametrize(("size", "at"), [((6, 8), None), ((16, 16), (9, 0)), ((16, 16), (-1, 0))])
    def test_what_does_not_fit(self, digits, size, at):
        with pytest.raises(EpsrtError, match="do not fit a canvas of"):
            canvas(digits[:1], size, at)


IMAGES = np.zeros((2, 1, 8, 8), np.float32)
MASK = np.ones((8, 8), bool)
NAN = np.where(np.arange(8) == 3, np.nan, IMAGES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": IMAGES}, "plan 'ddim' begins from noise: give strength, 0 to 1, to begin from init noised"),
        ({"init": IMAGES, "strength": 0.0}, r"strength = 0.0 is outside \(0, 1\]"),
        ({"init": IMAGES, "strength": 1.01}, r"strength = 1.01 is outside \(0, 1\]"),
        ({"init": IMAGES, "strength": float("nan")}, r"strength = nan is outside \(0, 1\]"),
        ({"init": IMAGES, "strength": "0.5"}, r"strength = 0.5 is outside"),
        ({"strength": 0.5}, "strength says how far init is noised: give init"),
        ({"init": IMAGES[..., :4], "strength": 0.5}, r"init is float32 \[2, 1, 8, 4\], not float \[2, 1, 8, 8\]"),
        ({"init": IMAGES.astype(np.uint8), "strength": 0.5}, "init is uint8 .*, not float"),
        ({"init": IMAGES + 255, "strength": 0.5}, "init holds values from 255 to 255, and the bundle's images -1 to 1"),
        ({"init": NAN, "strength": 0.5}, "init image 0 holds NaN or infinity"),
        (
            {"init": IMAGES, "strength": 0.5, "method": "ddim-inversion"},
            "begins from images as they are: leave strength",
        ),
        ({"init": IMAGES, "x": IMAGES}, "init and x were both given"),
        ({"x": IMAGES[:, 0]}, r"x is float32 \[2, 8, 8\], not float \[2, 1, 8, 8\]"),
        ({"x": NAN}, "x image 0 holds NaN or infinity"),
        ({"known": IMAGES}, "known and mask go together"),
        ({"mask": MASK}, "known and mask go together"),
        ({"known": IMAGES + 9, "mask": MASK}, "known holds values from 9 to 9"),
        ({"known": NAN, "mask": MASK}, "known image 0 holds NaN or infinity"),
        ({"known": IMAGES.astype(int), "mask": MASK}, "known is int64 .*, not float"),
        ({"known": IMAGES, "mask": MASK[:4]}, r"mask is bool \[4, 8\], not bool or float \[2, 1, 8, 8\] or \[8, 8\]"),
        ({"known": IMAGES, "mask": MASK.astype(np.uint8)}, r"mask is uint8 \[8, 8\], not bool or float"),
        ({"known": IMAGES, "mask": 2.0 * MASK}, "mask holds values from 2 to 2: it is 1 where known is kept"),
        ({"known": IMAGES, "mask": NAN[0, 0]}, "mask holds NaN: it is 1 where known is kept"),
        ({"known": IMAGES, "mask": np.ones((3, 1, 8, 8))}, r"mask is float64 \[3, 1, 8, 8\], not"),
        ({"known": IMAGES, "mask": np.ones((2, 2, 8, 8))}, r"mask is float64 \[2, 2, 8, 8\], not"),
        ({"known": np.zeros((3, 1, 8, 8)), "mask": MASK}, "3 known images for 2 samples: give one each"),
        ({"known": IMAGES, "mask": MASK, "method": "ddim-inversion", "init": IMAGES}, "does not end with clean images"),
        ({"resample": 3}, "resample = 3 is for masked samples: give known and mask"),
        ({"known": IMAGES, "mask": MASK, "resample": 0}, "resample = 0 is outside 1 … 1000"),
        ({"known": IMAGES, "mask": MASK, "resample": 2, "jump": 0}, "jump = 0 is outside 1 … 1000"),
        ({"known": IMAGES, "mask": MASK, "resample": 2.5}, "resample = 2.5 is not a whole number"),
        ({"known": IMAGES, "mask": MASK, "resample": 2, "method": "heun"}, "heun remembers what came before"),
        ({"labels": [1, 2, 3]}, "3 labels for 2 samples: give one each"),
        ({"seeds": [1]}, "1 seeds for 2 samples: give one each"),
        ({"seeds": 5}, "seeds = 5 are not one a sample: give a list, or seed="),
        (
            {"known": IMAGES, "mask": MASK, "resample": 2, "jump": 10},
            "jump = 10 of 10 steps leaves nothing to run again",
        ),
        ({"known": [[1.0], [1.0, 2.0]], "mask": MASK}, "known is no array .*: give rows of one length"),
        ({"known": IMAGES, "mask": MASK.astype(int)}, r"mask is int64 .*: mask.astype\(bool\)"),
        ({"plan": "ddim"}, "plan = 'ddim' is no Plan: give one, or method and steps"),
        ({"batch": "a"}, "batch = 'a' is not a whole number"),
        ({"batch": True}, "batch = True is not a whole number"),
        ({"first": None}, "first = None is not a whole number"),
        ({"size": 8}, r"size = 8 is not \(height, width\)"),
    ],
)
def test_what_does_not_fit_is_refused(sampler, arguments, message):
    steps = {} if "plan" in arguments else {"steps": STEPS}
    for function in (sampler.sample, sampler.stream):
        with pytest.raises(EpsrtError, match=message):
            function(2, **steps, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n = 0: ask for at least 1 sample"),
        ({"n": 1.5}, "n = 1.5: ask for at least 1 sample"),
        ({"n": 3, "seeds": [1, 2]}, "2 seeds for 3 samples"),
        ({"plan": "ddim"}, "plan = 'ddim' is no Plan"),
        ({"seed": -1}, "seed -1 is outside"),
    ],
)
def test_latents_that_there_are_not(sampler, arguments, message):
    with pytest.raises(EpsrtError, match=message):
        sampler.latents(**arguments)
    with pytest.raises(EpsrtError, match="plan 'ddim-inversion' begins from images, not from noise"):
        sampler.latents(plan=sampler.plan("ddim-inversion", 3))


def test_a_begun_plan_is_img2img(sampler, digits):
    mine = sampler.sample(init=digits, plan=sampler.plan("ddim", STEPS).begun(4), seed=3, labels=list(range(8)))
    truth = sampler.sample(init=digits, strength=0.6, steps=STEPS, seed=3, labels=list(range(8)))
    np.testing.assert_array_equal(mine, truth)


def test_a_stream_keeps_what_it_was_given(sampler, digits, lower):
    known = digits.copy()
    stream = sampler.stream(known=known, mask=lower, steps=3, labels=list(range(8)))
    known[:] = 0
    *_, last = stream
    np.testing.assert_array_equal(last[..., :4, :], digits[..., :4, :])


def test_numpys_false_stops_too(sampler):
    heard = []
    sampler.sample(2, steps=STEPS, labels=3, on_step=lambda done, total: heard.append(done) or np.bool_(False))
    assert heard == [1]


def test_a_closed_sampler_says_so(edited_bundle_path):
    opened = Sampler.open(edited_bundle_path, "onnxruntime", threads=1)
    opened.close()
    with pytest.raises(EpsrtError, match="the sampler of edited.epsrt is closed: open it again"):
        opened.sample(1, steps=2, labels=3, guidance=2.0)


def test_a_bundle_without_a_masked_graph_says_how_to_get_one(bundle_path):
    with (
        Sampler.open(bundle_path, "onnxruntime", threads=1) as opened,
        pytest.raises(BundleError, match=r"tiny.epsrt has no step graph with mask: export it again with --masked"),
    ):
        opened.sample(known=IMAGES, mask=MASK, steps=2)
