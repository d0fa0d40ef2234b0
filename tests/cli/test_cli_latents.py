"""Bundles of latents: no picture is made of what an autoencoder would decode, and none is taken for it."""

import numpy as np
import pytest
from command_line import run
from PIL import Image

from epsrt import InputError, Sampler
from helpers import forge

FEW = ("--steps", 2, "--engine", "onnxruntime", "-n", 2)


@pytest.fixture
def latents(plain_bundle_path, copy_of):
    """The bundle says of itself that its 3 × 8 × 8 samples are latents."""
    path = copy_of(plain_bundle_path)
    forge(path, lambda manifest: manifest.update(latents=True))
    return path


@pytest.mark.parametrize("out", [("--out", "x.png"), ("--out", "folder")])
def test_no_picture_is_made(latents, tmp_path, refused, out):
    line = refused("sample", latents, *out, cwd=tmp_path)
    assert "latents of an autoencoder make no picture: write .npz and decode its samples with that autoencoder" in line
    assert list(tmp_path.glob("*.png")) == []


def test_nor_a_film_a_strip_or_an_animation(latents, tmp_path, refused):
    film = ("sample", latents, "--out", "a.npz", "--trajectory", "film.gif")
    assert "--trajectory film.gif: latents of an autoencoder make no picture: leave it out" in refused(
        *film, cwd=tmp_path
    )
    walk = ("interpolate", latents, "--seeds", "1,2", "--out", "walk.gif")
    assert "latents of an autoencoder make no picture: write .npz" in refused(*walk, cwd=tmp_path)


