"""docs/how-to/your-network.md: its Python runs, and what it exports is no check of nothing."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from epsrt import Bundle, Sampler

PAGE = (Path(__file__).parents[1] / "docs" / "how-to" / "your-network.md").read_text()
BUNDLES = {"any": "epsilon", "sized": "epsilon", "edm": "edm", "ncsn": "score", "sde": "score", "flow": "velocity"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder in which the page's blocks were run, and the names that they left."""
    folder, names = tmp_path_factory.mktemp("docs"), {"__name__": "networks"}
    with pytest.MonkeyPatch.context() as patched, torch.random.fork_rng():
        patched.chdir(folder)
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(block, names)
    return folder, names


def test_every_family_is_exported(ran):
    folder, names = ran
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.epsrt" for name in BUNDLES)
    assert names["images"].shape == (4, 8, 8, 3)
    assert names["x"].shape == (4, 3, 8, 8)
    assert names["wide"].shape == (4, 3, 16, 24)


@pytest.mark.parametrize("name", BUNDLES)
def test_none_of_the_gates_is_blind(ran, name):
    bundle = Bundle.open(ran[0] / f"{name}.epsrt")
    assert bundle.manifest.prediction == BUNDLES[name]
    assert all(rung.passed for rung in bundle.parity())
    kept = bundle.golden()
    for key in (k for k in kept if k.startswith("trajectory.") and k.endswith(".x")):
        assert 0.2 < kept[key].std() < 0.9, key
        assert np.abs(kept[key][0] - kept[key][1]).max() > 0.3
    assert (np.square(kept["network.out"]).mean((1, 2, 3)) > 1e-6).all()


@pytest.mark.parametrize(
    ("name", "method", "steps"),
    [("ncsn", "dpmpp-2m", 50), ("sde", "dpmpp-2m", 50), ("flow", "flow-heun", 30), ("flow", "ddim", 50)],
)
def test_the_adapters_give_the_data(ran, name, method, steps):
    """The networks know nearly N(0, ½²): a sign, a direction or a level that is wrong would not end there."""
    with Sampler.open(ran[0] / f"{name}.epsrt", "onnxruntime", threads=1) as sampler:
        images = sampler.sample(32, method=method, steps=steps, clip=None)
    assert images.mean() == pytest.approx(0, abs=0.1)
    assert images.std() == pytest.approx(0.5, rel=0.3)


def test_the_pages_links_and_families_are_real():
    from epsrt_export.families import FAMILIES

    for family in re.findall(r"--from ([a-z-]+)", PAGE):
        assert family in FAMILIES
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (Path(__file__).parents[1] / "docs" / "how-to" / target).exists()
