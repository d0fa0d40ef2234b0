"""What a rung is: its limit in both directions, what is not finite, and how a bound and a guided limit are told."""

from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from epsrt import Bundle
from epsrt.errors import NotFiniteError
from epsrt.manifest import Rung
from epsrt.parity.golden import Trajectory
from epsrt.parity.measure import Check, Found, worst
from epsrt.parity.rungs import psnr_limit

ENGINE = SimpleNamespace(name="some", precision="fp32", device="cpu", graph=SimpleNamespace(stem="mask"))


@pytest.mark.parametrize(
    ("figure", "at_least", "passed"),
    [(2.0, False, True), (2.0, True, True), (2.1, False, False), (2.1, True, True), (1.9, True, False)],
)
def test_a_figure_at_its_limit_passes(figure, at_least, passed):
    assert Rung("some", "numpy", "fp64", figure, 2.0, "dB", at_least=at_least).passed == passed


@pytest.mark.parametrize("at_least", [False, True])
@pytest.mark.parametrize("figure", [None, float("nan"), float("inf")])
def test_what_is_not_finite_is_a_miss(figure, at_least):
    rung = Check("some", lambda: Found(figure, "t = 3", ((3, 1.0),)), 2.0, "dB", at_least).run(ENGINE)
    wanted = Rung("some", "some", "fp32", None, 2.0, "dB", "t = 3", at_least, ((3, 1.0),), "mask")
    assert rung == wanted
    assert not rung.passed


def test_a_lane_that_is_not_finite_keeps_its_sentence_unit_and_limit():
    def measure():
        raise NotFiniteError("lane 1 is not finite")

    rung = Check("ddim-50", measure, 100.0, "dB", at_least=True).run(ENGINE)
    assert rung == Rung("ddim-50", "some", "fp32", None, 100.0, "dB", "lane 1 is not finite", True, (), "mask")


def test_the_worst_is_the_largest_and_a_nan_before_all():
    assert worst([1.0, 3.0, 2.0], ["a", "b", "c"]) == Found(3.0, "b")
    assert worst([1.0, float("nan"), 2.0], ["a", "b", "c"]).where == "b"


@pytest.mark.parametrize(
    ("value_range", "clip", "bound"),
    [((-2.0, 1.0), None, 2.0), ((-1.0, 3.0), None, 3.0), ((0.0, 1.0), None, 1.0), ((-2.0, 1.0), 0.5, 0.5)],
)
def test_the_bound_is_the_clip_or_the_largest_value(small_bundle_path, value_range, clip, bound):
    manifest = Bundle.open(small_bundle_path).manifest
    assert msgspec.structs.replace(manifest, value_range=value_range, clip=clip).bound == bound


@pytest.mark.parametrize(("w", "limit"), [(None, 100.0), (2.0, 90.5), (1.0, 100.0), (-1.0, 90.5), (0.0, 100.0)])
def test_a_guided_trajectory_is_allowed_what_guidance_magnifies(w, limit):
    """20 log10(|w| + |1 − w|) dB less."""
    w = None if w is None else np.array([w], np.float32)
    empty = np.zeros(0)
    assert psnr_limit(ENGINE, Trajectory(empty, empty, empty, empty, empty, empty, w=w)) == limit
