"""Every page runs: its Python and its command lines, in order, in one folder. And what the pages name exists.

Blocks marked `python` and `sh` run. `console` blocks are only shown: they need a GPU, hours or somebody's files.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from typer.main import get_command

from epsrt import Bundle, Plan, Sampler
from epsrt.request import Arguments
from epsrt.solvers import METHODS, options_of
from epsrt_command.app import app
from epsrt_export import export_network
from epsrt_export.families import FAMILIES
from epsrt_trainer.checkpoint import save_checkpoint
from epsrt_trainer.latents import Latents
from epsrt_trainer.networks import build
from epsrt_trainer.presets import PRESETS
from helpers import write_keys
from nets import tiny

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}
BLOCK = re.compile(r"^```(python|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = {page: BLOCK.findall(text) for page, text in TEXTS.items()}


def lines(block: str) -> list[str]:
    return block.replace("\\\n", " ").splitlines()


def commands(page: str, *kinds: str) -> list[list[str]]:
    """The words of each `epsrt` line of a page, without the first."""
    shown = [line for kind, block in BLOCKS[page] if kind in kinds for line in lines(block)]
    return [shlex.split(line)[1:] for line in shown if line.startswith("epsrt ")]


def runs(page: str) -> bool:
    return bool(commands(page, "sh") or any(kind == "python" for kind, _ in BLOCKS[page]))


RUN = [page for page in TEXTS if runs(page)]


def real_digits(folder: Path) -> None:
    folder.mkdir()
    for digit, image in enumerate(load_digits().images[:10]):
        Image.fromarray((image / 16 * 255).astype(np.uint8)).save(folder / f"{digit}.png")


def latent_digits(path: Path) -> None:
    preset, coder = PRESETS["digits-latent"], PRESETS["digits-autoencoder"].network
    latents = Latents(build(coder), (2.0, 2.0), (0.0, 0.5))
    save_checkpoint(path, build(preset.network), preset.network, preset.schedule, autoencoder=latents)


@pytest.fixture(scope="module")
def materials(request, once, schedule) -> dict[str, Callable[[Path], object]]:
    """What pages find in their folder, by its name there: small networks in place of trained ones."""

    def copied(fixture: str) -> Callable[[Path], object]:
        path = Path(request.getfixturevalue(fixture))
        return partial(shutil.copytree if path.is_dir() else shutil.copy, path)

    canvas = {"shape": (1, 8, 8), "classes": 10, "null_label": 10, "masked": True, "sizes": (2, 16), "max_batch": 4}
    return {
        "examples": lambda path: path.symlink_to(ROOT / "examples"),
        "out/digits.safetensors": lambda path: copied("checkpoint_path")(path),
        "out/digits-latent.safetensors": latent_digits,
        "out/digits.epsrt": lambda path: copied("bundle_path")(path),
        "out/gallery.epsrt": lambda path: copied("edited_bundle_path")(path),
        "out/canvas.epsrt": lambda path: export_network(
            tiny(seed=3, classes=11), schedule, path, precisions=("fp32",), **canvas
        ),
        "out/latent.epsrt": lambda path: copied("latent_bundle_path")(path),
        "out/real": real_digits,
        "private.pem": lambda path: write_keys(path.parent),
    }


@pytest.fixture(scope="module")
def ran(materials, tmp_path_factory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """ran(page): the folder in which its blocks were run, once, and the names that its Python left."""
    done: dict[str, tuple[Path, dict[str, Any]]] = {}

    def run(page: str) -> tuple[Path, dict[str, Any]]:
        if page not in done:
            folder = tmp_path_factory.mktemp("page")
            done[page] = folder, {"__name__": "page"}
            furnish(page, folder, materials)
            with pytest.MonkeyPatch.context() as patched, torch.random.fork_rng():
                patched.chdir(folder)
                for kind, block in BLOCKS[page]:
                    if kind == "python":
                        exec(block, done[page][1])
                    for line in lines(block) if kind == "sh" else []:
                        if line.startswith("epsrt "):
                            command(shlex.split(line)[1:], folder)
        return done[page]

    yield run
    for _, names in done.values():
        for value in names.values():
            if isinstance(value, Sampler):
                value.close()


def furnish(page: str, folder: Path, materials: dict[str, Callable[[Path], object]]) -> None:
    """Put what a page's blocks name, and do not make themselves, into its folder."""
    text = "".join(block for kind, block in BLOCKS[page] if kind != "console")
    made = {words[2] for words in commands(page, "sh") if words[0] == "export"}
    (folder / "out").mkdir()
    for name, make in materials.items():
        if re.search(rf"\b{re.escape(name)}\b", text) and name not in made:
            make(folder / name)


