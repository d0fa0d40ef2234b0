"""benchmarks/quality.py: what is drawn and kept, its arithmetic, its features, and all of it once on a tiny bundle."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epsrt import Bundle, Sampler, open_engine
from epsrt.score.features import Extractor

ROOT = Path(__file__).parents[1]
N = 100  # more than the classifier's 64 features


@pytest.fixture(autouse=True, scope="module")
def benchmarks() -> Iterator[None]:
    """benchmarks/ and examples/ on the path, as for the script."""
    places = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
    sys.path[:0] = places
    yield
    for place in places:
        sys.path.remove(place)


@pytest.fixture(scope="module")
def small(bundle_path: Path) -> Iterator[Sampler]:
    """T = 100, at most 8 at once."""
    with Sampler(open_engine(Bundle.open(bundle_path), "onnxruntime", precision="fp32", threads=1)) as sampler:
        yield sampler


@pytest.fixture
def work(tmp_path: Path, benchmarks: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of work with the features of a classifier that was hardly trained."""
    import quality_features

    monkeypatch.setattr(quality_features, "STEPS", 20)
    quality_features.extractor(tmp_path / "features.onnx", threads=1)
    return tmp_path


# Points


def test_the_points_are_fifteen_million_steps_of_images_and_the_bundles_own():
    from quality import points

    found = points()
    assert len({p.name for p in found}) == len(found) == 4 * 12 + 4
    steps = {p.name: p.steps * p.n for p in found}
    clipped = ("rederived", "own_eps")
    assert sum(v for name, v in steps.items() if not name.startswith(clipped)) == 2 * 5 * 180 * 5000 + 3 * 1000 * 2000
    assert {p.n for p in found if p.steps == 1000} == {2000}


def test_a_points_plan_is_the_papers(small):
    from quality_points import Point

    def plan(sampler: str, spacing: str = "trailing") -> Any:
        return Point(sampler, spacing, 10, N).plan(small)

    def same(a: Any, b: Any) -> bool:
        return bool(np.array_equal(a.table, b.table))

    assert same(plan("eta_0.5"), small.plan("ddim", 10, eta=0.5, clip=None, rederive=False))
    assert not same(plan("eta_0.5"), plan("eta_0.2"))
    assert not same(plan("eta_0.0"), plan("eta_0.0", "quadratic"))
    assert same(plan("sigma_hat"), small.plan("ddpm", 10, spacing="trailing", variance="fixed_large", clip=1.0))
    assert same(plan("rederived"), small.plan("ddim", 10))  # the bundle's own
    assert same(plan("own_eps"), small.plan("ddim", 10, rederive=False))
    assert not same(plan("own_eps"), plan("eta_0.0"))
    assert not same(plan("own_eps"), plan("rederived"))
    assert list(Point("eta_0.0", "all", 100, N).plan(small)["t"]) == list(range(99, -1, -1))


# What is drawn


def test_what_was_killed_goes_on_and_ends_the_same(small, tmp_path, monkeypatch):
    import quality_points
    from quality_points import Point, draw

    point, far = Point("eta_1.0", "trailing", 4, N), float("inf")
    monkeypatch.setattr(quality_points, "CHUNK", 3)
    whole = draw(point, small, tmp_path / "whole", far)
    want = small.to_images(
        small.sample(N, plan=point.plan(small), seed=quality_points.SEED, labels=[i % 10 for i in range(N)])
    )
    np.testing.assert_array_equal(whole.images, want)

    class Killed(Exception):
        pass

    def kill(n: int) -> None:
        if n >= 48:
            raise Killed

    with pytest.raises(Killed):
        draw(point, small, tmp_path / "killed", far, kill)
    drawn: list[int] = []
    again = draw(point, small, tmp_path / "killed", far, drawn.append)
    assert drawn == [72, 96, 100]
    np.testing.assert_array_equal(again.images, want)
    assert again.wall > 0
    assert again.cpu > 0


