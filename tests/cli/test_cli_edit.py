"""epsrt sample with guidance, images to begin from and known pixels: the command, and what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import refusal, run
from PIL import Image, ImageSequence

from epsrt import Sampler, canvas
from nets import tiny

FEW = ("--method", "ddim", "--steps", 5)
Refused = Callable[..., str]
KNOWN = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 1, 8, 8)


@pytest.fixture
def drawn(edited_bundle_path: Path, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], dict[str, Any]]]:
    """drawn(*options) is the report, and the arrays of the .npz that it was asked for."""

    def draw(*options: object) -> tuple[dict[str, Any], dict[str, Any]]:
        out = tmp_path / "drawn.npz"
        report = json.loads(run("sample", edited_bundle_path, *options, "--out", out, "--json").stdout)
        with np.load(out, allow_pickle=False) as file:
            return report, dict(file)

    return draw


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """An .npz of one image."""
    np.savez(tmp_path / "known.npz", samples=KNOWN)
    return tmp_path / "known.npz"


@pytest.fixture(scope="module")
def wide_bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sized_bundle_path`'s network, masked: [1, 8, 8] and multiples of 4 up to 24, FP32."""
    from epsrt import Schedule
    from epsrt_export import export_network

    out, schedule = tmp_path_factory.mktemp("wide") / "wide.epsrt", Schedule(T=100, beta_start=1e-3, beta_end=0.2)
    options = {"shape": (1, 8, 8), "precisions": ("fp32",), "max_batch": 4, "sizes": (4, 24), "masked": True}
    return export_network(tiny(seed=3), schedule, out, **options).path


def picture(path: Path, pixels: object, mode: str | None = None) -> Path:
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    (image if mode is None else image.convert(mode)).save(path)
    return path


def test_guidance(drawn: Callable[..., Any], edited_bundle_path: Path) -> None:
    options = (*FEW, "--labels", "3,4,5", "--seed", 2)
    report, arrays = drawn(*options, "--guidance", "1,2,4", "--guidance-rescale", 0.7, "--guidance-interval", ":60")
    with Sampler.open(edited_bundle_path) as sampler:
        mine = sampler.sample(
            method="ddim",
            steps=5,
            labels=[3, 4, 5],
            seed=2,
            guidance=[1, 2, 4],
            guidance_rescale=0.7,
            guidance_interval=(0, 60),
        )
    np.testing.assert_allclose(arrays["samples"], mine, atol=1e-5)
    assert report["guidance"] == [1, 2, 4]
    assert (report["guidance_rescale"], report["guidance_interval"]) == (0.7, ":60")
    assert not np.allclose(arrays["samples"], drawn(*options)[1]["samples"], atol=1e-2)


def test_a_classifier(drawn: Callable[..., Any], edited_bundle_path: Path) -> None:
    options = (*FEW, "--labels", "3,4", "--classifier", 30)
    report, arrays = drawn(*options, "--targets", "seven,8")
    with Sampler.open(edited_bundle_path) as sampler:
        mine = sampler.sample(method="ddim", steps=5, labels=[3, 4], classifier=30, targets=[7, 8])
    np.testing.assert_allclose(arrays["samples"], mine, atol=1e-5)
    assert (list(arrays["label"]), list(arrays["target"])) == ([3, 4], [7, 8])
    assert (report["classifier"], report["targets"], report["labels"]) == (30, [7, 8], [3, 4])
    other = drawn(*options)[1]  # the labels are the targets
    assert list(other["target"]) == [3, 4]
    assert not np.allclose(other["samples"], arrays["samples"], atol=1e-3)


