"""epsrt invert and epsrt interpolate: the command, and what it wrote."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import refusal, run
from PIL import Image

from epsrt import Sampler, slerp

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three real digits, with their labels: what the network of `bundle_path` was trained on."""
    from sklearn.datasets import load_digits

    found, path = load_digits(), tmp_path_factory.mktemp("digits") / "real.npz"
    np.savez(path, samples=(found.images[:3, None] / 8 - 1).astype(np.float32), label=found.target[:3])
    return path


def test_invert_finds_what_draws_the_images_again(bundle_path: Path, digits: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "the latents.npz", tmp_path / "again.npz"
    report = json.loads(run("invert", bundle_path, "--init", digits, "--steps", 50, "--out", out, "--json").stdout)
    with Sampler.open(bundle_path) as sampler, np.load(out) as file, np.load(digits) as real:
        mine = sampler.invert(real["samples"], steps=50, labels=[0, 1, 2])
        np.testing.assert_allclose(file["samples"], mine, atol=1e-4)
        assert list(file["label"]) == [0, 1, 2]
    assert (report["n"], report["steps"], report["labels"]) == (3, 50, [0, 1, 2])
    assert report["mse"] == pytest.approx(np.mean(report["mse_each"]))
    assert 0 < report["mse"] < 5e-3
    text = run("invert", bundle_path, "--init", digits, "--steps", 50, "--out", out).stdout
    assert f"ddim makes them again to {report['mse']:.1e} mean squared error" in text
    (line,) = [line for line in text.splitlines() if line.startswith("draw them by: epsrt ")]
    run(*shlex.split(line.removeprefix("draw them by: epsrt ")), "--out", again)
    with np.load(again) as file, np.load(digits) as real:
        assert ((file["samples"] - real["samples"]) ** 2).mean() / 4 == pytest.approx(report["mse"], rel=1e-3)
        assert list(file["label"]) == [0, 1, 2]


def test_inversion_is_better_the_more_steps(bundle_path: Path, digits: Path, tmp_path: Path) -> None:
    """The labels given, guidance, the owner's ddim or its inverse as the method: all on both ways."""
    ask = ("invert", bundle_path, "--init", digits, "--out", tmp_path / "latents.npz", "--json")
    errors = [json.loads(run(*ask, "--steps", steps).stdout)["mse"] for steps in (5, 100)]
    assert errors[1] < errors[0] / 5
    report = json.loads(run(*ask, "--method", "ddim", "--labels", "4,five,6", "--guidance", 1.5).stdout)
    assert (report["method"], report["steps"], report["guidance"]) == ("ddim-inversion", 50, 1.5)
    assert report["labels"] == [4, 5, 6]
    with np.load(tmp_path / "latents.npz") as file:
        assert list(file["label"]) == [4, 5, 6]


def test_the_check_can_be_left_out(plain_bundle_path: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "black.png")
    ask = ("invert", plain_bundle_path, "--init", tmp_path / "black.png", "--out", tmp_path / "a.npz", "--steps", 3)
    assert json.loads(run(*ask, "--no-check", "--json").stdout)["mse"] is None
    assert "mean squared error" not in run(*ask, "--no-check").stdout
    with np.load(tmp_path / "a.npz") as file:
        assert (file["samples"].shape, len(file["label"])) == ((1, 3, 8, 8), 0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--method", "ddpm"), "ddpm is stochastic, and its noise cannot be undone: invert with ddim-inversion"),
        (("--method", "dpmpp-2m"), "dpmpp-2m has no inverse here: invert with ddim-inversion"),
        (("--method", "dimm"), "method 'dimm' is unknown"),
        (("--set", "eta=0.5"), "ddim-inversion is deterministic and takes no option 'eta'"),
        (("--steps", 0), "--steps 0 is outside"),
        (("--labels", "1,2"), "2 labels for 3 samples"),
        (("--guidance", "much"), "--guidance: 'much' is not a number"),
        (("--out", "latents.png"), "--out latents.png: the suffix must be .npz"),
        (("--init", "missing.npz"), "missing.npz does not exist"),
    ],
)
def test_invert_refuses(
    bundle_path: Path, digits: Path, tmp_path: Path, refused: Refused, arguments: tuple[object, ...], sentence: str
) -> None:
    ask = ("invert", bundle_path, *(() if "--init" in arguments else ("--init", digits)), *arguments)
    assert sentence in refused(*ask, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_interpolate_walks_on_the_sphere(bundle_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "frames.npz"
    options = ("--labels", "three", "--steps", 6, "--guidance", 2)
    report = json.loads(
        run("interpolate", bundle_path, "--seeds", "7,8,9", "--frames", 4, *options, "--out", out, "--json").stdout
    )
    with Sampler.open(bundle_path) as sampler, np.load(out) as file:
        a, b, c = sampler.latents(seeds=[7, 8, 9])
        thirds = [0, 1 / 3, 2 / 3, 1]
        x = np.concatenate([slerp(a, b, thirds), slerp(b, c, thirds[1:])])
        mine = sampler.sample(x=x, steps=6, clip=1.0, labels=3, guidance=2)
        seeded = sampler.sample(seeds=[7, 8, 9], steps=6, labels=3, guidance=2)
        np.testing.assert_allclose(file["samples"], mine, atol=1e-5)
        np.testing.assert_allclose(file["samples"][::3], seeded, atol=1e-5)
        np.testing.assert_allclose(file["position"], np.arange(7) / 3)
        assert list(file["label"]) == [3] * 7
    assert (report["n"], report["frames"], report["seeds"], report["guidance"]) == (7, 4, [7, 8, 9], 2)


def test_a_strip_a_film_and_a_folder(bundle_path: Path, tmp_path: Path) -> None:
    """A row a pair, both ends in it; there and back; each frame once."""
    ask = ("interpolate", bundle_path, "--seeds", "1,2,3", "--frames", 4, "--labels", 3, "--steps", 5)
    text = run(*ask, "--out", tmp_path / "strip.png").stdout
    assert "7 frames between 3 latents, ddim in 5 steps on " in text
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    assert strip.shape == (2 * 66 + 2, 4 * 66 + 2)
    np.testing.assert_array_equal(strip[2:66, 2 + 3 * 66 :], strip[68:132, 2 : 2 + 66])  # the first row's end, again
    run(*ask, "--out", tmp_path / "walk.gif")
    with Image.open(tmp_path / "walk.gif") as film:
        assert film.n_frames == 7 + 5
        cells = []
        for i in range(film.n_frames):
            film.seek(i)
            cells.append(np.asarray(film.convert("L"))[2:66, 2:66])
    np.testing.assert_array_equal(cells[0], strip[2:66, 2:66])
    np.testing.assert_array_equal(cells[3], strip[68:132, 2:66])
    for i in range(1, 6):
        np.testing.assert_array_equal(cells[6 + i], cells[6 - i])
    run(*ask, "--out", tmp_path / "folder")
    names = sorted(p.name for p in (tmp_path / "folder").iterdir())
    assert names == [f"{i}.png" for i in range(7)]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "folder" / "3.png")), cells[3][::8, ::8])


