"""Networks that take more than a label, and samples that are not images, from the command line."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from PIL import Image

from conditional import KINDS, conditioned
from epsrt import Sampler
from epsrt_command.wording import in_options
from epsrt_export import export_network
from helpers import SCHEDULE

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def bundles(once: Callable[..., Path]) -> Callable[[str], Path]:
    """bundles(kind): a bundle of a network of tests/conditional.py."""

    def make(kind: str, out: Path) -> None:
        network, facts = conditioned(kind)
        export_network(network, SCHEDULE, out, precisions=["fp32"], max_batch=4, **facts)

    return lambda kind: once(f"cli-{kind.replace(' ', '-')}.epsrt", lambda out: make(kind, out))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "two.npz", context=rng.standard_normal((2, 5, 6)), other=np.zeros(3))
    np.save(tmp_path / "one.npy", rng.standard_normal((5, 6)))
    np.savez(tmp_path / "alone.npz", whatever=rng.standard_normal((1, 5, 6)))
    np.savez(tmp_path / "none.npz", a=np.zeros(3), b=np.zeros(3))
    return tmp_path


def samples(path: Path) -> Any:
    return np.load(path)["samples"]


class TestConditions:
    def test_files_are_what_python_is_given(self, bundles: Callable[[str], Path], files: Path) -> None:
        path, given = bundles("context"), np.load(files / "two.npz")["context"]
        options = ["--steps", "4", "--seed", "5", "--threads", "1", "--engine", "onnxruntime", "--out", "a.npz"]
        null = ["--guidance", "3", "--null-condition", "context=one.npy", "--null-condition", "seen=1,1,0,0,1"]
        run("sample", path, "--condition", "context=two.npz", *null, *options, cwd=files)
        against = {"context": np.load(files / "one.npy"), "seen": np.array([1, 1, 0, 0, 1], bool)}
        with Sampler.open(path, "onnxruntime", threads=1) as sampler:
            wanted = sampler.sample(
                steps=4, seed=5, guidance=3.0, conditions={"context": given}, null_conditions=against
            )
        np.testing.assert_array_equal(samples(files / "a.npz"), wanted)

    def test_an_archives_only_array_may_have_any_name(self, bundles: Callable[[str], Path], files: Path) -> None:
        run(
            "sample", bundles("context"), "--condition", "context=alone.npz", "-n", "2", "--steps", "2", "--out",
            "a.npz", cwd=files,
        )  # fmt: skip
        assert len(samples(files / "a.npz")) == 2

    def test_numbers_and_labels(self, bundles: Callable[[str], Path], tmp_path: Path) -> None:
        said = run(
            "sample", bundles("vector"), "--condition", "pooled=0.5,1,-1,0", "--condition", "rate=0.1,0.9", "--steps",
            "2", "--out", "a.npz", cwd=tmp_path,
        ).stdout  # fmt: skip
        assert said.startswith("a.npz: 2 images, ddim in 2 steps")  # one for each rate
        first, second = samples(tmp_path / "a.npz")
        assert np.abs(first - second).max() > 1e-3

    def test_pictures(self, bundles: Callable[[str], Path], tmp_path: Path, refused: Refused) -> None:
        path = bundles("image")  # two channels, which no picture has
        Image.new("L", (8, 8)).save(tmp_path / "a.png")
        what = "the bundle's images have 2 channels, a picture has not: give .npz"
        assert what in refused("sample", path, "--image", "a.png", cwd=tmp_path)
        np.savez(tmp_path / "low.npz", low=np.zeros((1, 2, 8, 8), np.float32))
        run("sample", path, "--image", "low.npz", "-n", "1", "--steps", "2", "--out", "b.png", cwd=tmp_path)
        assert (tmp_path / "b.png").is_file()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "needs the condition 'context', float [10, 5, 6]: give --condition context"),
            (["--condition", "context"], "--condition 'context' is not of the form NAME=VALUE"),
            (["--condition", "contex=one.npy"], "--condition contex is no condition of .*did you mean context?"),
            (["--condition", "context=gone.npz"], "gone.npz does not exist: give an .npz or .npy that has context"),
            (["--condition", "context=none.npz"], "none.npz has a, b, and no array context: rename one"),
            (["--condition", "context=1,2"], "--condition context=1,2: give an .npz or .npy that has it"),
            (["--condition", "context=one.npy", "--condition", "context=one.npy"], "context was given twice"),
            (["--condition", "context=one.npy", "--condition", "seen=0,1,2,1,1"], "a mask is 1 where a place counts"),
            (["--condition", "context=bad.npy"], "bad.npy is no .npy that can be read"),
            (["--condition", "context=one.npy", "--image", "a.png"], "has no condition of pixels: leave it out"),
            (["--condition", "context=none.npy"], "--condition context is float64 [3], not float [1, 5, 6]"),
            (["--null-condition", "rate=1", "--condition", "context=one.npy"], "rate is no condition of"),
            (["--condition", "context=one.npy", "--guidance", "2"], "'context' has no null of its own: give --null-"),
        ],
    )  # fmt: skip
    def test_what_does_not_fit_is_one_sentence(
        self, bundles: Callable[[str], Path], files: Path, refused: Refused, options: list[str], message: str
    ) -> None:
        (files / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00")
        np.save(files / "none.npy", np.zeros(3))
        line = refused("sample", bundles("context"), *options, cwd=files)
        for part in message.split(".*"):
            assert part in line

    def test_inspect_lists_them(self, bundles: Callable[[str], Path], tmp_path: Path) -> None:
        said = " ".join(run("inspect", bundles("context"), cwd=tmp_path).stdout.split())
        assert "context context, 5 × 6, float32, guided" in said
        assert "seen mask, 5, bool, guided, null True" in said


class TestOtherSamples:
    def test_sounds(self, bundles: Callable[[str], Path], tmp_path: Path, refused: Refused) -> None:
        path = bundles("signal")
        said = run("sample", path, "-n", "3", "--steps", "2", "--rate", "8000", cwd=tmp_path).stdout
        assert said.startswith("samples.wav: 3 samples, ddim in 2 steps")
        with wave.open(str(tmp_path / "samples.wav")) as sound:
            params = sound.getnchannels(), sound.getsampwidth(), sound.getframerate(), sound.getnframes()
            frames = np.frombuffer(sound.readframes(48), "<i2").reshape(48, 2)
        assert params == (2, 2, 8000, 48)
        run("sample", path, "-n", "3", "--steps", "2", "--out", "a.npz", cwd=tmp_path)
        drawn = samples(tmp_path / "a.npz")
        assert drawn.shape == (3, *KINDS["signal"][0])
        np.testing.assert_allclose(frames.reshape(3, 16, 2).swapaxes(1, 2) / 32768, drawn, atol=1e-4)
        run("sample", path, "-n", "3", "--steps", "2", "--out", "folder", cwd=tmp_path)
        assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["0.wav", "1.wav", "2.wav"]
        line = refused("sample", path, "--out", "a.png", cwd=tmp_path)
        assert "--out a.png: samples [2, 16] make no picture: write .npz" in line
        assert "make no picture: leave it out" in refused("sample", path, "--trajectory", "a.gif", cwd=tmp_path)
        line = refused("sample", path, "--latents", "a.npz", "--size", "5", cwd=tmp_path)
        assert "a.npz is 16, not 5: crop or resize it" in line

    def test_volumes(self, bundles: Callable[[str], Path], tmp_path: Path) -> None:
        path = bundles("volume")
        for name in ("a.png", "a.gif", "folder", "a.npz"):
            run("sample", path, "-n", "2", "--steps", "2", "--out", name, cwd=tmp_path)
        assert samples(tmp_path / "a.npz").shape == (2, 1, 4, 6, 8)
        width, height = Image.open(tmp_path / "a.png").size
        assert (width, height) == (4 * (8 * 8 + 2) + 2, 2 * (6 * 8 + 2) + 2)  # a row a sample, magnified eight times
        assert Image.open(tmp_path / "a.gif").n_frames == 4
        assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["0.gif", "1.gif"]

    def test_latents_and_known_parts_of_them(self, bundles: Callable[[str], Path], tmp_path: Path) -> None:
        path, context = bundles("label and context"), ("--condition", "context=c.npy", "--labels", "1")
        np.save(tmp_path / "c.npy", np.random.default_rng(2).standard_normal((5, 6)))
        run("sample", path, *context, "-n", "2", "--steps", "4", "--out", "a.npz", cwd=tmp_path)
        said = run("invert", path, "--init", "a.npz", *context, "--steps", "4", "--out", "z.npz", cwd=tmp_path).stdout
        told = said.splitlines()[-1].removeprefix("draw them by: epsrt ").split()
        assert told[-2:] == ["--condition", "context=c.npy"]
        run(*told, "--out", "b.npz", cwd=tmp_path)
        assert samples(tmp_path / "b.npz").shape == (2, 1, 8, 8)
        run("interpolate", path, "--latents", "z.npz", *context, "--frames", "3", "--steps", "2", cwd=tmp_path)
        assert (tmp_path / "strip.png").is_file()

    def test_a_walk_between_sounds(self, bundles: Callable[[str], Path], tmp_path: Path) -> None:
        run("interpolate", bundles("signal"), "--seeds", "1,2", "--frames", "3", "--steps", "2", "--out", "a.wav",
            cwd=tmp_path)  # fmt: skip
        with wave.open(str(tmp_path / "a.wav")) as sound:
            assert sound.getnframes() == 3 * 16


def test_a_sentence_names_the_options() -> None:
    options = {"condition": "--condition", "null_condition": "--null-condition", "labels": "--labels"}
    for sentence, wanted in {
        "a needs 'c': give conditions={'c': …}": "a needs 'c': give --condition c",
        "give null_conditions={'c': …}, or guidance=1": "give --null-condition c, or guidance=1",
        "conditions['c'] is float64 [3]": "--condition c is float64 [3]",
        "null_conditions has 'c', and": "--null-condition has 'c', and",
    }.items():
        assert in_options(sentence, options) == wanted