def test_from_images(drawn: Callable[..., Any], edited_bundle_path: Path, tmp_path: Path) -> None:
    """An .npz, the folder of its pictures and each picture begin the same, to a picture's rounding."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    with Sampler.open(edited_bundle_path) as sampler:
        init = sampler.from_images(images)
        mine = sampler.sample(method="ddim", steps=5, labels=7, init=init, strength=0.6, seed=4, first=2)
    np.savez(tmp_path / "init.npz", samples=init)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, image in zip(("a.png", "b.BMP", "c.png"), images, strict=True):
        picture(folder / name, image[..., 0], None if name == "b.BMP" else "RGB")
    (folder / "notes.txt").write_text("no picture")
    options = (*FEW, "--labels", 7, "--strength", 0.6, "--seed", 4)
    for given, first, wanted in ((tmp_path / "init.npz", 2, mine), (folder, 2, mine), (folder / "c.png", 4, mine[2:])):
        report, arrays = drawn(*options, "--init", given, "--first", first)
        np.testing.assert_allclose(arrays["samples"], wanted, atol=1e-5)
        assert (report["n"], report["steps"], report["strength"]) == (len(wanted), 3, 0.6)
        assert report["init"] == str(given)
        assert list(arrays["index"]) == list(range(first, first + len(wanted)))


def test_pictures_become_the_bundles_channels(plain_bundle_path: Path, tmp_path: Path) -> None:
    """A grey picture, one with a palette and one turned by its EXIF, for a network of three channels."""
    grey = np.arange(64).reshape(8, 8) * 4
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(np.rot90(grey).astype(np.uint8)).save(tmp_path / "turned.png", exif=exif)
    picture(tmp_path / "grey.png", grey, "L")
    picture(tmp_path / "palette.png", grey, "P")
    picture(tmp_path / "opaque.png", grey, "RGBA")
    found = []
    for name in ("turned", "grey", "palette", "opaque"):
        out = tmp_path / f"{name}.npz"
        run("sample", plain_bundle_path, *FEW, "--init", tmp_path / f"{name}.png", "--strength", 0.2, "--out", out)
        with np.load(out) as file:
            found.append(file["samples"])
    with Sampler.open(plain_bundle_path) as sampler:
        images = np.repeat(grey.astype(np.uint8)[None, ..., None], 3, axis=3)
        mine = sampler.sample(method="ddim", steps=5, init=sampler.from_images(images), strength=0.2)
    for samples in found:
        np.testing.assert_allclose(samples, mine, atol=1e-5)


def test_known_pixels_come_back(drawn: Callable[..., Any], known: Path, tmp_path: Path) -> None:
    """By a region, a picture, an .npz: exactly; in between by the mask's grey."""
    mask = np.zeros((8, 8), bool)
    mask[:4, 2:] = True
    np.savez(tmp_path / "mask.npz", mask=mask)
    picture(tmp_path / "mask.png", mask * 255)
    found = []
    for given in ("0:4,2:", "-8:-4,2:8", tmp_path / "mask.npz", tmp_path / "mask.png"):
        report, arrays = drawn(*FEW, "--labels", "3,5", "--known", known, "--mask", given)
        found.append(arrays["samples"])
        np.testing.assert_array_equal(arrays["samples"][:, 0, mask], np.tile(KNOWN[0, 0, mask], (2, 1)))
        assert np.abs(arrays["samples"] - KNOWN)[:, 0, ~mask].min() > 0
        assert (report["mask"], report["known"]) == (str(given), str(known))
    for samples in found[1:]:
        np.testing.assert_array_equal(samples, found[0])
    picture(tmp_path / "grey.png", mask * 128)
    grey = drawn(*FEW, "--labels", "3,5", "--known", known, "--mask", tmp_path / "grey.png")[1]["samples"]
    assert 0 < np.abs(grey - KNOWN)[:, 0, mask].mean() < np.abs(grey - KNOWN)[:, 0, ~mask].mean()