def test_interpolate_between_latents(bundle_path: Path, tmp_path: Path) -> None:
    """With the one label that they share, else the one given."""
    latents, out = tmp_path / "latents.npz", tmp_path / "frames.npz"
    with Sampler.open(bundle_path) as sampler:
        x = sampler.latents(2, seed=5)
        mine = sampler.sample(x=slerp(x[0], x[1], [0, 0.5, 1]), method="dpmpp-2m", steps=6, labels=4)
    ask = ("interpolate", bundle_path, "--latents", latents, "--frames", 3, "--method", "dpmpp-2m", "--steps", 6)
    for label, more in (([4, 4], ()), ([4, 5], ("--labels", 4))):
        np.savez(latents, samples=x, label=label)
        run(*ask, *more, "--out", out)
        with np.load(out) as file:
            np.testing.assert_allclose(file["samples"], mine, atol=1e-5)
    assert "latents of several classes: say by --labels" in refusal(*ask, "--out", out)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--method", "ddpm"), "ddpm is stochastic here, so frames would differ by their noise: use --method ddim"),
        (("--eta", 0.5), "ddim is stochastic here, so frames would differ"),
        (("--method", "heun", "--set", "s_churn=3"), "heun is stochastic here"),
        (("--method", "ddim-inversion"), "ddim-inversion begins from images: walk between latents with a sampler"),
        (("--latents", "a.npz"), "give either --seeds, such as 1,2, or --latents"),
        (("--seeds", "1"), "there is no way from 1 to the next: give two --seeds"),
        (("--seeds", "1,b"), "--seeds: 'b' is not a whole number"),
        (("--seeds", f"1,{1 << 64}"), "outside 0 … 2^64 − 1"),
        (("--frames", 1), "--frames 1: both ends are counted, so give at least 2"),
        (("--frames", 20_000), "--frames 20000 between 2 are 20000 in all: 10000 are the most at once"),
        (("--labels", "1,2"), "--labels gives 2 classes: all frames have one"),
        (("--labels", "12"), "label 12 is outside 0 … 9"),
        (("--guidance", 2), "guidance weighs a label against none: give --labels"),
        (("--size", "8x16"), "a size of 8 × 16 is not 8 × 8"),
        (("--out", "walk.mp4"), "--out walk.mp4: the suffix must be .png (a grid), .gif (animated), .npz or none"),
    ],
)
def test_interpolate_refuses(
    bundle_path: Path, tmp_path: Path, refused: Refused, arguments: tuple[object, ...], sentence: str
) -> None:
    seeds = () if "--seeds" in arguments else ("--seeds", "1,2")
    assert sentence in refused("interpolate", bundle_path, *seeds, *arguments, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_eta_0_makes_a_walk(bundle_path: Path, tmp_path: Path) -> None:
    ask = ("interpolate", bundle_path, "--seeds", "1,2", "--frames", 2, "--steps", 4, "--method", "euler-ancestral")
    assert "euler-ancestral is stochastic here" in refusal(*ask, "--out", tmp_path / "a.npz")
    run(*ask, "--eta", 0, "--out", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        assert file["samples"].shape == (2, 1, 8, 8)
