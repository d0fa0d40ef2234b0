"""The runtime runs where torch and onnx cannot be imported."""

import pytest

from helpers import run_python

BLOCKED = ("torch", "onnx", "onnxscript", "onnx_ir", "epsrt_export", "epsrt_trainer", "diffusers", "sklearn", "scipy")
WALK = """
import importlib, pkgutil, sys
from epsrt import EpsrtError
package = importlib.import_module(sys.argv[1])
names = [module.name for module in pkgutil.walk_packages(package.__path__, sys.argv[1] + ".")]
for name in names:
    try:
        importlib.import_module(name)
    except EpsrtError as error:  # other extras may be missing here; torch and onnx must not be missed
        assert any(f"epsrt[{extra}]" in str(error) for extra in ("gpu", "tensorrt", "charts", "signing")), error
print(*names)
assert not set(sys.modules) & {"torch", "onnx"}
"""


@pytest.mark.parametrize(
    ("package", "some"),
    [
        ("epsrt", {"epsrt.sampler", "epsrt.prepare", "epsrt.engines.cpu.onnxruntime"}),
        ("epsrt_command", {"epsrt_command.app", "epsrt_command.commands.train", "epsrt_command.commands.export"}),
    ],
)
def test_every_module_is_imported_without_torch_and_onnx(package, some):
    done = run_python(WALK, package, blocked=BLOCKED)
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert some <= set(names)
    assert len(names) >= 20


def test_importing_epsrt_loads_no_engine_and_no_command():
    code = "import sys, epsrt; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(run_python(code, blocked=BLOCKED).stdout.split())
    assert {"epsrt", "numpy", "msgspec", "safetensors"} <= loaded
    assert not loaded & {"onnxruntime", "typer", "click", "rich", "PIL"}


def test_the_blocker_blocks():
    for name in ("torch", "onnx", "epsrt_export"):
        done = run_python(f"import {name}", blocked=BLOCKED)
        assert done.returncode == 1
        assert f"No module named '{name}'" in done.stderr


def test_sampling_needs_no_torch(plain_bundle_path, plain_sampler, tmp_path):
    import numpy as np

    code = """
import sys
import numpy as np
from epsrt import Sampler
from epsrt.verify import verify
with Sampler.open(sys.argv[1], "onnxruntime", threads=1) as sampler:
    np.save(sys.argv[2], sampler.sample(3, steps=5, seed=7))
    assert all(rung.passed for rung in verify(sampler.engine))
"""
    done = run_python(code, plain_bundle_path, tmp_path / "x.npy", blocked=BLOCKED)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), plain_sampler.sample(3, steps=5, seed=7))