def test_known_pixels_with_everything(drawn: Callable[..., Any], edited_bundle_path: Path, known: Path) -> None:
    options = ("--method", "ddpm", "--steps", 8, "--labels", 3, "-n", 2, "--guidance", 2)
    report, arrays = drawn(*options, "--known", known, "--mask", ":,:3", "--resample", 3, "--jump", 2)
    mask = np.zeros((8, 8), np.float32)
    mask[:, :3] = 1
    with Sampler.open(edited_bundle_path) as sampler:
        more = {"known": KNOWN, "mask": mask, "resample": 3, "jump": 2, "guidance": 2}
        mine = sampler.sample(2, method="ddpm", steps=8, labels=3, **more)
    np.testing.assert_allclose(arrays["samples"], mine, atol=1e-5)
    assert (report["resample"], report["jump"], report["guidance"], report["steps"]) == (3, 2, 2, 8 + 2 * 6)


def test_a_canvas_around_known_pixels(wide_bundle_path: Path, tmp_path: Path, known: Path) -> None:
    out = tmp_path / "wide.npz"
    ask = ("sample", wide_bundle_path, *FEW, "--known", known, "--size", "12x16", "--at", "4,1", "-n", 2, "--out", out)
    assert json.loads(run(*ask, "--json").stdout)["size"] == [12, 16]
    with Sampler.open(wide_bundle_path) as sampler:
        placed, mask = canvas(KNOWN, (12, 16), (4, 1))
        mine = sampler.sample(2, method="ddim", steps=5, known=placed, mask=mask)
    with np.load(out) as file:
        np.testing.assert_allclose(file["samples"], mine, atol=1e-5)
        np.testing.assert_array_equal(file["samples"][:, :, 4:, 1:9], np.repeat(KNOWN, 2, 0))
    run(*ask, "--mask", "0:6,:")  # and of what is known, these rows alone
    with np.load(out) as file:
        np.testing.assert_array_equal(file["samples"][:, :, 4:6, 1:9], np.repeat(KNOWN[:, :, :2], 2, 0))
        assert np.abs(file["samples"][:, :, 6:, 1:9] - KNOWN[:, :, 2:]).min() > 0
        assert np.abs(file["samples"][:, :, :4]).min() > 0  # nor does the canvas keep its zeros


def test_the_bundles_own_size_is_a_canvas_too(drawn: Callable[..., Any], tmp_path: Path) -> None:
    small = picture(tmp_path / "small.png", np.full((3, 5), 255))
    _, arrays = drawn(*FEW, "--labels", 3, "--known", small, "--at", "2,0")
    assert (arrays["samples"][0, 0, 2:5, :5] == 1).all()
    assert not (arrays["samples"] == 1).all()


def test_latents_of_a_seed_make_what_it_makes(
    drawn: Callable[..., Any], edited_bundle_path: Path, tmp_path: Path
) -> None:
    with Sampler.open(edited_bundle_path) as sampler:
        latents = sampler.latents(3, seed=6)
        mine = sampler.sample(x=latents, method="ddim", steps=5, labels=[3, 1, 4])
    np.savez(tmp_path / "latents.npz", samples=latents, label=[3, 1, 4])
    report, arrays = drawn(*FEW, "--latents", tmp_path / "latents.npz", "--clip")
    _, seeded = drawn(*FEW, "--seed", 6, "--labels", "3,1,4")
    np.testing.assert_allclose(arrays["samples"], seeded["samples"], atol=1e-5)
    unclipped = drawn(*FEW, "--latents", tmp_path / "latents.npz")[1]["samples"]
    np.testing.assert_allclose(unclipped, mine, rtol=1e-4, atol=1e-4)
    assert not np.allclose(unclipped, seeded["samples"], atol=0.1)
    assert list(arrays["label"]) == [3, 1, 4]
    assert report["labels"] == [3, 1, 4]
    assert list(drawn(*FEW, "--latents", tmp_path / "latents.npz", "--labels", 7)[1]["label"]) == [7, 7, 7]
    np.savez(tmp_path / "latents.npz", samples=latents, label=[10, 10, 10])  # as of samples without labels
    assert drawn(*FEW, "--latents", tmp_path / "latents.npz")[0]["labels"] is None


