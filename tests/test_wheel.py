"""The wheel in a bare environment: it samples without torch and onnx, and says what the command needs."""

import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from epsrt import Sampler

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SAMPLE = """
import importlib.util, sys
import numpy as np
from epsrt import Sampler
from epsrt.verify import verify
for name in ("torch", "onnx", "onnxscript", "typer", "rich", "sklearn"):
    assert importlib.util.find_spec(name) is None, name
with Sampler.open(sys.argv[1]) as sampler:
    np.save(sys.argv[2], sampler.sample(4, method="ddpm", steps=20, seed=6, labels=[0, 3, 9, None]))
    assert all(rung.passed for rung in verify(sampler.engine))
"""


def run(*command):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "pip", "wheel", ROOT, "--no-deps", "--no-build-isolation", "--quiet", "-w", out)
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("epsrt-*.whl")
    return made


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """The bin directory of an environment with the wheel and its extra [cpu] alone."""
    home = tmp_path_factory.mktemp("bare")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    done = run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{wheel}[cpu]")
    if done.returncode and any(word in done.stderr for word in ("No matching distribution", "onnection", "Retrying")):
        pytest.skip(f"pip cannot reach an index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return home / "bin"


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    import zipfile

    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {
        "epsrt",
        "epsrt_command",
        "epsrt_export",
        "epsrt_trainer",
    }
    assert {f"{package}/py.typed" for package in ("epsrt", "epsrt_command", "epsrt_export", "epsrt_trainer")} <= set(
        names
    )
    assert "epsrt/engines/gpu/kernels.cu" in names
    assert not [name for name in names if any(word in name for word in ("__pycache__", "test", "example", ".epsrt/"))]


def test_a_bare_environment_samples_the_same(bare, bundle_path, tmp_path):
    done = run(bare / "python", "-I", "-c", SAMPLE, bundle_path, tmp_path / "x.npy")
    assert done.returncode == 0, done.stderr
    with Sampler.open(bundle_path, "onnxruntime") as sampler:
        mine = sampler.sample(4, method="ddpm", steps=20, seed=6, labels=[0, 3, 9, None])
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), mine, rtol=0, atol=1e-5)


def test_the_bare_environment_is_small(bare):
    done = run(bare / "python", "-m", "pip", "list", "--format", "freeze")
    names = {line.split("==")[0].lower() for line in done.stdout.splitlines()}
    assert {"epsrt", "numpy", "msgspec", "safetensors", "onnxruntime"} <= names
    assert not names & {"torch", "onnx", "onnxscript", "scipy", "typer", "rich", "pillow"}


def test_the_command_without_its_extra_prints_one_sentence(bare):
    done = run(bare / "epsrt", "--help")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert 'pip install "epsrt[cli]"' in done.stderr