def test_samples_of_another_engine_are_taken_whole_alone(small, tmp_path, monkeypatch):
    import quality_points
    from quality_points import Point, draw

    monkeypatch.setattr(quality_points, "CHUNK", 3)
    few, point, drawn = Point("eta_0.0", "trailing", 4, 24), Point("eta_0.0", "trailing", 4, 48), []
    draw(few, small, tmp_path, float("inf"))
    monkeypatch.setattr(small.engine, "name", "another")
    assert draw(few, small, tmp_path, float("inf"), drawn.append).engine == "onnxruntime"
    assert draw(point, small, tmp_path, float("inf"), drawn.append).engine == "another"
    assert drawn == [24, 48]
    assert len(draw(few, small, tmp_path, float("inf"), drawn.append).images) == 24
    monkeypatch.setattr(quality_points, "SEED", 9)
    draw(few, small, tmp_path, float("inf"), drawn.append)
    assert drawn == [24, 48, 24]


def test_the_time_is_kept(small, tmp_path):
    from quality_points import Point, draw

    assert draw(Point("eta_0.0", "trailing", 4, N), small, tmp_path, before=0.0) is None


# What is kept


def test_rows_have_one_place_by_name_and_precision(tmp_path):
    from quality import Results

    results = Results(tmp_path)
    first = {"name": "eta_0.0-trailing-20", "plan": "a", "engine_precision": "fp32"}
    results.keep(first)
    results.keep({**first, "engine_precision": "bf16"})
    results.keep({**first, "name": "eta_0.0-trailing-10"})
    Results(tmp_path).keep({**first, "plan": "b"})  # another run
    assert [(r["name"], r["plan"], r["engine_precision"]) for r in results.rows] == [
        ("eta_0.0-trailing-10", "a", "fp32"),
        ("eta_0.0-trailing-20", "a", "bf16"),
        ("eta_0.0-trailing-20", "b", "fp32"),
    ]
    assert results.has("eta_0.0-trailing-20", {"plan": "b"})
    assert not results.has("eta_0.0-trailing-20", {"plan": "c"})
    assert not results.has("eta_0.0-trailing-50", {"plan": "b"})
    assert Results(tmp_path, fresh=True).rows == []


# Ratios and the paper


def rows() -> list[dict[str, Any]]:
    """Distances of 10 · (steps / 1000)^-½, of which 1 is bias."""
    from quality import points

    made = []
    for point in points():
        value = 10 * (1000 / point.steps) ** 0.5
        figure = {"value": value, "low": value - 0.5, "high": value + 0.5, "bias": 1.0}
        made.append(
            {
                "name": point.name,
                "sampler": point.sampler,
                "spacing": point.spacing,
                "steps": point.steps,
                "n": point.n,
                "engine_precision": "fp32",
                "frechet": figure,
                "first": {"frechet": figure},
            }
        )
    return made


