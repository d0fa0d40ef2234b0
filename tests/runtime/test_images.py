"""epsrt.images: what callers give, checked and broadcast, and pictures there and back."""

from __future__ import annotations

import numpy as np
import pytest

from epsrt import InputError, from_images, to_images
from epsrt.images import array_of, images_of, mask_of

SHAPE = (2, 3, 4)


def images(count, fill=0.0):
    return np.full((count, *SHAPE), fill)


class TestImages:
    def test_one_serves_all_and_all_are_float32_copies(self):
        given = np.random.default_rng(0).uniform(-1, 1, (3, *SHAPE))
        found = images_of("init", given, 3, SHAPE, (-1, 1))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, given.astype(np.float32))
        given[:] = 9
        assert np.abs(found).max() <= 1
        one = images_of("init", np.asfortranarray(images(1, 0.5)), 3, SHAPE, (-1, 1))
        assert one.shape == (3, *SHAPE)
        assert (one == 0.5).all()
        assert images_of("init", None, 3, SHAPE, (-1, 1)) is None

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (images(2), r"x is float64 \[2, 2, 3, 4\], not float \[3, 2, 3, 4\]"),
            (images(0), r"x is float64 \[0, 2, 3, 4\]"),
            (images(3)[:, 0], r"x is float64 \[3, 3, 4\]"),
            (images(3)[:, :1], r"x is float64 \[3, 1, 3, 4\]"),
            (images(3).astype(int), "x is int64"),
            (images(3).astype(bool), "x is bool"),
        ],
    )
    def test_other_shapes_and_dtypes(self, given, message):
        with pytest.raises(InputError, match=message):
            images_of("x", given, 3, SHAPE, None)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
    def test_the_image_that_is_not_finite_is_named(self, value):
        for place in ((2, 0, 0, 0), (2, 1, 2, 3)):
            given = images(3)
            given[place] = value
            with pytest.raises(InputError, match="known image 2 holds NaN or infinity"):
                images_of("known", given, 3, SHAPE, None)

    def test_a_tenth_of_the_range_is_slack(self):
        for value in (-0.2, 2.2):  # of the range 0 … 2, in numbers that float32 has about
            assert images_of("known", images(1, value * 0.9999), 3, SHAPE, (0.0, 2.0)) is not None
            spoilt = images(3)
            spoilt[1, 0, 0, 0] = value + (0.01 if value > 0 else -0.01)
            with pytest.raises(InputError, match=r"known holds values from .*, and the bundle's images 0 to 2: scale"):
                images_of("known", spoilt, 3, SHAPE, (0.0, 2.0))
            assert images_of("known", spoilt, 3, SHAPE, None) is not None
        edge = images(1, -1.0)  # of the range 0 … 10: the slack's end itself
        assert images_of("known", edge, 1, SHAPE, (0.0, 10.0)) is not None
        assert images_of("known", images(1, 11.0), 1, SHAPE, (0.0, 10.0)) is not None

    def test_lists(self):
        assert array_of("x", [[1.0, 2.0]]).shape == (1, 2)
        with pytest.raises(InputError, match="x is no array .*: give rows of one length"):
            array_of("x", [[1.0], [1.0, 2.0]])


class TestMasks:
    @pytest.mark.parametrize("shape", [(3, 4), (1, 1, 3, 4), (5, 1, 3, 4), (1, 2, 3, 4), (5, 2, 3, 4)])
    @pytest.mark.parametrize("dtype", [bool, np.float32, np.float64])
    def test_shapes_that_fit(self, shape, dtype):
        given = (np.arange(np.prod(shape)).reshape(shape) % 2).astype(dtype)
        found = mask_of(given, 5, SHAPE)
        assert (found.shape, found.dtype) == ((5, *SHAPE), np.float32)
        np.testing.assert_array_equal(found, np.broadcast_to(given.astype(np.float32), (5, *SHAPE)))
        assert mask_of(None, 5, SHAPE) is None

    @pytest.mark.parametrize("shape", [(4, 3), (4,), (2, 3, 4), (2, 1, 3, 4), (0, 1, 3, 4), (5, 3, 3, 4), (5, 1, 4, 3)])
    def test_shapes_that_do_not(self, shape):
        with pytest.raises(InputError, match=r"mask is float64 .*, not bool or float \[5, 1, 3, 4\] or \[3, 4\]"):
            mask_of(np.ones(shape), 5, SHAPE)

    def test_integers_are_told_of_bool(self):
        with pytest.raises(InputError, match=r"mask is int64 .*of 0 and 1: mask.astype\(bool\)"):
            mask_of(np.ones((3, 4), int), 5, SHAPE)

    @pytest.mark.parametrize(("value", "kind"), [(-0.01, "values from -0.01 to 0"), (1.01, "values from 0 to 1.01")])
    def test_values_outside(self, value, kind):
        given = np.zeros((3, 4))
        assert mask_of(given + 0.5, 5, SHAPE).max() == 0.5
        given[1, 2] = value
        with pytest.raises(InputError, match=f"mask holds {kind}: it is 1 where known is kept"):
            mask_of(given, 5, SHAPE)
        given[1, 2] = np.nan
        with pytest.raises(InputError, match="mask holds NaN: it is 1 where known is kept"):
            mask_of(given, 5, SHAPE)


class TestPictures:
    @pytest.mark.parametrize("value_range", [(-1.0, 1.0), (0.0, 1.0), (-3.0, 5.0)])
    def test_there_and_back(self, value_range):
        pictures = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
        low, high = value_range
        floats = from_images(pictures, value_range)
        assert (floats.dtype, floats.shape, floats.flags.c_contiguous) == (np.float32, (2, 3, 3, 4), True)
        wanted = pictures.transpose(0, 3, 1, 2) / 255.0 * (high - low) + low
        np.testing.assert_allclose(floats, wanted, rtol=0, atol=1e-6)
        again = to_images(floats, value_range)
        assert again.flags.c_contiguous
        np.testing.assert_array_equal(again, pictures)

    def test_the_range_is_minus_one_to_one_unless_told(self):
        pictures = np.array([0, 255], np.uint8).reshape(1, 1, 2, 1)
        assert from_images(pictures).ravel().tolist() == [-1, 1]
        assert to_images(np.array([-1, 1], np.float32).reshape(1, 1, 1, 2)).ravel().tolist() == [0, 255]
        assert to_images(np.array([-9, 0.0, 9]).reshape(1, 1, 1, 3)).ravel().tolist() == [0, 128, 255]

    @pytest.mark.parametrize("given", [np.zeros((1, 2, 2, 1)), np.zeros((2, 2, 1), "u1"), np.zeros((1, 2), "u1")])
    def test_what_is_no_picture(self, given):
        with pytest.raises(InputError, match=r"from_images takes uint8 \[n, H, W, C\], not"):
            from_images(given)
        with pytest.raises(InputError, match=r"to_images takes \[n, C, H, W\], not"):
            to_images(given[0])