def test_a_trajectory_as_a_strip(edited_bundle_path: Path, tmp_path: Path) -> None:
    """A row an image, ten columns, the last the sample; --out is what it is without."""
    ask = ("sample", edited_bundle_path, "--method", "ddpm", "--steps", 40, "--labels", "3,5,7", "--batch", 2)
    run(*ask, "--out", tmp_path / "a.npz", "--trajectory", tmp_path / "strip.png")
    run(*ask, "--out", tmp_path / "b.npz")
    run(*ask, "--out", tmp_path / "grid.png")
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        np.testing.assert_array_equal(a["samples"], b["samples"])
    strip, grid = np.asarray(Image.open(tmp_path / "strip.png")), np.asarray(Image.open(tmp_path / "grid.png"))
    assert strip.shape == (3 * 66 + 2, 10 * 66 + 2)
    for row in range(3):
        last = strip[2 + row * 66 : 66 + row * 66, 2 + 9 * 66 : 66 + 9 * 66]
        np.testing.assert_array_equal(last, grid[2:66, 2 + row * 66 : 66 + row * 66])
        assert (last != strip[2 + row * 66 : 66 + row * 66, 2:66]).any()


@pytest.mark.parametrize(("steps", "frames"), [(7, 7), (50, 50), (60, 30)])
def test_a_trajectory_as_a_film(edited_bundle_path: Path, tmp_path: Path, steps: int, frames: int) -> None:
    film, grid = tmp_path / "film.GIF", tmp_path / "grid.png"
    ask = ("sample", edited_bundle_path, "--method", "ddpm", "--steps", steps, "--labels", "3,5")
    run(*ask, "--out", grid, "--trajectory", film)
    with Image.open(film) as image:
        assert image.n_frames == frames
        assert image.info["loop"] == 0
        shown = [frame.convert("L") for frame in ImageSequence.Iterator(image)]
        assert image.info["duration"] == 2000
        image.seek(1)
        assert image.info["duration"] == 100
    np.testing.assert_array_equal(np.asarray(shown[-1]), np.asarray(Image.open(grid)))
    assert (np.asarray(shown[0]) != np.asarray(shown[-1])).any()


