"""epsrt plan, and every method through epsrt sample."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import refusal, run
from PIL import Image

from epsrt import Sampler, Schedule
from epsrt.solvers import METHODS, make


def test_the_list_names_every_method_with_its_order_and_paper() -> None:
    text = run("plan", "--list").stdout
    for name, method in METHODS.items():
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
        assert line.split()[1:3] == [str(method.order), method.evaluations]
        assert "arXiv" in line
    listed = json.loads(run("plan", "--list", "--json").stdout)
    assert [m["method"] for m in listed] == list(METHODS)
    assert listed[4]["options"] == {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": None, "s_noise": 1.0}


def test_plan_prints_its_rows() -> None:
    text = run("plan", "--method", "dpmpp-2m", "--steps", 20).stdout
    rows = [line.split() for line in text.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    assert len(rows) == 20
    plan = make("dpmpp-2m", Schedule(), steps=20)
    assert [float(row[2]) for row in rows] == plan["t"].tolist()
    head = text.splitlines()[0].split()
    assert head == ["row", "λ", "t", "p", "q", "clip", "a", "b", "c", "f"]
    assert float(rows[7][head.index("b")]) == pytest.approx(plan["b"][7], rel=1e-4)
    assert len({len(line) for line in text.splitlines()[:21]}) == 1  # columns stand below each other
    assert "dpmpp-2m: 20 rows, x begins as 1·z" in text


def test_plan_json_holds_the_table() -> None:
    report = json.loads(
        run(
            "plan",
            "--method",
            "heun",
            "--schedule",
            "ve",
            "--prediction",
            "edm",
            "--spacing",
            "karras",
            "--steps",
            5,
            "--set",
            "s_churn=2",
            "--set",
            "rho=5",
            "--json",
        ).stdout
    )
    plan = make("heun", Schedule("ve"), steps=5, spacing="karras", prediction="edm", s_churn=2.0, rho=5)
    table = np.array([list(row.values()) for row in report["rows"]])
    np.testing.assert_array_equal(table, plan.table)
    assert report["start"] == list(plan.start)
    assert report["sigma"][0] > 80


def test_plan_takes_what_a_bundle_says(bundle_path: Path) -> None:
    report = json.loads(run("plan", "--method", "ddim", "--steps", 7, "--bundle", bundle_path, "--json").stdout)
    with Sampler.open(bundle_path) as sampler:
        plan = sampler.plan("ddim", 7)
    assert report["rows"][3]["q"] == plan["q"][3]
    assert report["timesteps"] == plan["t"].tolist()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--method", "dpmpp-2m", "--spacing", "karras"),
        ("--method", "heun", "--schedule", "ve", "--prediction", "edm"),
        ("--method", "flow-heun", "--schedule", "flow", "--prediction", "velocity"),
        ("--method", "ddim-inversion", "--timesteps", "900.5,400,20"),
        ("--method", "ddpm", "--spacing", "ddim25", "--variance", "fixed_large"),
    ],
)
def test_plan_is_drawn(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    out = tmp_path / "plan.png"
    run("plan", *arguments, "--out", out)
    image = Image.open(out)
    assert image.size[0] > 800
    assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20  # more than a blank sheet


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--method", "dpm2m"), "method 'dpm2m' is unknown: did you mean dpmpp-2m"),
        (("--method", "plms"), "method 'plms' is not offered: it needs more of the past"),
        (("--spacing", "karas"), "spacing 'karas' is unknown: did you mean karras"),
        (("--schedule", "linaer"), "schedule kind 'linaer' is unknown"),
        (("--prediction", "eps"), "prediction 'eps' is unknown"),
        (("--method", "dpmpp-2m", "--eta", 0.3), "dpmpp-2m is deterministic and takes no option 'eta'"),
        (("--method", "dpmpp-2m", "--set", "s_churn=3"), "dpmpp-2m is deterministic and takes no option 's_churn'"),
        (("--set", "churn"), "--set 'churn' is not of the form NAME=VALUE"),
        (("--set", "spacing=karras"), "--set spacing: it has an option of its own"),
        (("--set", "rederive=maybe", "--set", "rederive=true"), "--set rederive was given twice"),
        (("--set", "prediction=v"), "--set prediction: it has an option of its own, or is the bundle's"),
        (("--set", "manifest=3"), "--set manifest: it has an option of its own"),
        (("--timesteps", "9,5", "--steps", 2), "--timesteps says how many steps there are: leave --steps out"),
        (("--set", "eta=abc"), "--eta 'abc' is not a number"),
        (("--set", "eta=null"), "--eta None is not a number"),
        (("--set", "rederive=no"), "rederive = 'no' is not true or false"),
        (("--set", "clip=abc"), "clip = 'abc' is not a number"),
        (("--method", "heun", "--set", "s_churn=1e300"), "s_churn = 1e+300 is outside 0 … 1e6"),
        (("--method", "langevin", "--set", "each=10000"), "each = 10000 is outside 1 … 1000"),
        (("--spacing", "karras", "--set", "rho=null"), "rho = None is not a number"),
        (("--schedule", ""), "--schedule is empty: give it a value, or leave it out"),
        (("--timesteps", "9,x"), "--timesteps: 'x' is not a number"),
        (("--timesteps", "9,10"), "timestep 10 comes after 9"),
        (("--steps", 2000), "--steps 2000 is outside 1 … 1000"),
        (("--out", "plan.jpeg"), "the suffix of a chart must be .png or .svg"),
        (("--schedule", "flow"), "ε-prediction says nothing of x0 at t = 1000, where α = 0"),
    ],
)
def test_plan_refuses(tmp_path: Path, arguments: tuple[object, ...], sentence: str) -> None:
    assert sentence in refusal("plan", *arguments)
    assert not list(tmp_path.iterdir())


def test_set_reads_numbers_and_words() -> None:
    words = ("s_tmax=inf", "s_churn=1e1", "rho=5", "clip=none")
    ask = ("plan", "--method", "heun", "--spacing", "karras", "--steps", 4, *(w for s in words for w in ("--set", s)))
    report = json.loads(run(*ask, "--json").stdout)
    plan = make("heun", Schedule(), steps=4, spacing="karras", rho=5, s_churn=10.0, clip=None)
    assert [row["d"] for row in report["rows"]] == plan["d"].tolist()
    assert run("plan", "--timesteps", "640.,1e2,.5").stdout.count("\n") >= 5


def test_a_bundle_and_a_schedule_contradict(bundle_path: Path) -> None:
    assert "--bundle says which schedule" in refusal("plan", "--bundle", bundle_path, "--schedule", "cosine")


@pytest.mark.parametrize("method", [m for m in METHODS if m != "ddim-inversion"])
def test_every_method_samples(bundle_path: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "a.npz"
    report = json.loads(
        run("sample", bundle_path, "--method", method, "--steps", 5, "--labels", "3,4", "--out", out, "--json").stdout
    )
    assert report["method"] == method
    with Sampler.open(bundle_path) as sampler, np.load(out, allow_pickle=False) as file:
        np.testing.assert_array_equal(file["samples"], sampler.sample(method=method, steps=5, labels=[3, 4]))


def test_inversion_takes_the_images_that_sample_wrote(bundle_path: Path, tmp_path: Path) -> None:
    images, latents = tmp_path / "images.npz", tmp_path / "latents.npz"
    run("sample", bundle_path, "--steps", 5, "--labels", "3,4,5", "--out", images)
    ask = ("sample", bundle_path, "--method", "ddim-inversion", "--steps", 5, "--labels", "3,4,5")
    assert "begins from images" in refusal(*ask, "--out", latents)
    assert "does not exist" in refusal(*ask, "--init", tmp_path / "missing.npz", "--out", latents)
    (tmp_path / "bad.npz").write_bytes(b"PK nonsense")
    np.save(tmp_path / "array.npy", np.zeros((1, 1, 8, 8), np.float32))
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    np.savez(tmp_path / "pickle.npz", samples=np.array([{}], object))
    for name, words in (
        ("bad.npz", "is no .npz that can be read"),
        ("array.npy", "is no picture that can be read"),
        ("other.npz", "holds no samples"),
        ("pickle.npz", "is no .npz that can be read"),
    ):
        assert f"{name} {words}" in refusal(*ask, "--init", tmp_path / name, "--out", latents)
    np.savez(tmp_path / "none.npz", samples=np.zeros((0, 1, 8, 8), np.float32))
    assert "holds samples [0, 1, 8, 8], not" in refusal(*ask, "--init", tmp_path / "none.npz", "--out", latents)
    assert not latents.exists()
    run(*ask, "--init", images, "--out", latents)
    with np.load(latents, allow_pickle=False) as file:
        assert file["samples"].shape == (3, 1, 8, 8)


def test_sample_takes_options_of_methods_and_spacings(bundle_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    run(
        "sample",
        bundle_path,
        "--method",
        "heun",
        "--steps",
        4,
        "--spacing",
        "karras",
        "--set",
        "rho=5",
        "--set",
        "s_churn=1.5",
        "-n",
        2,
        "--no-clip",
        "--out",
        out,
    )
    with Sampler.open(bundle_path) as sampler, np.load(out, allow_pickle=False) as file:
        mine = sampler.sample(2, method="heun", steps=4, spacing="karras", rho=5, s_churn=1.5, clip=None)
        np.testing.assert_array_equal(file["samples"], mine)
    run("sample", bundle_path, "--timesteps", "90,50.5,3", "--set", "compatible=diffusers", "-n", 1, "--out", out)