def command(words: list[str], folder: Path) -> None:
    """Run a command of a page. Training takes two steps, beside the file that the page would have after minutes."""
    if words[0] == "train":
        out = words.index("--out") + 1
        words = [*words[:out], str(folder / "two-steps.safetensors"), *words[out + 1 :], "--set", "train.steps=2"]
    app(words, standalone_mode=False)
    for flag in ("--out", "--trajectory"):
        if flag in words:
            assert (folder / words[words.index(flag) + 1]).exists(), words


@pytest.mark.parametrize("page", RUN)
def test_a_page_runs(ran, page, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    ran(page)


def test_the_readmes_commands_run_when_pasted_whole(tmp_path, materials):
    """In one shell, as they stand. Some shells take no comment at a line's end."""
    furnish("README.md", tmp_path, materials)
    blocks = [block for kind, block in BLOCKS["README.md"] if kind == "sh" and "epsrt sample" in block]
    assert blocks
    (tmp_path / "bin").mkdir()
    shim = tmp_path / "bin" / "epsrt"
    shim.write_text(f"#!{sys.executable}\nfrom epsrt_command import main\nmain()\n")
    shim.chmod(0o755)
    env = {**os.environ, "PATH": f"{shim.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-eu"], input="".join(blocks), text=True, cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "first.png").exists()


@pytest.mark.parametrize("page", TEXTS)
def test_what_a_page_names_exists(page):
    text = TEXTS[page]
    known = get_command(app).commands
    for words in commands(page, "sh", "console"):
        name = words[0]
        assert name in known, words
        options = {o for p in known[name].params for o in (*p.opts, *p.secondary_opts)}
        given = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word) and "=" not in word[:2]}
        assert words[1:2] == ["compare"] or given <= options | {"--help"}, words
    for block in (block for kind, block in BLOCKS[page] if kind in ("sh", "console")):
        assert " # " not in block, "a comment at a line's end breaks a pasted line in some shells"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r'pip install (?:-e )?"(?:epsrt|\.)\[([^\]]+)\]', text):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    if page != "docs/design.md":
        assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets
    for path in re.findall(r"\b(?:python|pytest) ((?:benchmarks|examples|tests)/[\w/.-]+)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:runtime|export|trainer|command|tests|benchmarks|examples)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(test_\w+)`", text):
        assert any(f"def {name}(" in file.read_text() for file in (ROOT / "tests").rglob("test_*.py")), name
    for family in re.findall(r"--from ([a-z-]+)", text):
        assert family in FAMILIES


def test_the_readmes_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXTS["README.md"] + TEXTS["CONTRIBUTING.md"]):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_docstrings_become_markdown():
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "tools" / "docstrings.py")
    docstrings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docstrings)
    entries = "n, m   two numbers,\n       whole\nseed   one\nlonger of three words"
    made = docstrings.markdown(f"What it is.\n\n{entries}\n\n>>> f(1)\n2\n\n    x = 1   a formula")
    assert "- `n, m`: two numbers, whole\n- `seed`: one\n- `longer`: of three words\n" in made
    assert "```pycon\n>>> f(1)\n2\n```" in made
    assert made.startswith("What it is.\n")
    assert made.endswith("\n    x = 1   a formula")


def test_the_table_of_methods_is_the_programs():
    rows = {}
    for line in TEXTS["docs/reference/samplers.md"].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and re.fullmatch(r"`[a-z0-9-]+`", cells[0]):
            rows[cells[0].strip("`")] = cells
    assert list(rows) == list(METHODS)
    for name, (_, order, evaluations, stochastic, options, paper) in rows.items():
        method = METHODS[name]
        assert (order, evaluations) == (str(method.order), method.evaluations)
        assert stochastic == (method.stochastic if method.stochastic in ("no", "yes") else f"{method.stochastic} > 0")
        assert paper
        if options != "the same":
            assert [o.strip("` ") for o in options.split(",") if o.strip()] == list(options_of(name))


