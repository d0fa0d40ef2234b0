"""A sampler of a bundle of latents: pictures in, pictures out, and latents between."""

import shutil
import threading

import numpy as np
import pytest

from epsrt import Bundle, BundleError, Cancelled, InputError, LimitError, Limits, Sampler, noise, open_engine
from epsrt.autoencoding import Tiles, are_pictures
from helpers import forge

STEPS = 6


@pytest.fixture(scope="module")
def bundle(latent_bundle_path):
    return Bundle.open(latent_bundle_path)


@pytest.fixture(scope="module")
def engine(bundle):
    with open_engine(bundle, "onnxruntime", threads=1) as engine:
        yield engine


@pytest.fixture
def sampler(engine):
    with Sampler(engine) as sampler:
        yield sampler


@pytest.fixture(scope="module")
def no_parts(latent_bundle_path, tmp_path_factory):
    """Latents alone."""
    path = shutil.copytree(latent_bundle_path, tmp_path_factory.mktemp("bare") / "bare.epsrt")
    for part in ("encode", "decode", "preview"):
        for file in path.glob(f"{part}-*"):
            file.unlink()
    forge(path, lambda manifest: [manifest.pop(key) for key in ("parts", "latent")])
    with open_engine(Bundle.open(path), "onnxruntime", threads=1) as engine, Sampler(engine) as sampler:
        yield sampler


def pictures(n=2, extents=(16, 16)):
    return np.random.default_rng(1).uniform(-1, 1, (n, 3, *extents)).astype(np.float32)


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


class TestCoding:
    def test_the_mean_is_the_encoders(self, sampler, engine):
        images = pictures(6)  # more than a batch
        found = sampler.encode(images)
        assert (found.shape, found.dtype) == ((6, 4, 8, 8), np.float32)
        close(found[:4], engine.part("encode").run(image=images[:4])["mean"])
        close(sampler.encode(images.astype(np.float64)), found, 1e-6)

    def test_latents_are_drawn_from_noise_stream_4(self, sampler, engine):
        images = pictures(2)
        moments = engine.part("encode").run(image=images)
        z = noise.normals(7, np.array([5, 6]), 4, 0, 256).reshape(2, 4, 8, 8)
        close(sampler.encode(images, seed=7, first=5), moments["mean"] + moments["deviation"] * z)
        assert moments["deviation"].min() > 0

    def test_decoded_as_the_part_does(self, sampler, engine):
        x = sampler.latents(5, seed=1)
        found = sampler.decode(x)
        assert found.shape == (5, 3, 16, 16)
        close(found[:4], engine.part("decode").run(x=x[:4])["image"])
        assert sampler.preview(x).shape == found.shape

    def test_images_are_of_the_pictures_range(self, sampler):
        images = sampler.from_images(np.full((1, 16, 16, 3), 255, np.uint8))
        assert images.max() == 1.0
        assert sampler.to_images(images).min() == 255


