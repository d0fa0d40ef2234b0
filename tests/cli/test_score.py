"""epsrt score: the command, what it says and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import run
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from epsrt.images import from_images
from epsrt.score import metrics

Refused = Callable[..., str]
WEIGHTS = np.random.default_rng(2).standard_normal((64, 3)).astype(np.float32)


def extractor(path: Path, channels: int = 1, size: int | str = 8, value_range: str | None = "-1,1") -> Path:
    """Three random projections of [N, C, H, W], their names not those that are looked for, and logits of them."""
    weights = np.resize(WEIGHTS, (channels * (8 if size == "S" else int(size)) ** 2, 3))
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["pixels"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["pool"]),
            helper.make_node("Tanh", ["pool"], ["fc"]),
        ],
        "projections",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", channels, size, size])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in ("pool", "fc")],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    if value_range:
        helper.set_model_props(model, {"value_range": value_range})
    onnx.save(model, path)
    return path


def images(seed: int, n: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, channels), np.uint8)


def folder(path: Path, given: np.ndarray, suffix: str = "png") -> Path:
    path.mkdir()
    for i, image in enumerate(given):
        Image.fromarray(image.squeeze()).save(path / f"{i}.{suffix}")
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with all that a command may name."""
    extractor(tmp_path / "e.onnx")
    extractor(tmp_path / "quiet.onnx", value_range=None)
    extractor(tmp_path / "any.onnx", size="S")
    extractor(tmp_path / "rgb.onnx", channels=3)
    extractor(tmp_path / "four.onnx", channels=4)
    extractor(tmp_path / "nine.onnx", size=9)
    np.savez(tmp_path / "x.npz", samples=from_images(images(0, 40)), images=images(0, 40))
    np.savez(tmp_path / "few.npz", images=images(0, 3))
    np.savez(tmp_path / "floats.npz", images=from_images(images(0, 40)))
    np.savez(tmp_path / "latents.npz", samples=from_images(images(0, 40)))
    np.savez(tmp_path / "colour.npz", images=images(0, 40, 3))
    folder(tmp_path / "real", images(1, 50) // 2 + 60)
    folder(tmp_path / "colours", images(1, 50, 3))
    (tmp_path / "no.onnx").write_bytes(b"nothing of the kind")
    (tmp_path / "empty").mkdir()
    return tmp_path


NAMES = ("--names", "features=pool,logits=fc")


def test_score_is_that_of_the_library(place: Path) -> None:
    given = ("score", place / "x.npz", place / "real", "--features", place / "e.onnx", *NAMES)
    report = json.loads(run(*given, "--k", 2, "--resamples", 30, "--seed", 5, "--json").stdout)

    def features(pixels: np.ndarray) -> np.ndarray:
        return (from_images(pixels).reshape(len(pixels), -1) @ WEIGHTS).astype(np.float64)

    x, y = features(images(0, 40)), features(images(1, 50) // 2 + 60)
    shares = np.exp(np.tanh(x)) / np.exp(np.tanh(x)).sum(axis=1, keepdims=True)
    want = metrics.score(x, y, shares, k=2, resamples=30, seed=5)
    for name in ("frechet", "classes", "precision", "recall"):
        figure = getattr(want, name)
        found = report[name]
        assert (found["value"], found["low"], found["high"]) == pytest.approx(
            (figure.value, figure.low, figure.high), rel=1e-4
        )
    assert (report["n"], report["n_real"], report["features"], report["range"]) == (40, 50, 3, [-1, 1])
    text = run(*given).stdout
    assert "40 samples, 50 real images, 3 features" in text
    assert f"{want.frechet.value:.4f}" in text
    assert "class score" in text


def test_folders_archives_and_file_formats_are_one(place: Path) -> None:
    pixels = images(1, 50) // 2 + 60
    np.savez(place / "real.npz", images=pixels)
    folder(place / "tiffs", pixels, "tif")

    def of(real: str, file: str = "e.onnx") -> float:
        report = run(
            "score", place / "x.npz", place / real, "--features", place / file, *NAMES, "--resamples", 0, "--json"
        )
        return float(json.loads(report.stdout)["frechet"]["value"])

    assert of("real") == of("real.npz") == of("tiffs") == of("real", "any.onnx")


def test_the_range_scales_the_images(place: Path) -> None:
    def of(*more: object) -> dict[str, object]:
        given = ("score", place / "x.npz", place / "real", "--features", place / "quiet.onnx", *NAMES, "--resamples", 0)
        return dict(json.loads(run(*given, *more, "--json").stdout))

    one, two = of("--range", "0,1"), of("--range=-1,1")
    assert two["frechet"]["value"] == pytest.approx(4 * one["frechet"]["value"], rel=1e-4)  # type: ignore[index]
    assert two["range"] == [-1, 1]


def test_samples_of_the_command_are_scored(bundle_path: Path, place: Path) -> None:
    run("sample", bundle_path, "-n", 12, "--steps", 4, "--labels", 3, "--out", place / "drawn.npz", "--threads", 1)
    report = json.loads(
        run("score", place / "drawn.npz", place / "real", "--features", place / "e.onnx", *NAMES, "--json").stdout
    )
    assert report["n"] == 12
    assert report["frechet"]["low"] < report["frechet"]["value"] < report["frechet"]["high"]


def test_pictures_are_turned_as_their_cameras_say(place: Path) -> None:
    extractor(place / "any.onnx", size="S")
    wide = np.random.default_rng(0).integers(0, 256, (20, 4, 16, 1), np.uint8)
    (place / "turned").mkdir()
    for i, image in enumerate(wide):
        kept = Image.fromarray(np.rot90(image.squeeze()))  # stored upright, shown a quarter turn to the right
        exif = kept.getexif()
        exif[0x0112] = 6
        kept.save(place / "turned" / f"{i}.png", exif=exif)
    np.savez(place / "wide.npz", images=wide)
    given = ("score", place / "wide.npz", place / "turned", "--features", place / "any.onnx", *NAMES, "--json")
    assert json.loads(run(*given).stdout)["frechet"]["value"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("x.npz real --features no.onnx", "no.onnx is no ONNX file that onnxruntime can run"),
        ("x.npz real --features gone.onnx", "gone.onnx does not exist: give an ONNX file"),
        ("x.npz real --features e.onnx", "has the outputs pool, fc, and none is called features: say which is"),
        ("x.npz real --features e.onnx --names pool", "--names pool is not features=NAME,logits=NAME"),
        ("x.npz real --features e.onnx --names features=", "is not features=NAME,logits=NAME"),
        (
            "x.npz real --features e.onnx --names features=nine",
            "has no output 'nine' for its features: it has pool, fc",
        ),
        (
            "x.npz real --features quiet.onnx --names features=pool",
            "quiet.onnx does not say what range its images have",
        ),
        ("x.npz real --features e.onnx --range 1", "range '1' is not two numbers, LOW,HIGH"),
        ("x.npz real --features nine.onnx --names features=pool", "nine.onnx takes images of 9 × 9, these are 8 × 8"),
        ("real real --features nine.onnx --names features=pool", "0.png is 8 × 8, not 9 × 9: crop or resize it"),
        ("x.npz real --features rgb.onnx --names features=pool", "rgb.onnx takes images of 3 channels, these have 1"),
        ("colour.npz real --features e.onnx --names features=pool", "e.onnx takes images of 1 channels, these have 3"),
        ("real real --features four.onnx --names features=pool", "takes images of 4 channels, pictures have 1 or 3"),
        ("few.npz real --features e.onnx --names features=pool", "3 samples are too few for 3 features: .* singular"),
        ("x.npz few.npz --features e.onnx --names features=pool", "3 real images are too few for 3 features"),
        ("x.npz gone --features e.onnx --names features=pool", "gone does not exist: give an .npz that epsrt sample"),
        ("x.npz empty --features e.onnx --names features=pool", "empty is a folder without pictures"),
        ("latents.npz real --features e.onnx --names features=pool", "latents.npz holds no images: give an .npz"),
        ("floats.npz real --features e.onnx --names features=pool", "images float32 .*, not uint8 .n, H, W, C."),
        ("no.onnx real --features e.onnx --names features=pool", "no.onnx is no picture that can be read"),
        ("x.npz real --features e.onnx --names features=pool --k 0", "--k 0 neighbours: give at least 1"),
        ("x.npz real --features e.onnx --names features=pool --resamples 1", "--resamples 1: give at least 2"),
        ("x.npz real --features e.onnx --names features=pool --batch 0", "--batch 0: give at least 1"),
        ("x.npz real --features e.onnx --names features=pool --seed -1", "--seed -1 is outside 0"),
        ("x.npz real --features e.onnx --names features=pool --threads 0", "--threads 0 is outside 1 …"),
        ("colour.npz real --features any.onnx --names features=pool", "any.onnx takes images of 1 channels"),
    ],
)
def test_score_refuses(place: Path, refused: Refused, arguments: str, sentence: str) -> None:
    line = refused("score", *shlex.split(arguments), cwd=place)
    assert re.search(sentence, line), line


def test_images_of_two_sizes_are_refused(place: Path, refused: Refused) -> None:
    folder(place / "large", np.zeros((5, 9, 9), np.uint8))
    line = refused("score", "x.npz", "large", "--features", "any.onnx", *NAMES, cwd=place)
    assert "0.png is 9 × 9, not 8 × 8: crop or resize it" in line
    np.savez(place / "large.npz", images=np.zeros((5, 9, 9, 1), np.uint8))
    line = refused("score", "x.npz", "large.npz", "--features", "any.onnx", *NAMES, cwd=place)
    assert "x.npz has images 8 × 8 × 1, large.npz 9 × 9 × 1: they must be of one size" in line