def test_the_samplers_page_makes_plans(ran):
    assert isinstance(ran("docs/reference/samplers.md")[1]["plan"], Plan)


EDITING = "docs/how-to/guide-and-edit.md"


def test_the_editing_page_edits(ran):
    names = ran(EDITING)[1]
    assert names["x"].shape == (4, 1, 12, 12)
    assert np.array_equal(names["x"][..., 2:10, 2:10], np.repeat(names["real"][[3]], 4, 0))
    assert names["again"].shape == names["real"].shape
    assert np.square((names["again"] - names["real"]) / 2).mean() < 0.05
    assert names["strip"].shape == (9, 1, 8, 8)
    assert names["images"].shape == (4, 8, 8, 1)


def test_the_editing_pages_options_exist():
    known = get_command(app).commands
    options = {o for c in ("sample", "export") for p in known[c].params for o in (*p.opts, *p.secondary_opts)}
    assert set(re.findall(r"`(--[a-z-]+)`", TEXTS[EDITING])) <= options
    arguments = {*Arguments.__annotations__, "invert", "latents", "stream", "slerp"}
    table = re.search(r"\n\| feature .*?\n\n", TEXTS[EDITING], re.DOTALL)
    for row in table[0].strip().splitlines()[2:]:
        assert set(re.findall(r"`([a-z_]+)`", row.split("|")[2])) <= arguments


NETWORKS = "docs/how-to/your-network.md"
BUNDLES = {
    **dict.fromkeys(("any", "sized", "labml", "unit-2", "sequence", "volume"), "epsilon"),
    **dict.fromkeys(("ncsn", "sde"), "score"),
    "edm": "edm",
    "flow": "velocity",
    "unit-1": "x0",
}


def test_every_kind_of_network_is_exported(ran):
    folder, names = ran(NETWORKS)
    assert sorted(path.name for path in folder.glob("*.epsrt")) == sorted(f"{name}.epsrt" for name in BUNDLES)
    assert names["images"].shape == (4, 8, 8, 3)
    assert names["x"].shape == (4, 3, 8, 8)
    assert names["wide"].shape == (4, 3, 16, 24)
    assert names["sequences"].shape == (4, 3, 64)
    assert names["volumes"].shape == (4, 3, 4, 8, 8)


@pytest.mark.parametrize("name", BUNDLES)
def test_none_of_their_gates_is_blind(ran, name):
    bundle = Bundle.open(ran(NETWORKS)[0] / f"{name}.epsrt")
    assert bundle.manifest.prediction == BUNDLES[name]
    assert all(rung.passed for rung in bundle.parity())
    golden = bundle.golden()
    for name, run in golden.trajectories.items():
        assert 0.2 < run.x.std() < 0.9, name
        assert np.abs(run.x[0] - run.x[1]).max() > 0.3
    assert (np.square(golden.network.out).reshape(len(golden.network.out), -1).mean(1) > 1e-6).all()


@pytest.mark.parametrize(
    ("name", "method", "steps"),
    [
        *(("ncsn", "dpmpp-2m", 50), ("sde", "dpmpp-2m", 50), ("flow", "flow-heun", 30), ("flow", "ddim", 50)),
        *(("labml", "dpmpp-2m", 50), ("sequence", "dpmpp-2m", 50), ("volume", "dpmpp-2m", 50)),
    ],
)
def test_the_adapters_give_the_data(ran, name, method, steps):
    """The networks know nearly N(0, ½²): a sign, a direction or a level that is wrong would not end there."""
    with Sampler.open(ran(NETWORKS)[0] / f"{name}.epsrt", "onnxruntime", threads=1) as sampler:
        images = sampler.sample(32, method=method, steps=steps, clip=None)
    assert images.mean() == pytest.approx(0, abs=0.1)
    assert images.std() == pytest.approx(0.5, rel=0.3)
