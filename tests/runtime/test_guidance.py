"""Guidance: classifier-free and by a classifier. (tests/parity holds it to PyTorch.)"""

from __future__ import annotations

import numpy as np
import pytest

from epsrt import Bundle, EpsrtError, InputError, Plan, Request, Sampler

STEPS = 8


@pytest.fixture(scope="module")
def sampler(edited_bundle_path):
    with Sampler.open(edited_bundle_path, "onnxruntime", threads=1) as opened:
        yield opened


class TestClassifierFree:
    def test_one_is_the_plain_graph_and_zero_the_unconditional_network(self, sampler):
        labels = [1, 2, 3, 4]
        plain = sampler.sample(seed=6, steps=STEPS, labels=labels)
        mixed = sampler.sample(seed=6, steps=STEPS, labels=labels, guidance=[1.0, 0.0, 1.0, 3.0])
        without = sampler.sample(4, seed=6, steps=STEPS)
        for i in (0, 2):
            np.testing.assert_allclose(mixed[i], plain[i], rtol=0, atol=1e-5)
        np.testing.assert_allclose(mixed[1], without[1], rtol=0, atol=1e-5)
        assert np.abs(mixed[3] - plain[3]).max() > 0.1
        assert np.abs(plain[1] - without[1]).max() > 0.1

    def test_batches_and_streams_do_not_matter(self, sampler):
        options = {"seed": 9, "steps": STEPS, "labels": [1, 2, 3, 4, 5], "guidance": [1.0, 2.0, 3.0, 4.0, 0.0]}
        whole = sampler.sample(**options)
        np.testing.assert_allclose(sampler.sample(batch=2, **options), whole, rtol=0, atol=1e-5)
        *_, last = sampler.stream(every=3, batch=2, **options)
        np.testing.assert_allclose(last, whole, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("method", ["ddpm", "heun", "dpmpp-2m"])
    def test_every_method_is_guided(self, sampler, method):
        options = {"seed": 3, "steps": STEPS, "labels": [1, 2], "method": method}
        plain, guided = sampler.sample(**options), sampler.sample(guidance=[1.0, 3.0], **options)
        np.testing.assert_allclose(guided[0], plain[0], rtol=0, atol=1e-5)
        assert np.abs(guided[1] - plain[1]).max() > 0.1

    def test_the_owners_weight_is_the_default(self, sampler, monkeypatch):
        import msgspec

        manifest = sampler.bundle.manifest
        owners = msgspec.structs.replace(manifest.sampling, guidance=2.0)
        guided = sampler.sample(seed=1, steps=STEPS, labels=[1, 2], guidance=2.0)
        bundle = Bundle(sampler.bundle.path, msgspec.structs.replace(manifest, sampling=owners))
        monkeypatch.setattr(sampler, "bundle", bundle)
        np.testing.assert_array_equal(sampler.sample(seed=1, steps=STEPS, labels=[1, 2]), guided)
        null, none = sampler.sample(2, seed=1, steps=STEPS, labels=[None, None]), sampler.sample(2, seed=1, steps=STEPS)
        np.testing.assert_array_equal(null, none)  # of the null label there is nothing to weigh


class TestClassifier:
    def test_labels_are_its_targets_unless_told(self, sampler):
        both = sampler.sample(seed=5, steps=STEPS, labels=[3, 4], classifier=4.0)
        np.testing.assert_array_equal(
            sampler.sample(seed=5, steps=STEPS, labels=[3, 4], classifier=4.0, targets=[3, 4]), both
        )
        alone = sampler.sample(seed=5, steps=STEPS, classifier=4.0, targets=[3, 4])
        assert np.abs(alone - both).max() > 0.05

    @pytest.mark.parametrize("prediction", ["x0", "v", "score", "edm", "velocity"])
    def test_column_j_moves_every_prediction_as_epsilon(self, prediction):
        """ε̂ = ε − σ·g, said in each prediction's own output: x0 and ε that are read from it move alike."""
        from epsrt import Schedule
        from epsrt.noise_levels import visit

        schedule = Schedule(T=100, beta_start=1e-3, beta_end=0.2)
        at = visit(schedule, [90, 40, 3], prediction=prediction, sigma_data=0.4)
        columns, input_scale = at.columns(), 1.0
        if prediction == "edm":  # the gradient is of in_scale·x
            input_scale = columns["in_scale"]
        moved = columns["j"] / input_scale
        np.testing.assert_allclose(at.epsilon.q * moved, -at.sigma, rtol=1e-12)
        np.testing.assert_allclose(columns["q"] * moved, at.sigma**2 / at.alpha, rtol=1e-12)


BAD = [
    ({"guidance": 2.0}, "guidance weighs a label against none: give labels"),
    ({"guidance": "strong", "labels": 1}, "guidance = 'strong' is not a number within ±1e\\+06, or one a sample"),
    ({"guidance": float("nan"), "labels": 1}, "guidance = nan is not a number within"),
    ({"guidance": [1.0, 2.0, 3.0], "labels": 1}, "3 guidance for 2 samples: give one each"),
    ({"guidance": 2.0, "labels": [1, 2, 3]}, "3 labels for 2 samples: give one each"),
    ({"guidance": 2.0, "labels": 1, "guidance_rescale": 1.5}, r"guidance_rescale = 1.5 is outside \[0, 1\]"),
    ({"labels": 1, "guidance_rescale": 0.5}, "guidance_rescale is for guided samples: give guidance"),
    ({"labels": 1, "guidance_interval": (10, 50)}, "guidance_interval is for guided samples: give guidance"),
    ({"guidance": 2.0, "labels": 1, "guidance_interval": (50, 10)}, r"\(50, 10\) is not \(low, high\)"),
    ({"guidance": 2.0, "labels": 1, "guidance_interval": 7}, r"guidance_interval = 7 is not \(low, high\)"),
    ({"guidance": 2.0, "labels": 1, "guidance_interval": (101, 900)}, "holds none of the plan's timesteps, 11 … 99"),
    ({"classifier": 2.0}, "a classifier guides to a class: give targets, or labels"),
    ({"classifier": 2.0, "targets": [1, 2, 3]}, "3 targets for 2 samples: give one each"),
    ({"classifier": 2.0, "targets": 10}, "target 10 is outside 0 … 9, the classes of edited.epsrt"),
    ({"targets": 1}, "targets are what the classifier guides to: give its weight"),
    ({"classifier": float("inf"), "targets": 1}, "classifier = inf is not a number within"),
    (
        {"classifier": 2.0, "guidance": 2.0, "labels": 1},
        "no step graph with guidance and classifier at once: leave one",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_what_does_not_fit_is_refused(sampler, arguments, message):
    for function in (sampler.sample, sampler.stream):
        with pytest.raises(EpsrtError, match=message):
            function(2, steps=STEPS, **arguments)


def test_a_plan_without_levels_takes_no_classifier(sampler):
    plan = Plan.of("bare", t=5.0, a=1.0, h=-0.1)
    with pytest.raises(EpsrtError, match="plan 'bare' has no column j, what a classifier's gradient adds"):
        sampler.sample(1, plan=plan, labels=1, classifier=1.0)


def test_bundles_without_a_null_label_or_a_classifier_say_so(plain_bundle_path, bundle_path):
    with Sampler.open(plain_bundle_path, "onnxruntime", threads=1) as plain:
        with pytest.raises(InputError, match="label 1 was given, but plain.epsrt is unconditional"):
            plain.sample(1, steps=2, labels=1, guidance=2.0)
        with pytest.raises(InputError, match=r"plain.epsrt has no classifier: export it again with --classifier"):
            plain.sample(1, steps=2, targets=1, classifier=2.0)
    with (
        Sampler.open(bundle_path, "onnxruntime", threads=1) as without,
        pytest.raises(InputError, match=r"tiny.epsrt has no classifier: export it again with --classifier"),
    ):
        without.sample(1, steps=2, labels=1, classifier=2.0)


def test_samples_without_a_label_are_not_guided(sampler):
    """Of the null label there is nothing to weigh, nor is DDIM's ε another."""
    options = {"seed": 1, "steps": STEPS}
    mixed = sampler.sample(labels=[3, None, None], guidance=4.0, **options)
    plain = sampler.sample(3, **options)
    np.testing.assert_allclose(mixed[1:], plain[1:], rtol=0, atol=1e-5)
    assert np.abs(mixed[0] - plain[0]).max() > 0.1
    with pytest.raises(EpsrtError, match="guidance weighs a label against none: give labels"):
        sampler.sample(labels=[None, None], guidance=4.0, **options)


def test_what_is_one_a_sample_may_be_any_list(sampler):
    options = {"seed": 2, "steps": STEPS}
    truth = sampler.sample(labels=[3, 4], guidance=[1.5, 2.0], guidance_rescale=[0.0, 0.5], **options)
    for labels, weights, rescale in (
        (np.array([3, 4]), np.array([1.5, 2.0]), np.array([0.0, 0.5])),
        ((3, 4), (w for w in (1.5, 2.0)), (0.0, 0.5)),
    ):
        mine = sampler.sample(labels=labels, guidance=weights, guidance_rescale=rescale, **options)
        np.testing.assert_array_equal(mine, truth)
    one = sampler.sample(2, labels=[3], guidance=[2.0], **options)
    np.testing.assert_array_equal(one, sampler.sample(2, labels=np.array(3), guidance=2.0, **options))
    with pytest.raises(EpsrtError, match="3 guidance_rescale for 2 samples"):
        sampler.sample(labels=[3, 4], guidance=2.0, guidance_rescale=[0.1, 0.2, 0.3], **options)


def test_one_weight_for_all_takes_the_memory_of_one(sampler):
    from epsrt.prepare import prepare

    request = Request(5000, steps=100, labels=3, guidance=2.0)
    own = prepare(sampler.bundle, request).own
    assert set(own) >= {"w", "phi"}
    assert all(values.strides[1] == 0 and values.shape == (100, 5000) for values in own.values())


@pytest.mark.parametrize("weight", ["2", b"2", True, 2 + 1j, 10**400, [[1.0], [2.0, 3.0]]])
def test_weights_that_are_no_numbers(sampler, weight):
    for name in ("guidance", "classifier", "guidance_rescale"):
        with pytest.raises(EpsrtError, match=name):
            sampler.sample(2, steps=STEPS, labels=1, **{"guidance": 2.0, name: weight})


def test_only_guided_samples_cost_a_second_plan(sampler, monkeypatch):
    made, make = [], Bundle.plan
    monkeypatch.setattr(Bundle, "plan", lambda *args, **more: made.append(more) or make(*args, **more))
    for guidance, count in ((None, 1), ([1.0, 0.5], 1), ([1.0, 2.0], 2)):
        made.clear()
        sampler.sample(labels=[3, 4], guidance=guidance, steps=2)
        assert len(made) == count
