"""epsrt bound as its users type it. What it computes, tests/export/test_bound.py checks."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from command_line import refusal, run
from PIL import Image

from epsrt_export.bound import variational_bound
from epsrt_trainer.data import load
from helpers import run_python

bound, refused = partial(run, "bound"), partial(refusal, "bound")
FEW = ("--data", "digits", "--images", 6, "--timesteps", 8)


def test_help_has_examples() -> None:
    text = bound("--help").stdout
    assert "Examples" in text
    assert "epsrt bound" in text


def test_the_table_adds_up(checkpoint_path: Path, tmp_path: Path) -> None:
    done = bound(checkpoint_path, *FEW, cwd=tmp_path)
    rows = [line.split() for line in done.stdout.splitlines()]
    figures = {" ".join(row[:-2]): float(row[-2]) for row in rows if row and row[0] in ("L_T", "L_t−1", "L_0", "total")}
    assert len(figures) == 13
    assert list(figures)[:2] == ["L_T", "L_t−1 91 … 99"]
    assert list(figures)[-3:] == ["L_t−1 1 … 10", "L_0 0", "total"]
    total = figures.pop("total")
    assert total == pytest.approx(sum(figures.values()), abs=1e-3)
    assert "6 images of 17 grey levels, 8 of 100 timesteps, fixed_small" in done.stdout
    assert "p(x0 | label)" in done.stdout
    assert not list(tmp_path.iterdir())


def test_json_is_what_python_gives(checkpoint_path: Path) -> None:
    made = json.loads(bound(checkpoint_path, *FEW, "--seed", 5, "--variance", "fixed_large", "--json").stdout)
    data, index = load("digits"), np.arange(6) * 1797 // 6
    expected = variational_bound(
        checkpoint_path, data.images[index], data.labels[index], timesteps=8, seed=5, variance="fixed_large"
    )
    by_name = {row["term"]: row for row in made["rows"]}
    assert by_name["total"]["bits"] == pytest.approx(expected.total.mean, rel=1e-4)
    assert by_name["total"]["error"] == pytest.approx(expected.total.error, rel=1e-3)
    assert [point["t"] for point in made["curve"]] == expected.t.tolist()
    assert [point["mse"] for point in made["curve"]] == pytest.approx(expected.mse.tolist(), rel=1e-3)
    assert (made["levels"], made["T"], made["seed"], made["variance"]) == (17, 100, 5, "fixed_large")


def test_one_image_has_no_error(checkpoint_path: Path) -> None:
    arguments = (checkpoint_path, "--data", "digits", "--images", 1, "--timesteps", 3)
    assert "–" in bound(*arguments).stdout
    text = bound(*arguments, "--json").stdout
    assert "NaN" not in text
    assert json.loads(text)["rows"][-1]["error"] is None


def test_bytes_have_256_levels(checkpoint_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "bytes.npz"
    np.savez(file, images=np.full((4, 8, 8), 200, np.uint8), labels=np.arange(4))
    made = json.loads(bound(checkpoint_path, "--data", file, "--timesteps", 3, "--json").stdout)
    assert (made["levels"], made["images"]) == (256, 4)


def test_draws_the_curve(checkpoint_path: Path, tmp_path: Path) -> None:
    for name in ("curve.png", "curve.SVG", "again.SVG"):
        done = bound(checkpoint_path, *FEW, "--out", tmp_path / name)
        assert name in done.stdout
    with Image.open(tmp_path / "curve.png") as picture:
        picture.load()
        assert picture.size == (1200, 675)
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50
    svg = (tmp_path / "curve.SVG").read_bytes()
    assert svg.startswith(b"<?xml")
    assert svg == (tmp_path / "again.SVG").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.SVG", "curve.SVG", "curve.png"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--variance", "learned"), "variance 'learned' is unknown"),
        (("--timesteps", 0), "--timesteps 0 is outside 3 … 100"),
        (("--images", 0), "--images 0 is outside 1 … 1797"),
        (("--images", 1798), "--images 1798 is outside 1 … 1797"),
        (("--levels", 9), "lie between the 9 levels"),
        (("--seed", -1), "seed -1 is not"),
        (("--batch", 0), "--batch 0"),
        (("--size", 8), "a size, and leaving out what is broken, are for image folders"),
        (("--data", "nowhere"), "nowhere does not exist"),
        (("--out", "curve.jpeg"), "the suffix of a chart must be .png or .svg"),
        (("--out", "."), "the suffix of a chart must be"),
    ],
)
def test_refuses(checkpoint_path: Path, tmp_path: Path, arguments: tuple[object, ...], sentence: str) -> None:
    target = () if "--out" in arguments else ("--out", tmp_path / "never.png")
    assert sentence in refused(checkpoint_path, *FEW, *target, *arguments)
    assert not list(tmp_path.iterdir())


def test_refuses_files_that_do_not_fit(checkpoint_path: Path, tmp_path: Path) -> None:
    assert "none.safetensors does not exist" in refused(tmp_path / "none.safetensors", *FEW)
    images = np.zeros((3, 8, 8), np.uint8)
    np.savez(tmp_path / "bare.npz", images=images)
    sentence = refused(checkpoint_path, "--data", tmp_path / "bare.npz")
    assert "the network has 10 classes but the images no labels" in sentence
    np.savez(tmp_path / "large.npz", images=np.zeros((3, 9, 9), np.uint8), labels=np.arange(3))
    assert "shape [1, 9, 9] but the network takes [1, 8, 8]" in refused(
        checkpoint_path, "--data", tmp_path / "large.npz"
    )
    (tmp_path / "folder.png").mkdir()
    assert "is a directory" in refused(checkpoint_path, *FEW, "--out", tmp_path / "folder.png")


def test_without_matplotlib_one_sentence_before_any_work(checkpoint_path: Path, tmp_path: Path) -> None:
    code = "import sys; from epsrt_command import main; sys.argv[0] = 'epsrt'; main()"
    arguments = ("bound", checkpoint_path, *FEW)
    done = run_python(code, *arguments, "--out", tmp_path / "never.png", blocked=("matplotlib", "torch"))
    assert done.returncode == 1
    assert done.stderr.strip() == 'epsrt: a chart needs matplotlib: pip install "epsrt[charts]"'
    assert not list(tmp_path.iterdir())
    done = run_python(code, *arguments, blocked=("torch",))
    assert done.stderr.strip() == 'epsrt: epsrt bound needs torch: pip install "epsrt[export,train]"'
    assert run_python(code, *arguments, blocked=("matplotlib",)).returncode == 0