class TestSample:
    def test_pictures_by_default_and_latents_where_asked(self, sampler):
        latents = sampler.sample(3, steps=STEPS, seed=2, decode=False)
        assert latents.shape == (3, 4, 8, 8)
        made = sampler.sample(3, steps=STEPS, seed=2)
        assert made.shape == (3, 3, 16, 16)
        close(made, sampler.decode(latents))
        np.testing.assert_array_equal(made, sampler.sample(3, steps=STEPS, seed=2, decode=True))
        close(sampler.sample(3, steps=STEPS, seed=2, batch=2), made)
        assert sampler.to_images(made).shape == (3, 16, 16, 3)

    def test_other_sizes(self, sampler):
        assert sampler.sample(1, steps=STEPS, size=(4, 12)).shape == (1, 3, 8, 24)
        init = pictures(1, (24, 8))
        assert sampler.sample(steps=STEPS, init=init, strength=0.5, decode=False).shape == (1, 4, 12, 4)

    def test_pictures_to_begin_from_are_encoded(self, sampler):
        init = pictures(2)
        made = sampler.sample(steps=STEPS, init=init, strength=0.5, seed=4, decode=False)
        close(made, sampler.sample(steps=STEPS, init=sampler.encode(init), strength=0.5, seed=4, decode=False))
        drawn = sampler.sample(steps=STEPS, init=sampler.encode(init, seed=1), strength=0.5, seed=4, decode=False)
        assert np.abs(drawn - made).max() > 0.1

    def test_x_are_latents(self, sampler):
        x = sampler.latents(2, seed=9)
        close(sampler.sample(x=x, steps=STEPS, clip=4.0), sampler.sample(2, seed=9, steps=STEPS))

    @pytest.mark.parametrize("n", [1, 3])
    def test_known_pixels_come_back_exactly(self, sampler, n):
        known, mask = pictures(1), np.zeros((16, 16), bool)
        mask[:, :7] = True  # a latent's pixel lies on the edge
        made = sampler.sample(n, steps=STEPS, known=known, mask=mask, seed=3)
        np.testing.assert_array_equal(made[..., :7], np.broadcast_to(known, (n, 3, 16, 16))[..., :7])
        assert np.abs(made[..., 7:] - known[..., 7:]).min() > 0
        small = np.zeros((8, 8), np.float32)
        small[:, :3], small[:, 3] = 1, 0.5  # averaged down
        latents = sampler.sample(n, steps=STEPS, known=sampler.encode(known), mask=small, seed=3, decode=False)
        close(sampler.decode(latents)[..., 7:], made[..., 7:])
        close(latents, sampler.sample(n, steps=STEPS, known=known, mask=mask, seed=3, decode=False))

    def test_a_soft_mask_keeps_its_share(self, sampler):
        known, mask = pictures(2), np.full((2, 1, 16, 16), 0.25, np.float32)
        made = sampler.sample(steps=STEPS, known=known, mask=mask, seed=3)
        latents = sampler.sample(steps=STEPS, known=known, mask=mask, seed=3, decode=False)
        close(made, 0.25 * known + 0.75 * sampler.decode(latents))

    def test_inversion_and_streams_are_of_latents(self, sampler):
        x = sampler.invert(pictures(1), steps=STEPS, clip=None)
        assert x.shape == (1, 4, 8, 8)
        assert sampler.sample(x=x, steps=STEPS).shape == (1, 3, 16, 16)
        frames = list(sampler.stream(1, steps=STEPS, seed=2, every=2))
        assert {frame.shape for frame in frames} == {(1, 4, 8, 8)}
        close(sampler.decode(frames[-1]), sampler.sample(1, steps=STEPS, seed=2))
        assert sampler.preview(frames[0]).shape == (1, 3, 16, 16)

    def test_what_is_stopped_early_is_decoded(self, sampler):
        assert sampler.sample(2, steps=STEPS, on_step=lambda done, total: False).shape == (2, 3, 16, 16)

    def test_a_flag_stops_before_the_decoder(self, sampler):
        flag = threading.Event()

        def last(done, total):
            if done == total:
                flag.set()

        with pytest.raises(Cancelled, match="after 6 of 6 steps"):
            sampler.sample(1, steps=STEPS, on_step=last, cancel=flag)

    def test_pictures_count_within_limits(self, engine):
        with Sampler(engine, limits=Limits(bytes=60_000)) as small:
            assert small.sample(4, steps=STEPS, decode=False).shape == (4, 4, 8, 8)
            with pytest.raises(LimitError, match="over bytes = 60000"):
                small.sample(4, steps=STEPS)
        with Sampler(engine, limits=Limits(samples=2)) as few, pytest.raises(LimitError, match="n = 3 is over samples"):
            few.sample(steps=STEPS, init=pictures(3), strength=0.5)


class TestTiles:
    def test_one_tile_is_the_whole(self, sampler):
        x = sampler.latents(2, size=(8, 12))
        np.testing.assert_array_equal(sampler.decode(x, tile=16, overlap=0), sampler.decode(x))

    @pytest.mark.parametrize(("tile", "overlap"), [(8, None), (8, 4), (4, 0), (12, 11)])
    def test_tiles_are_near_the_whole(self, sampler, tile, overlap):
        x = sampler.latents(3, size=(16, 12), seed=2)
        whole, tiled = sampler.decode(x), sampler.decode(x, tile=tile, overlap=overlap)
        assert tiled.shape == whole.shape
        assert 0 < np.abs(tiled - whole).mean() < 0.1 * np.abs(whole).mean()

    def test_what_no_tile_changes_is_exact(self, bundle):
        """A decoder that sees a pixel alone: the weights of all tiles come to 1 everywhere."""

        class Alone:
            name, precision = "decode", "fp32"

            def __init__(self):
                self.bundle, self.part, self.shapes = bundle, bundle.part("decode"), set()

            def run(self, x):
                self.shapes.add(x.shape)
                return {"image": x[:, :3].repeat(2, 2).repeat(2, 3)}

        x, alone = np.random.default_rng(0).standard_normal((3, 4, 16, 12), np.float32), Alone()
        close(Tiles(8, 3).decoded(alone, x, 2), alone.run(x)["image"])
        assert alone.shapes == {(2, 4, 8, 8), (1, 4, 8, 8), (3, 4, 16, 12)}

    def test_sampled_in_tiles(self, sampler):
        latents = sampler.sample(1, steps=STEPS, size=(16, 16), decode=False)
        close(sampler.sample(1, steps=STEPS, size=(16, 16), tile=8), sampler.decode(latents, tile=8))

    @pytest.mark.parametrize(
        ("tile", "overlap", "sentence"),
        [
            (8, 8, "tile = 8 is not larger than its overlap of 8: give a larger tile, or less"),
            (4, 5, "tile = 4 is not larger than its overlap of 5"),
            (0, None, "tile = 0"),
            (8, -1, "overlap = -1"),
            (6, 2, "a size of 6 × 6 is none of latent.epsrt"),
            (None, 2, "overlap = 2 is of tiles: give tile, or leave overlap out"),
        ],
    )
    def test_tiles_that_are_none(self, sampler, tile, overlap, sentence):
        with pytest.raises(InputError, match=sentence):
            sampler.sample(1, steps=STEPS, tile=tile, overlap=overlap)


