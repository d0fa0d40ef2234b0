"""What a request gives the network besides x and t: every role, guided and not, and what does not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from epsrt import InputError, LimitError, Limits, Request, Sampler
from epsrt.condition import Condition
from epsrt.engine import Sample, check_sample
from epsrt.manifest import Sizes, check_fields
from epsrt.prepare import prepare
from numpy_engine import NULL, NumpyEngine, bundle

CONTEXT = Condition("context", (3, 2), "float32", "context", guided=True)
STYLE = Condition("style", (4,), "float32", "vector", guided=True, null=0.0)
PAD = Condition("pad", (3,), "bool", "mask")
LOW = Condition("low", (1, 2, 4), "float32", "image")
COUNT = Condition("count", (), "int64", "scalar")
ALL = (CONTEXT, STYLE, PAD, LOW, COUNT)


def values(n: int, seed: int = 0, size: tuple[int, ...] = (2, 4)) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "context": rng.standard_normal((n, 3, 2)),
        "style": rng.standard_normal((n, 4)).astype(np.float32),
        "pad": rng.random((n, 3)) < 0.5,
        "low": rng.standard_normal((n, 1, *size)).astype(np.float32),
        "count": rng.integers(0, 9, n),
    }


def on(conditions: tuple[Condition, ...] = ALL, **changes: Any) -> NumpyEngine:
    return NumpyEngine(bundle(conditions=conditions, **changes))


def samples(n: int, engine: NumpyEngine | None = None, **asked: Any) -> Any:
    given = {"steps": 4, "seed": 3, "labels": [i % 4 for i in range(n)], "conditions": values(n), **asked}
    return Sampler(engine or on()).sample(n, **given)


def test_every_sample_has_its_own() -> None:
    """A sample is the same alone and in a batch, and another with any other condition."""
    whole, given = samples(3), values(3)
    for i in range(3):
        own = {name: a[i : i + 1] for name, a in given.items()}
        alone = samples(1, first=i, labels=[i % 4], conditions=own)
        np.testing.assert_array_equal(alone[0], whole[i])
        for name in own:
            other = {**own, name: 1 + own[name] if own[name].dtype != bool else ~own[name]}
            assert np.abs(samples(1, first=i, labels=[i % 4], conditions=other)[0] - whole[i]).max() > 1e-4, name


def test_one_for_all_with_and_without_its_axis() -> None:
    given = values(1)
    many = {name: np.repeat(a, 3, axis=0) for name, a in given.items()}
    for one in (given, {name: a[0] for name, a in given.items()}):
        np.testing.assert_array_equal(samples(3, conditions=one), samples(3, conditions=many))


def test_how_many_is_what_conditions_say() -> None:
    assert len(Sampler(on()).sample(steps=2, conditions=values(3))) == 3
    with pytest.raises(InputError, match="3 conditions context for 2 samples: give one each"):
        Sampler(on()).sample(2, steps=2, conditions=values(3))


class TestGuidance:
    def test_is_against_the_null_that_is_given(self) -> None:
        """u + w·(c − u) of two networks, one of which has the nulls: w = 0 draws what the nulls draw unguided."""
        negative = {"context": values(1, 5)["context"], "style": values(1, 6)["style"], "label": [2]}
        guided = samples(2, guidance=0.0, null_conditions=negative)
        given = {**values(2), **{name: np.repeat(negative[name], 2, 0) for name in ("context", "style")}}
        plain = samples(2, labels=[2, 2], guidance=1.0, conditions=given)
        np.testing.assert_allclose(guided, plain, atol=1e-6)

    def test_nulls_of_the_bundle_stand_where_none_are_given(self) -> None:
        none = {"context": np.zeros((1, 3, 2))}
        whole = {**none, "style": np.zeros((1, 4)), "label": [None]}
        one, other = (samples(2, guidance=3.0, null_conditions=given) for given in (none, whole))
        np.testing.assert_array_equal(one, other)
        assert np.abs(one - samples(2, guidance=1.0)).max() > 0.01

    def test_one_sample_may_have_another_negative_than_its_neighbour(self) -> None:
        negatives = {"context": values(2, 7)["context"]}
        both = samples(2, guidance=2.0, null_conditions=negatives)
        swapped = samples(2, guidance=2.0, null_conditions={"context": negatives["context"][::-1]})
        assert (np.abs(both - swapped).reshape(2, -1).max(1) > 1e-3).all()

    def test_without_a_null_there_is_nothing_to_weigh_against(self) -> None:
        with pytest.raises(
            InputError, match=r"'context' has no null of its own: give null_conditions=\{'context': …\}"
        ):
            samples(1, guidance=2.0)
        assert len(samples(1, guidance=1.0)) == 1

    def test_a_sample_that_is_told_nothing_is_not_guided(self) -> None:
        only = on((STYLE,), classes=0, null_label=None)
        made = prepare(only.bundle, Request(2, steps=3, guidance=4.0, conditions={"style": [[0.0] * 4, [1.0] * 4]}))
        assert made.own["w"].tolist() == [[1.0, 4.0]] * 3
        with pytest.raises(InputError, match="guidance weighs a label against none: give conditions that differ"):
            prepare(only.bundle, Request(2, steps=3, guidance=4.0))

    def test_a_label_alone_may_be_guided_away_from(self) -> None:
        plain = on(())
        one, other = (
            samples(1, plain, labels=[1], conditions=None, guidance=3.0, null_conditions=null)
            for null in (None, {"label": 3})
        )
        assert np.abs(one - other).max() > 0.01
        same = samples(1, plain, labels=[1], conditions=None, guidance=3.0, null_conditions={"label": [None]})
        np.testing.assert_array_equal(one, same)


def test_what_has_a_null_may_be_left_out() -> None:
    given = values(2)
    del given["style"]
    np.testing.assert_array_equal(
        samples(2, conditions=given), samples(2, conditions={**given, "style": np.zeros((1, 4))})
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": None}, r"toy.epsrt needs the condition 'context', float \[2, 3, 2\]: give conditions=\{'context'"),
        ({"pad": None}, r"toy.epsrt needs the condition 'pad', bool \[2, 3\]"),
        ({"contexts": 1.0}, "conditions has 'contexts', and that is no condition of toy.epsrt: did you mean context"),
        ({"label": [1, 2]}, "conditions has 'label': give labels=, one a sample"),
        ({"context": np.zeros((2, 3, 3))}, r"conditions\['context'\] is float64 \[2, 3, 3\], not float \[2, 3, 2\]"),
        ({"context": np.zeros((2, 3, 2), int)}, r"conditions\['context'\] is int64 \[2, 3, 2\], not float"),
        ({"count": [0.5, 1.0]}, r"conditions\['count'\] is float64 \[2\], not whole numbers \[2\]"),
        ({"pad": np.ones((2, 3))}, r"conditions\['pad'\] is float64 \[2, 3\], not bool \[2, 3\]"),
        ({"low": np.zeros((2, 1, 4, 8), np.float32)}, r"conditions\['low'\] is float32 \[2, 1, 4, 8\], not float"),
        ({"style": [[0.0, 1.0, np.nan, 0.0]]}, r"conditions\['style'\] holds NaN or infinity"),
        ({"style": [[1e300, 0.0, 0.0, 0.0]]}, r"conditions\['style'\] holds numbers that no float32 holds: scale it"),
        ({"style": [[1.0], [1.0, 2.0]]}, r"conditions\['style'\] is no array .*: give rows of one length"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    given = {name: a for name, a in {**values(2), **changes}.items() if a is not None}
    with pytest.raises(InputError, match=message):
        samples(2, conditions=given)


@pytest.mark.parametrize(
    ("null", "message"),
    [
        ({"pad": [True] * 3}, "null_conditions has 'pad', and toy.epsrt is not guided by it: leave it out"),
        ({"tone": 1}, "null_conditions has 'tone', and that is no condition of toy.epsrt: .*use one of label, context"),
        ({"label": [1, 2, 3]}, "3 null_conditions label for 2 samples: give one each"),
        ({"label": [7]}, "label 7 is outside 0 … 3, the classes of toy.epsrt"),
        ({"style": np.zeros((1, 3))}, r"null_conditions\['style'\] is float64 \[1, 3\], not float \[2, 4\]"),
    ],
)
def test_a_null_that_does_not_fit_is_refused(null: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        samples(2, guidance=2.0, null_conditions=null)


def test_a_bundle_that_takes_none_says_so() -> None:
    plain = on((), classes=0, null_label=None)
    with pytest.raises(
        InputError, match="'context', and that is no condition of toy.epsrt, which takes none: leave it"
    ):
        samples(2, plain, labels=None)
    with pytest.raises(InputError, match="conditions is a list, not a dict of arrays by the conditions' names"):
        samples(2, plain, labels=None, conditions=[1.0])


def test_an_older_bundles_graphs_hold_their_null_label() -> None:
    with pytest.raises(InputError, match="toy.epsrt was exported by an older epsrt, whose graphs hold the null label"):
        samples(1, on((), format=5), conditions=None, guidance=2.0, null_conditions={"label": 1})


def test_an_image_has_the_extents_of_its_sample() -> None:
    sized = on((LOW,), sizes=Sizes(2, 8))
    given = np.random.default_rng(1).standard_normal((1, 1, 4, 6)).astype(np.float32)
    assert samples(1, sized, size=(4, 6), conditions={"low": given}).shape == (1, 1, 4, 6)
    with pytest.raises(InputError, match=r"conditions\['low'\] is float32 \[1, 1, 4, 6\], not float \[1, 1, 2, 4\]"):
        samples(1, sized, conditions={"low": given})


@pytest.mark.parametrize("shape", [(2, 16), (1, 2, 3, 4)])
def test_samples_of_any_rank(shape: tuple[int, ...]) -> None:
    """Audio and volumes: drawn, inverted, kept where a mask is, at other sizes, with images beside them."""
    low = Condition("low", (1, *shape[1:]), "float32", "image")
    sampler = Sampler(on((low,), shape=shape, sizes=Sizes(1, 32)))
    given = {"low": np.ones((1, *shape[1:]))}
    drawn = sampler.sample(2, steps=5, seed=1, labels=1, guidance=2.0, conditions=given)
    assert drawn.shape == (2, *shape)
    mask = np.zeros(shape[1:], bool)
    mask[..., ::2] = True
    kept = sampler.sample(2, steps=5, seed=2, labels=1, known=drawn, mask=mask, conditions=given)
    np.testing.assert_array_equal(kept[..., ::2], drawn[..., ::2])
    assert (kept[..., 1::2] != drawn[..., 1::2]).any()
    latents = sampler.invert(np.clip(drawn, -1, 1), steps=5, labels=1, conditions=given)
    back = sampler.sample(2, x=latents, method="ddim", steps=5, labels=1, guidance=1.0, conditions=given)
    assert back.shape == drawn.shape
    larger = tuple(2 * n for n in shape[1:])
    wide = {"low": np.ones((1, *larger))}
    assert sampler.sample(1, steps=2, size=larger, labels=0, conditions=wide).shape == (1, shape[0], *larger)
    axes = {1: "length", 3: "depth, height, width"}[len(larger)]
    with pytest.raises(InputError, match=rf"size = \(3, 3\) is not \({axes}\), .*whole number.* of pixels"):
        sampler.sample(1, steps=2, size=(3, 3), labels=0, conditions=given)


def test_an_axis_may_be_fixed_while_others_are_free() -> None:
    sampler = Sampler(on((), shape=(1, 2, 4), sizes=Sizes((2, 2), (2, 8))))
    assert sampler.sample(1, steps=2, labels=0, size=(2, 6)).shape == (1, 1, 2, 6)
    with pytest.raises(InputError, match="4 × 4 is none of toy.epsrt: height is 2, width is a multiple of 2 up to 8"):
        sampler.sample(1, steps=2, labels=0, size=(4, 4))


def test_limits_count_them() -> None:
    large = Condition("large", (1 << 16,), "float32", "vector")
    sampler = Sampler(on((large,)), limits=Limits(bytes=1 << 20))
    with pytest.raises(LimitError, match="n = 8 samples at once take .* bytes, over bytes = 1048576"):
        sampler.sample(8, steps=2, labels=0, conditions={"large": np.zeros((8, 1 << 16), np.float32)})
    sampler.sample(1, steps=2, labels=0, batch=1, conditions={"large": np.zeros((1, 1 << 16), np.float32)})


def test_a_lanes_sample_is_checked_too() -> None:
    engine = on()
    m, graph = engine.bundle.manifest, engine.graph
    with pytest.raises(InputError, match="takes no condition 'contxt': did you mean context"):
        check_sample(Sample(conditions={"contxt": 1}), m.shape, graph, m)
    with pytest.raises(InputError, match=r"condition style has shape \[3\], the network wants \[4\]"):
        check_sample(Sample(conditions={"style": np.zeros(3)}), m.shape, graph, m)


def test_a_lane_without_them_has_their_nulls_or_zeros() -> None:
    engine = on()
    inputs = Sample().inputs(engine.bundle.manifest, engine.bundle.graph("fp32", ("guidance",)), (1, 2, 4))
    assert {name: a.shape for name, a in inputs.items()} == {
        "label": (), "context": (3, 2), "style": (4,), "pad": (3,), "low": (1, 2, 4), "count": (),
        "label_null": (), "context_null": (3, 2), "style_null": (4,),
    }  # fmt: skip
    assert inputs["label"] == inputs["label_null"] == NULL


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (Condition("mask", (3,), "bool", "mask"), "is a name that step graphs have for something else"),
        (Condition("a b", (4,), "float32", "vector"), "is no name of an input: give an identifier"),
        (Condition("style_null", (4,), "float32", "vector"), "is no name of an input: .* does not end in _null"),
        (Condition("class", (4,), "float32", "vector"), "is no name of an input"),
        (Condition("v", (4, 2), "float32", "vector"), r"has shape \[4, 2\], and the role vector has 1 axes"),
        (
            Condition("v", (0,), "float32", "vector"),
            r"has shape \[0\], and the role vector has 1 axes, each at least 1",
        ),
        (
            Condition("c", (1 << 20, 1 << 10), "float32", "context"),
            r"has \[1048576, 1024\] elements a sample, over 67108864",
        ),
        (
            Condition("low", (1, 4, 4), "float32", "image"),
            r"has shape \[1, 4, 4\], and an image has the samples' own extents, \[2, 4\]",
        ),
        (Condition("v", (4,), "int64", "vector"), "is int64, and the role vector is float32"),
        (Condition("pad", (4,), "float32", "mask"), "is float32, and the role mask is bool"),
        (Condition("n", (), "bool", "scalar"), "is bool, and the role scalar is no bool"),
        (Condition("v", (4,), "float32", "vector", null=0.0), "has a null, and is not guided"),
        (Condition("n", (), "int64", "scalar", guided=True, null=0.5), "has the null 0.5, which is no int64"),
        (Condition("n", (), "int64", "scalar", guided=True, null=10**30), "has the null 10{30}, which is no int64"),
        (Condition("v", (3,), "float32", "vector", guided=True, null=10**400), "has the null 10{400}, which is no fl"),
    ],
)
def test_a_manifest_with_a_condition_that_is_none(condition: Condition, message: str, tmp_path: Any) -> None:
    from epsrt import BundleError

    m = bundle(conditions=(condition,), files={}).manifest
    with pytest.raises(BundleError, match=rf"condition '{condition.name}' {message}"):
        check_fields(tmp_path, m)


def test_two_conditions_of_one_name(tmp_path: Any) -> None:
    from epsrt import BundleError

    with pytest.raises(BundleError, match="conditions label, style, style are not told apart"):
        check_fields(tmp_path, bundle(conditions=(STYLE, STYLE)).manifest)
