"""docs/how-to/guide-and-edit.md: its Python and its commands run, its pictures exist."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence
from sklearn.datasets import load_digits
from typer.main import get_command

from epsrt.request import Arguments
from epsrt_command.app import app
from helpers import tiny

DOCS = Path(__file__).parents[1] / "docs" / "how-to"
PAGE = (DOCS / "guide-and-edit.md").read_text()
COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"^    (epsrt .*)$", PAGE, re.MULTILINE)]
RUN = [words for words in COMMANDS if words[0] not in ("train", "export")]  # those take minutes


@pytest.fixture(scope="module")
def folder(edited_bundle_path, schedule, tmp_path_factory):
    """Where the page's files are: small bundles under their names, and ten real digits."""
    from epsrt_export import export_network

    folder = tmp_path_factory.mktemp("editing")
    out, real = folder / "out", folder / "out" / "real"
    real.mkdir(parents=True)
    shutil.copytree(edited_bundle_path, out / "gallery.epsrt")
    for digit, image in enumerate(load_digits().images[:10]):
        Image.fromarray((image / 16 * 255).astype(np.uint8)).save(real / f"{digit}.png")
    export_network(
        tiny(seed=3, classes=11),
        schedule,
        out / "canvas.epsrt",
        shape=(1, 8, 8),
        classes=10,
        null_label=10,
        masked=True,
        sizes=(2, 16),
        precisions=("fp32",),
        max_batch=4,
    )
    return folder


@pytest.fixture(scope="module")
def names(folder):
    """What the page's Python leaves."""
    names: dict[str, object] = {"__name__": "editing"}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(block, names)
    yield names
    names["sampler"].close()


def test_the_pages_python_runs(names):
    assert names["x"].shape == (4, 1, 12, 12)
    assert np.array_equal(names["x"][..., 2:10, 2:10], np.repeat(names["real"][[3]], 4, 0))
    assert names["again"].shape == names["real"].shape
    assert np.square((names["again"] - names["real"]) / 2).mean() < 0.05
    assert names["strip"].shape == (9, 1, 8, 8)
    assert names["images"].shape == (4, 8, 8, 1)


def test_the_pages_commands_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert {words[0] for words in RUN} == {"sample", "invert", "interpolate"}
    for words in RUN:
        app(words, standalone_mode=False)
        said = capsys.readouterr().out
        (out,) = re.findall(r"^(\S+?\.(?:png|gif|npz)): ", said)[:1]
        assert (folder / out).exists(), words


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:3]))
def test_the_commands_options_exist(words):
    known = {name for p in get_command(app).commands[words[0]].params for name in p.opts}
    assert {word for word in words if word.startswith("-") and not word[1:2].isdigit()} <= known


def test_the_options_that_the_text_names_exist():
    commands = get_command(app).commands
    known = {name for c in ("sample", "export") for p in commands[c].params for name in (*p.opts, *p.secondary_opts)}
    assert set(re.findall(r"`(--[a-z-]+)`", PAGE)) <= known
    table = re.search(r"\n\| feature .*?\n\n", PAGE, re.DOTALL)
    arguments = {*Arguments.__annotations__, "invert", "latents", "stream", "slerp"}
    for row in table[0].strip().splitlines()[2:]:
        for name in re.findall(r"`([a-z_]+)`", row.split("|")[2]):
            assert name in arguments


def test_the_pictures_and_links_exist():
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PAGE)
    assert len(shown) >= 10
    for name in shown:
        path = DOCS / name
        assert path.stat().st_size < 100_000, name
        with Image.open(path) as picture:
            assert len(list(ImageSequence.Iterator(picture))) > (10 if name.endswith(".gif") else 0)
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (DOCS / target).exists(), target