def test_the_rule_is_table_1s():
    from quality_paper import RULE, theirs

    for speedup, percent in RULE.items():
        assert percent == round(100 * (theirs("eta_0.0", 1000 // speedup) / theirs("eta_0.0", 1000) - 1))


def test_ratios_are_of_what_is_left_without_bias():
    from quality_paper import comparison, ratio_to_full

    assert ratio_to_full(rows(), "eta_0.0", "quadratic", 10) == pytest.approx((100 - 1) / (10 - 1))
    without = [r for r in rows() if r["name"] != "eta_0.0-all-1000"]
    assert ratio_to_full(without, "eta_0.0", "quadratic", 10) is None
    other = [{**r, "engine_precision": "bf16"} for r in rows()]
    assert ratio_to_full(other, "eta_0.0", "quadratic", 10) is None
    lines = comparison(rows())
    assert {len(line) for line in lines} == {13}
    assert lines[1][:4] == ["η = 0", "11.00", "11.00", "3.31"]
    assert "–" in comparison(without)[1]


def test_the_chart_is_drawn_of_what_there_is(tmp_path):
    from PIL import Image
    from quality_chart import draw_chart

    draw_chart([], tmp_path / "none.png")
    draw_chart(rows(), tmp_path / "all.png")
    none, whole = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) for name in ("none", "all"))
    assert none.shape == whole.shape
    assert (none != whole).mean() > 0.005


# The features


def test_the_classifier_is_deterministic_and_small(work, tmp_path):
    import quality_features

    again = tmp_path / "again.onnx"
    made, held_out = quality_features.extractor(again, threads=1)
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256((work / "features.onnx").read_bytes()).digest()
    real = made(quality_features.real_digits())
    assert real.features.shape == (1797, 64)
    assert real.probabilities.shape == (1797, 10)
    assert made.value_range == (-1, 1)
    assert 0.3 < held_out <= 1  # of 20 steps of training
    seen, held = quality_features.split()
    assert not set(seen) & set(held)
    assert len(seen) + len(held) == 1797


def test_figures_of_the_first_samples_are_theirs_alone(work, small, monkeypatch):
    import quality_points
    from quality_features import real_digits

    extractor = Extractor(work / "features.onnx", threads=1)
    real = extractor(real_digits())
    monkeypatch.setattr(quality_points, "FIRST", 300)
    monkeypatch.setattr(quality_points, "RESAMPLES", 20)
    row = quality_points.measure(real_digits()[:600], extractor, real, None)
    first = quality_points.measure(real_digits()[:300], extractor, real, None)
    assert row["first"]["frechet"] == first["frechet"] == first["first"]["frechet"]
    assert row["frechet"]["value"] < first["frechet"]["value"]


# All of it


def test_all_of_it_once_and_then_nothing_again(bundle_path, work, monkeypatch, capsys):
    import quality
    import quality_points

    monkeypatch.setattr(quality_points, "RESAMPLES", 5)
    monkeypatch.setattr(quality, "SPLITS", 2)
    given = [
        "quality.py",
        "--engine",
        "onnxruntime",
        "--threads",
        "1",
        "--bundle",
        bundle_path,
        "--results",
        work,
        "--work",
        work,
        "--chart",
        work / "chart.png",
        "--samples",
        N,
        "--only",
        "*-trailing-10",
    ]
    monkeypatch.setattr(sys, "argv", [str(word) for word in given])
    quality.main()
    out = capsys.readouterr().out
    assert "eta_0.5-trailing-10, 100: frechet" in out
    kept = json.loads((work / "quality.json").read_text())
    points = [r for r in kept["rows"] if "sampler" in r]
    assert [r["name"].split("-")[0] for r in points] == [
        "eta_0.0",
        "eta_0.2",
        "eta_0.5",
        "eta_1.0",
        "sigma_hat",
        "rederived",
        "own_eps",
    ]
    for row in points:
        assert (row["n"], row["engine"], row["engine_precision"]) == (N, "onnxruntime", "fp32")
        assert row["frechet"]["low"] <= row["frechet"]["value"] <= row["frechet"]["high"]
        assert 1 <= row["classes"]["value"] <= 10
        assert all(0 <= row[name]["value"] <= 1 for name in ("precision", "recall", "accuracy"))
        assert row["cpu_seconds"] > 0
        assert row["images_per_second"] > 0
    real = {r["name"]: r for r in kept["rows"] if "sampler" not in r}
    assert real["real digits"]["frechet"]["value"] == pytest.approx(0, abs=1e-6)
    assert real["real digits"]["precision"]["value"] == 1
    assert real["half against half"]["splits"] == 2
    assert 0.9 < real["classifier and judge"]["judge_held_out"] <= 1
    assert (work / "chart.png").exists()

    def never(*arguments: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(quality, "draw", never)
    quality.main()
    assert json.loads((work / "quality.json").read_text())["rows"] == kept["rows"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--samples", "70"])
    with pytest.raises(AssertionError, match="drawn again"):
        quality.main()
    monkeypatch.setattr(quality, "draw", quality_points.draw)
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-2], "--only", "eta_0.0-quadratic-20", "--minutes", "0"])
    capsys.readouterr()
    quality.main()
    assert "the time did not reach eta_0.0-quadratic-20: run it again, it goes on" in capsys.readouterr().out