def test_a_film_in_colour(plain_bundle_path: Path, tmp_path: Path) -> None:
    run("sample", plain_bundle_path, *FEW, "-n", 2, "--out", tmp_path / "a.png", "--trajectory", tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        image.seek(image.n_frames - 1)
        last = np.asarray(image.convert("RGB"), float)
    assert np.abs(last - np.asarray(Image.open(tmp_path / "a.png"), float)).mean() < 8  # 256 colours a frame


def test_the_line_says_what_was_asked(edited_bundle_path: Path, tmp_path: Path, known: Path) -> None:
    ask = ("sample", edited_bundle_path, *FEW, "--labels", 3, "--out", tmp_path / "a.png")
    line = run(*ask, "--guidance", 2.5, "--init", known, "--strength", 0.6).stdout
    assert f"ddim in 3 steps, guidance 2.5, from {known}, strength 0.6 on " in line
    line = run(*ask, "--classifier", 4, "--known", known, "--mask", "0:4,:", "--resample", 2, "--jump", 2).stdout
    assert f", classifier 4, known pixels of {known}, resampled 2 times on " in line
    assert "guidance" not in line


MASKED = ("--known", "known.npz", "--mask")
BEGUN = ("--strength", 0.5, "--init")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--set", "seed=3"), "takes no option 'seed'"),
        (("--set", "on_step=3"), "takes no option 'on_step'"),
        (("--guidance", "two"), "--guidance: 'two' is not a number"),
        (("--guidance", "nan"), "--guidance nan is not a number within ±1e+06"),
        (("--guidance", 2), "guidance weighs a label against none: give --labels"),
        (("--labels", "1,2", "--guidance", "1,2,3"), "3 guidance for 2 samples"),
        (("--labels", 3, "--guidance-rescale", 0.7), "--guidance-rescale is for guided samples"),
        (("--labels", 3, "--guidance", 2, "--guidance-rescale", 2), "--guidance-rescale 2.0 is outside [0, 1]"),
        (("--labels", 3, "--guidance", 2, "--guidance-interval", "9"), "'9' is not LOW:HIGH, two timesteps such as"),
        (("--labels", 3, "--guidance", 2, "--guidance-interval", "9:x"), "--guidance-interval: 'x' is not a number"),
        (("--labels", 3, "--guidance", 2, "--guidance-interval", "90:9"), "is not (low, high), two timesteps that"),
        (("--labels", 3, "--guidance", 2, "--guidance-interval", "500:"), "holds none of the plan's timesteps"),
        (("--classifier", 1), "a classifier guides to a class: give --targets, or labels"),
        (("--targets", 3), "--targets are what a classifier guides to: give --classifier, its weight"),
        (("--labels", "None"), "eight, nine; none is for no label"),
        (("--classifier", 1, "--targets", "cat"), "target 'cat' is neither a number nor a class name"),
        (("--classifier", 1, "--targets", 10), "target 10 is outside 0 … 9"),
        (("--classifier", 1, "--labels", 3, "--guidance", 2), "no step graph with guidance and classifier at once"),
        (("--init", "known.npz"), "plan 'ddim' begins from noise: give --strength"),
        (("--strength", 0.5), "--strength says how far images are noised: give --init"),
        (("--init", "known.npz", "--strength", 0), "--strength 0.0 is outside (0, 1]"),
        (("--init", "known.npz", "--strength", 1.1), "--strength 1.1 is outside (0, 1]"),
        (("--init", "known.npz", "--latents", "known.npz"), "--init and --latents were both given"),
        ((*BEGUN, "two.npz", "-n", 3), "2 init images for 3 samples"),
        ((*BEGUN, "two.npz", "--labels", "1,2,3"), "2 init images for 3 samples"),
        ((*BEGUN, ""), "--init is empty: give it a value, or leave it out"),
        ((*BEGUN, "missing.png"), "missing.png does not exist: give an .npz that epsrt sample wrote, a picture"),
        ((*BEGUN, "large.npz"), "large.npz: a size of 9 × 8 is not 8 × 8, the one that edited.epsrt has"),
        ((*BEGUN, "whole.npz"), "whole.npz is int64 [1, 1, 8, 8], not float [1, 1, 8, 8]"),
        ((*BEGUN, "colour.npz"), "colour.npz is float32 [1, 3, 8, 8], not float [1, 1, 8, 8]"),
        ((*BEGUN, "bright.npz"), "bright.npz holds values from -255 to 255, and the bundle's images -1 to 1"),
        ((*BEGUN, "nan.npz"), "nan.npz image 1 holds NaN or infinity"),
        ((*BEGUN, "cut.npz"), "cut.npz is no .npz that can be read"),
        ((*BEGUN, "pickle.npz"), "pickle.npz is no .npz that can be read"),
        ((*BEGUN, "mask.npz"), "mask.npz holds no samples"),
        ((*BEGUN, "flat.npz"), "flat.npz holds samples [8, 8], not [n, C, H, W]"),
        ((*BEGUN, "letter.png"), "letter.png is no picture that can be read"),
        ((*BEGUN, "cut.png"), "cut.png is no picture that can be read"),
        ((*BEGUN, "large.png"), "large.png: a size of 10 × 9 is not 8 × 8"),
        ((*BEGUN, "bomb.png"), "bomb.png says it has more pixels than any picture should"),
        ((*BEGUN, "moving.gif"), "moving.gif is animated, or has pages: give one picture"),
        ((*BEGUN, "deep.png"), "deep.png has more than 8 bits a channel: save it with 8"),
        ((*BEGUN, "deep-colour.png"), "deep-colour.png has more than 8 bits a channel"),
        ((*BEGUN, "glass.png"), "glass.png is transparent in places"),
        ((*BEGUN, "empty"), "empty is a folder without pictures"),
        ((*BEGUN, "mixed"), "b.png: a size of 10 × 9 is not 8 × 8"),
        (("--latents", "good.png"), "good.png holds no latents: give the .npz"),
        (("--latents", "labels.npz"), "labels.npz has labels float64 [2] for 2 samples: give --labels"),
        (("--latents", "two.npz", "--labels", "1,2,3"), "2 --latents images for 3 samples"),
        (("--latents", "nan.npz"), "nan.npz image 1 holds NaN or infinity"),
        (("--known", "known.npz"), "--known has no --mask: give one"),
        (("--mask", ":,:"), "--mask is about known pixels: give --known"),
        (("--at", "0,0"), "--at is about known pixels: give --known"),
        ((*MASKED, "missing.png"), "--mask missing.png is no file, and no region such as 0:4,:"),
        ((*MASKED, "4:4,:"), "--mask 4:4,: keeps no pixel"),
        ((*MASKED, "0:9,:"), "--mask 0:9,: is beyond images of 8 × 8 pixels"),
        ((*MASKED, "large.png"), "large.png is 10 × 9, not 8 × 8: crop or resize it"),
        ((*MASKED, "letter.png"), "letter.png is no picture that can be read"),
        ((*MASKED, "mask-large.npz"), "mask-large.npz: mask is bool [8, 9], not bool or float [1, 1, 8, 8] or [8, 8]"),
        ((*MASKED, "mask-whole.npz"), "mask-whole.npz: mask is int64 [8, 8], not bool or float"),
        ((*MASKED, "mask-bright.npz"), "mask-bright.npz: mask holds values from 0 to 255"),
        ((*MASKED, "mask-nan.npz"), "mask-nan.npz: mask holds NaN"),
        ((*MASKED, "labels-alone.npz"), "labels-alone.npz holds no mask"),
        (("--known", "large.npz", "--mask", ":,:4"), "large.npz: a size of 9 × 8 is not 8 × 8"),
        (("--known", "nan.npz", "--mask", ":,:4"), "nan.npz image 1 holds NaN"),
        (("--known", "bright.npz", "--mask", ":,:4"), "bright.npz holds values from -255 to 255"),
        (("--known", "good.png", "--at", "0"), "--at '0' is not TOP,LEFT in pixels"),
        (("--known", "good.png", "--at", "1,0"), "good.png: images of 8 × 8 at (1, 0) do not fit a canvas of 8 × 8"),
        (("--known", "large.png", "--at", "0,0"), "large.png is 10 × 9, more than its canvas of 8 × 8"),
        (("--known", "good.png", "--at", "0,0", "--size", "8x16"), "a size of 8 × 16 is not 8 × 8, the one that"),
        (("--resample", 3), "--resample 3 is about what is not known: give --known, and --mask"),
        ((*MASKED, ":,:4", "--resample", 0), "--resample 0 is outside 1 … 1000"),
        ((*MASKED, ":,:4", "--jump", 3), "--jump is how far --resample goes back: give that too"),
        ((*MASKED, ":,:4", "--method", "dpmpp-2m", "--resample", 2), "dpmpp-2m remembers what came before"),
        (("--trajectory", "film.mp4"), "--trajectory film.mp4: the suffix must be .png (a grid) or .gif (animated)"),
        (("--trajectory", "film"), "--trajectory film: the suffix must be"),
        (("--trajectory", "folder.png"), "--trajectory folder.png is a directory"),
        (("--trajectory", "never.png", "--out", "never.png"), "--out and --trajectory name one file: choose two"),
        (("--trajectory", "a.gif", "-n", 101), "--trajectory shows 100 images at most, and 101 are asked for"),
    ],
)
def test_sample_refuses(
    edited_bundle_path: Path, wrong: Path, refused: Refused, arguments: tuple[object, ...], sentence: str
) -> None:
    before = sorted(p.name for p in wrong.iterdir())
    target = () if "--out" in arguments else ("--out", "never.png")
    steps = () if "--steps" in arguments else ("--steps", 3)
    assert sentence in refused("sample", edited_bundle_path, *steps, *target, *arguments, cwd=wrong)
    assert sorted(p.name for p in wrong.iterdir()) == before


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files, most of which are wrong in one way."""
    folder = tmp_path_factory.mktemp("wrong")
    image = np.zeros((1, 1, 8, 8), np.float32)
    two = np.zeros((2, 1, 8, 8), np.float32)
    holed = two.copy()
    holed[1, 0, 3, 3] = np.nan
    for name, arrays in {
        "known": {"samples": image},
        "two": {"samples": two},
        "nan": {"samples": holed},
        "large": {"samples": np.zeros((1, 1, 9, 8), np.float32)},
        "whole": {"samples": image.astype(int)},
        "colour": {"samples": np.zeros((1, 3, 8, 8), np.float32)},
        "flat": {"samples": image[0, 0]},
        "bright": {"samples": 255 * KNOWN},
        "pickle": {"samples": np.array([{}], object)},
        "labels": {"samples": two, "label": np.zeros(2)},
        "labels-alone": {"label": np.zeros(2)},
        "mask": {"mask": np.ones((8, 8), bool)},
        "mask-large": {"mask": np.ones((8, 9), bool)},
        "mask-whole": {"mask": np.ones((8, 8), int)},
        "mask-nan": {"mask": holed[1, 0]},
        "mask-bright": {"mask": np.where(np.eye(8), 255.0, 0.0)},
    }.items():
        np.savez(folder / f"{name}.npz", **arrays)
    whole = (folder / "known.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    noise = np.random.default_rng(1).integers(0, 256, (8, 8), dtype=np.uint8)
    whole = picture(folder / "good.png", noise).read_bytes()
    (folder / "cut.png").write_bytes(whole[:60])
    (folder / "letter.png").write_text("dear reader")
    picture(folder / "large.png", np.zeros((10, 9)))
    (folder / "bomb.png").write_bytes(_header(60_000, 60_000))
    frames = [Image.new("L", (8, 8), level) for level in (0, 255)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(folder / "deep.png")
    (folder / "deep-colour.png").write_bytes(_header(8, 8, depth=16, colour=2))
    glass = np.full((8, 8, 4), 255, np.uint8)
    glass[2, 2, 3] = 0
    Image.fromarray(glass).save(folder / "glass.png")
    for name in ("empty", "mixed", "folder.png"):
        (folder / name).mkdir()
    picture(folder / "mixed" / "a.png", np.zeros((8, 8)))
    picture(folder / "mixed" / "b.png", np.zeros((10, 9)))
    return folder


def _header(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    """The first bytes of a PNG: what it claims, and pixels that are cut short."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def test_what_a_bundle_lacks(
    bundle_path: Path, plain_bundle_path: Path, wide_bundle_path: Path, learned_bundle_path: Path, wrong: Path
) -> None:
    """Each sentence says which export has it, or how to ask."""
    never, small = ("--out", wrong / "never.npz", "--steps", 3), wrong / "good.png"
    known, half = ("--known", small), ("--mask", ":,:4")
    for bundle, options, sentence in (
        (bundle_path, (*known, *half), "tiny.epsrt has no step graph with mask: export it again with --masked"),
        (bundle_path, ("--classifier", 2, "--labels", 3), "has no classifier: export it again with --classifier"),
        (plain_bundle_path, ("--guidance", 2), "plain.epsrt has no null label, so guidance has nothing to compare"),
        (wide_bundle_path, (*known, "--at", "0,0", "--size", "10x16"), "a size of 10 × 16 is none of wide.epsrt"),
        (wide_bundle_path, (*known, *half, "--size", "12x16"), "good.png is 8 × 8, not 12 × 16: crop or resize it"),
        (learned_bundle_path, ("--init", small, "--strength", 1), "images have 2 channels, a picture has not"),
        (learned_bundle_path, ("--trajectory", wrong / "never.gif"), "2 channels make no picture"),
    ):
        assert sentence in refusal("sample", bundle, *never, *options)
        assert not list(wrong.glob("never*"))