def test_the_way_out_works_and_begins_again_from_what_it_wrote(latents, tmp_path, refused):
    run("sample", latents, *FEW, "--out", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as kept:
        assert "images" not in kept
        assert kept["samples"].shape == (2, 3, 8, 8)
    run("sample", latents, *FEW, "--init", tmp_path / "a.npz", "--strength", 0.5, "--out", tmp_path / "b.npz")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    line = refused("sample", latents, "--init", "x.png", "--strength", 0.5, "--out", "c.npz", cwd=tmp_path)
    assert "x.png is a picture, and the bundle takes an autoencoder's latents: encode it, and give .npz" in line


def test_inspect_and_python_say_it_too(latents):
    assert "latents" in run("inspect", latents).stdout
    with Sampler.open(latents, "onnxruntime") as sampler:
        x = sampler.sample(1, steps=2)
        for call in (lambda: sampler.to_images(x), lambda: sampler.from_images(np.zeros((1, 8, 8, 3), np.uint8))):
            with pytest.raises(InputError, match="latents of an autoencoder: encode and decode them with that"):
                call()


def test_an_autoencoder_and_a_network_of_its_latents_are_trained_and_exported(tmp_path, refused):
    first, then = tmp_path / "coder.safetensors", tmp_path / "latent.safetensors"
    few = ("--set", "train.steps=2", "--set", "train.batch=4", "--set", "network.base_channels=8")
    line = refused("train", "--preset", "digits-latent", "--out", then, cwd=tmp_path)
    assert "preset digits-latent is trained on an autoencoder's latents: train preset digits-autoencoder first" in line
    assert run("train", "--preset", "digits-autoencoder", "--out", first, *few).stdout.startswith(f"{first}: 2 steps")
    line = refused("export", first, tmp_path / "a.epsrt", cwd=tmp_path)
    assert (
        f"holds an autoencoder, not a diffusion network: train one on its latents, with --autoencoder {first}" in line
    )
    run("train", "--preset", "digits-latent", "--autoencoder", first, "--out", then, *few)
    line = refused("bound", then, "--data", "digits", cwd=tmp_path)
    assert "latent.safetensors draws latents, which have no grey levels: a bound is of networks of images alone" in line


class TestDecoded:
    """A bundle that has its autoencoder: pictures go in and come out."""

    def test_pictures_are_drawn(self, latent_bundle_path, tmp_path):
        said = run("sample", latent_bundle_path, *FEW, "--out", tmp_path / "a.png", "--seed", 3).stdout
        assert "a.png: 2 images" in said
        with Image.open(tmp_path / "a.png") as grid:
            assert grid.mode == "RGB"
        run("sample", latent_bundle_path, *FEW, "--out", tmp_path / "a.npz", "--seed", 3)
        run("sample", latent_bundle_path, *FEW, "--out", tmp_path / "z.npz", "--seed", 3, "--no-decode")
        with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "z.npz") as z:
            assert (a["samples"].shape, a["images"].shape) == ((2, 3, 16, 16), (2, 16, 16, 3))
            assert z["samples"].shape == (2, 4, 8, 8)
            assert "images" not in z
            with Sampler.open(latent_bundle_path, "onnxruntime") as sampler:
                np.testing.assert_allclose(sampler.decode(z["samples"]), a["samples"], atol=1e-5)

    def test_sizes_are_of_pictures(self, latent_bundle_path, tmp_path, refused):
        out = tmp_path / "wide"
        run("sample", latent_bundle_path, *FEW, "--size", "16x24", "--out", out)
        with Image.open(out / "0.png") as one:
            assert one.size == (24, 16)
        line = refused("sample", latent_bundle_path, "--size", "12x24", "--out", "x.png", cwd=tmp_path)
        assert "a size of 12 × 24 is none of latent.epsrt: height and width are multiples of 8 up to 32" in line

    def test_a_picture_is_encoded_to_begin_from(self, latent_bundle_path, tmp_path):
        Image.new("RGB", (16, 16), "orange").save(tmp_path / "x.png")
        few = ("--steps", 4, "--engine", "onnxruntime", "--strength", 0.5, "--seed", 1, "--out")
        run("sample", latent_bundle_path, "--init", tmp_path / "x.png", *few, tmp_path / "a.npz")
        with np.load(tmp_path / "a.npz") as a, Sampler.open(latent_bundle_path, "onnxruntime") as sampler:
            picture = sampler.from_images(np.asarray(Image.open(tmp_path / "x.png"))[None])
            wanted = sampler.sample(init=picture, steps=4, strength=0.5, seed=1)
            np.testing.assert_allclose(a["samples"], wanted, atol=1e-5)
            np.savez(tmp_path / "z.npz", samples=sampler.encode(picture))
            np.savez(tmp_path / "a.npz", samples=picture)
        for of in ("a.npz", "z.npz"):
            run("sample", latent_bundle_path, "--init", tmp_path / of, *few, tmp_path / "b.png")

    def test_known_pixels_of_a_picture_come_back(self, latent_bundle_path, tmp_path):
        Image.new("RGB", (16, 16), (255, 0, 51)).save(tmp_path / "x.png")
        known = ("--known", tmp_path / "x.png", "--mask", ":,0:7")
        run("sample", latent_bundle_path, *FEW, *known, "--out", tmp_path / "out")
        for name in ("0.png", "1.png"):
            with Image.open(tmp_path / "out" / name) as one:
                assert (np.asarray(one)[:, :7] == (255, 0, 51)).all()
        film = ("--out", tmp_path / "b.png", "--trajectory", tmp_path / "film.gif")
        run("sample", latent_bundle_path, *FEW, *known, *film)
        with Image.open(tmp_path / "film.gif") as moving:
            assert moving.n_frames == 2

    def test_inverted_and_drawn_again(self, latent_bundle_path, tmp_path):
        Image.new("RGB", (16, 16), "orange").save(tmp_path / "x.png")
        there = ("--steps", 4, "--engine", "onnxruntime")
        said = run("invert", latent_bundle_path, "--init", tmp_path / "x.png", *there, "--out", tmp_path / "z.npz")
        assert "latents of 1 images" in said.stdout
        with np.load(tmp_path / "z.npz") as z:
            assert z["samples"].shape == (1, 4, 8, 8)
        latents = ("--latents", tmp_path / "z.npz", "--method", "ddim")
        run("sample", latent_bundle_path, *latents, *there, "--out", tmp_path / "again.png")
        walk = ("--seeds", "1,2", "--frames", 3)
        run("interpolate", latent_bundle_path, *walk, *there, "--out", tmp_path / "walk.gif")

    def test_inspect_lists_parts_and_what_latents_are(self, latent_bundle_path):
        told = " ".join(run("inspect", latent_bundle_path).stdout.split())
        for words in (
            "pictures 3 × 16 × 16, values -1 … 1, 2 pixels each",
            "scale 1.5, 0.5, 1, 2, shift 0.1, -0.2, 0, 0.3",
            "decode-fp32.onnx",
            "image 3×?×?",
        ):
            assert words in told, told

    def test_a_bundle_without_its_decoder(self, latents, tmp_path, refused):
        line = refused("sample", latents, "--decode", "--out", "x.png", cwd=tmp_path)
        assert "has no part decode: export it again with its autoencoder (autoencoder=)" in line

    def test_a_bundle_without_its_encoder(self, latent_bundle_path, copy_of, tmp_path, refused):
        path = copy_of(latent_bundle_path)
        for file in path.glob("encode-*"):
            file.unlink()
        forge(path, lambda manifest: manifest["parts"].pop("encode"))
        Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
        line = refused("sample", path, "--init", "x.png", "--strength", 0.5, "--out", "y.png", cwd=tmp_path)
        assert "has no part encode: export it again with an autoencoder that has it" in line
