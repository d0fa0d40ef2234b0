"""Paths that are no files, or not to be written: one sentence each, and nothing is begun, waited for or damaged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import run

from epsrt import Bundle
from helpers import forge

Refused = Callable[..., str]
WAY_OUT = "give an .npz that epsrt sample wrote"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("pipe.npz", "pipe.png"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "pipe.png")
    for name in ("loop", "loop.png", "loop.npz"):
        (tmp_path / name).symlink_to(name)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--init pipe.npz", f"pipe.npz is no file: {WAY_OUT}"),
        ("--init pipe.png", f"pipe.png is no file: {WAY_OUT}"),
        ("--init pipes", "pipes is a folder without pictures"),
        ("--init loop.png", f"loop.png does not exist: {WAY_OUT}"),
        ("--latents pipe.npz", f"pipe.npz is no file: {WAY_OUT}"),
        ("--latents loop.npz", f"loop.npz does not exist: {WAY_OUT}"),
        ("--known known.png --mask pipe.png", f"known.png does not exist: {WAY_OUT}"),
        ("--out pipe.png", "--out pipe.png is no file: choose another name"),
        ("--out folder.png", "--out folder.png is a directory: choose another name"),
        ("--out file/a.png", "cannot be written to"),
        ("--out file", "--out file exists and is not an empty folder"),
        ("--out -", "- is no file: epsrt reads and writes files, no pipes, so give a name, ./- for this one"),
        ("--out=-", "- is no file: epsrt reads and writes files, no pipes"),
        ("--trajectory pipe.png", "--trajectory pipe.png is no file: choose another name"),
    ],
)
def test_sample_refuses(refused: Refused, bundle_path: Path, folder: Path, options: str, sentence: str) -> None:
    before = sorted(folder.rglob("*"))
    assert sentence in refused("sample", bundle_path, "--steps", 2, *options.split(), cwd=folder)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "command",
    [
        "sample B -o B/a.png",
        "sample B -o B/deep/a.npz",
        "sample B --trajectory B/a.png",
        "invert B --init x.npz --out B/a.npz",
        "interpolate B --seeds 1,2 --out B/folder",
        "plan --bundle B --out B/a.svg",
        "bench B --out B/a.json",
        "bench B --share B/a.json",
    ],
)
def test_nothing_is_written_into_a_bundle(refused: Refused, bundle_path: Path, tmp_path: Path, command: str) -> None:
    """It could not be opened any more."""
    shutil.copytree(bundle_path, tmp_path / "B")
    said = refused(*command.split(), cwd=tmp_path)
    assert "lies in the bundle B, which it would damage: choose another folder" in said
    Bundle.open(tmp_path / "B")


def test_names_are_shown_as_they_would_not_be_obeyed(refused: Refused, bundle_path: Path, tmp_path: Path) -> None:
    for name in ("a\x1b[31mb", "a\nb", "a\u202eb", "a\udcffb", "a\x9bb"):
        line = refused("inspect", f"{name}.epsrt", cwd=tmp_path)
        assert name.encode("unicode_escape").decode() in line
        assert line.isprintable()
    assert len(refused("inspect", "x" * 100_000, cwd=tmp_path)) < 2100


def test_what_a_bundle_says_of_itself_is_shown_and_not_obeyed(bundle_path: Path, tmp_path: Path) -> None:
    def strange(manifest: dict[str, Any]) -> None:
        manifest["class_names"] = ["\x1b]0;yours\x07", *map(str, range(9))]
        manifest["provenance"] |= {"source": "\x1b[2J\u202egnp.exe", "notes": ["a\rb"]}

    path = tmp_path / "a\x1b[31m.epsrt"
    shutil.copytree(bundle_path, path)
    forge(path, strange)
    text = run("inspect", path).stdout
    for shown in (r"\x1b]0;yours\x07", r"\x1b[2J\u202egnp.exe", r"a\rb", r"a\x1b[31m.epsrt"):
        assert shown in text
    assert not set("\x1b\x07\r\u202e") & set(text)


def test_a_checkpoint_s_path_is_text(tmp_path: Path, refused: Refused) -> None:
    """Known before the training, after which safetensors would refuse it."""
    out = os.fsdecode(b"d\xff/n.safetensors")
    assert r"d\udcff/n.safetensors is no UTF-8, and so no path" in refused("train", "--out", out, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
