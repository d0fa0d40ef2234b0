"""What a rung is: its limit in both directions, what is not finite, and how a bound and a guided limit are told."""

from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from epsrt import Bundle
from epsrt.errors import NotFiniteError
from epsrt.manifest import Rung
from epsrt.parity.measure import Check, Found, worst
from epsrt.parity.records import Trajectory
from epsrt.parity.rungs import own_psnr, psnr_limit
from numpy_engine import NumpyEngine, bundle

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
    where = "t = 3" if figure is None else "t = 3 is not finite"
    assert rung == Rung("some", "some", "fp32", None, 2.0, "dB", where, at_least, ((3, 1.0),), "mask")
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


class TestMagnifiedRoundings:
    """A trajectory is allowed 20 log10(step limit / 2e-7) dB less than PyTorch's own, between plain limit and floor."""

    @staticmethod
    def limit(own, precision="fp32", device="cpu", w=None, **changes):
        engine = NumpyEngine(bundle(**changes))
        engine.precision, engine.device = precision, device
        images, empty = np.array([-3.0, 5.0], np.float32).reshape(2, 1, 1, 1), np.zeros(0)
        w, rms = (
            None if w is None else np.array([w], np.float32),
            None if own is None else np.array([2 / 10 ** (own / 20)]),
        )
        run = Trajectory(empty, empty, empty, empty, empty, images, w=w, rounding=rms)
        return psnr_limit(engine, run), own_psnr(engine.bundle.manifest, run)

    @pytest.mark.parametrize(
        ("own", "limit"), [(None, 100), (300, 100), (120.5, 100), (119, 99), (101, 81), (90, 70), (89, 70), (9, 70)]
    )
    def test_in_fp32(self, own, limit):
        assert self.limit(own)[0] == limit

    @pytest.mark.parametrize(
        ("device", "precision", "own", "limit"),
        [
            ("cpu", "fp16", 130, 55.0),
            ("cpu", "fp16", 125, 51.0),
            ("cpu", "fp16", 118, 45.0),
            ("cuda", "fp32", 130, 90.0),
            ("cuda", "fp32", 110, 76.0),
            ("cuda", "fp32", 90, 60.0),
            ("cuda", "fp16", 124, 40.5),
            ("cuda", "fp16", 90, 35.0),
            ("cpu", "bf16", 90, 42.0),
            ("cpu", "int8", 90, 25.0),
        ],
    )
    def test_elsewhere(self, device, precision, own, limit):
        assert self.limit(own, precision, device)[0] == limit

    def test_a_guided_one_has_its_own(self):
        assert self.limit(200, w=2.0)[0] == 90.5
        assert self.limit(105, w=2.0)[0] == 85
        assert self.limit(50, w=2.0)[0] == 60.5

    def test_its_peak_is_the_trajectorys(self):
        assert self.limit(100)[1] == pytest.approx(100)
        assert self.limit(None)[1] is None
        assert self.limit(100, clip=None)[1] == pytest.approx(100 + 20 * np.log10(8 / 2))  # −3 … 5

    @pytest.mark.parametrize("rms", [0.0, np.nan, np.inf])
    def test_no_record_lifts_a_limit_or_lowers_it_below_the_floor(self, rms):
        engine, empty = NumpyEngine(bundle()), np.zeros(0)
        run = Trajectory(empty, empty, empty, empty, empty, empty, rounding=np.array([rms]))
        assert 70 <= psnr_limit(engine, run) <= 100