class TestRefused:
    def test_pictures_as_x(self, sampler):
        with pytest.raises(
            InputError, match=r"x is \[2, 3, 16, 16\], pictures, and .*: give pictures as init, with str"
        ):
            sampler.sample(x=pictures(), steps=STEPS)

    def test_pictures_for_latents(self, sampler):
        with pytest.raises(InputError, match="that is a picture, which encode makes latents of"):
            sampler.decode(pictures())

    def test_latents_for_pictures(self, sampler):
        x = sampler.latents(1)
        with pytest.raises(InputError, match="that is a latent, which decode makes pictures of"):
            sampler.encode(x / np.abs(x).max())
        with pytest.raises(InputError, match=r"to_images takes pictures of 3 channels, not \[1, 4, 8, 8\]: decode lat"):
            sampler.to_images(x)

    @pytest.mark.parametrize("call", ["encode", "init"])
    def test_pictures_that_the_factor_does_not_divide(self, sampler, call):
        odd = pictures(1, (15, 16))
        with pytest.raises(InputError, match=r"not \[1, 3, 15, 16\]: its extents are multiples of 2 pixels"):
            sampler.encode(odd) if call == "encode" else sampler.sample(init=odd, strength=0.5, steps=STEPS)

    def test_pictures_out_of_their_range(self, sampler):
        with pytest.raises(InputError, match="images holds values from .* to .*, and the bundle's images -1 to 1"):
            sampler.encode(pictures() * 20)

    def test_a_mask_of_latents_beside_pictures(self, sampler):
        with pytest.raises(InputError, match=r"mask is bool \[8, 8\], not bool or float"):
            sampler.sample(known=pictures(1), mask=np.ones((8, 8), bool), steps=STEPS)

    def test_known_pictures_without_a_mask(self, sampler):
        with pytest.raises(InputError):
            sampler.sample(known=pictures(1), steps=STEPS)

    @pytest.mark.parametrize(("seed", "first"), [(-1, 0), (1.5, 0), (1, -1)])
    def test_a_seed_that_is_none(self, sampler, seed, first):
        with pytest.raises(InputError):
            sampler.encode(pictures(), seed=seed, first=first)

    @pytest.mark.parametrize("given", [np.zeros(3, np.float32), np.zeros((0, 4, 8, 8), np.float32), [[1], [2, 3]]])
    def test_arrays_that_are_none(self, sampler, given):
        with pytest.raises(InputError):
            sampler.decode(given)

    def test_a_bundle_without_its_autoencoder(self, no_parts):
        assert no_parts.sample(1, steps=STEPS).shape == (1, 4, 8, 8)
        for call in (
            lambda: no_parts.sample(1, steps=STEPS, decode=True),
            lambda: no_parts.decode(np.zeros((1, 4, 8, 8), np.float32)),
            lambda: no_parts.encode(pictures()),
            lambda: no_parts.preview(np.zeros((1, 4, 8, 8), np.float32)),
        ):
            with pytest.raises(BundleError, match=r"bare.epsrt has no part .*: export it again with its autoencoder"):
                call()
        with pytest.raises(InputError, match="to_images is of images, and samples of this bundle are latents"):
            no_parts.to_images(np.zeros((1, 4, 8, 8), np.float32))

    def test_a_bundle_of_images_does_not_decode(self, small_bundle_path):
        with Sampler.open(small_bundle_path, "onnxruntime") as sampler:
            assert sampler.sample(1, steps=STEPS).shape == (1, 1, 8, 8)
            with pytest.raises(BundleError, match="its samples are no latents of an autoencoder: they need none"):
                sampler.sample(1, steps=STEPS, decode=True)

    def test_a_closed_sampler(self, engine):
        sampler = Sampler(engine)
        sampler.close()
        with pytest.raises(InputError, match="is closed"):
            sampler.decode(np.zeros((1, 4, 8, 8), np.float32))


def test_pictures_are_told_by_channels_then_extents(bundle):
    for shape, so in (((1, 3, 16, 16), True), ((1, 4, 8, 8), False), ((2, 3, 9, 9), True), ((3, 16, 16), False)):
        assert are_pictures(bundle, "x", np.zeros(shape)) == so
    assert not are_pictures(bundle, "x", None)
