"""Bundles of latents: no picture is made of what an autoencoder would decode, and none is taken for it."""

import numpy as np
import pytest
from PIL import Image
from test_cli import run

from epsrt import InputError, Sampler
from helpers import forge

FEW = ("--steps", 2, "--engine", "onnxruntime", "-n", 2)


@pytest.fixture
def latents(plain_bundle_path, copy_of):
    """The bundle says of itself that its 3 × 8 × 8 samples are latents."""
    path = copy_of(plain_bundle_path)
    forge(path, lambda manifest: manifest.update(latents=True))
    return path


@pytest.mark.parametrize("out", [(), ("--out", "x.png"), ("--out", "folder")])
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
