"""The registry of families: what it imports and when; and the trainer's DiT, through the same chain as the U-Net."""

import numpy as np
import pytest
import torch

from epsrt import Sampler, Schedule, noise
from epsrt.parity.measure import worst_psnr
from epsrt.timesteps import spaced
from epsrt.verify import verify
from epsrt_export import export
from epsrt_export.redraw import redraw
from epsrt_trainer.checkpoint import save_checkpoint
from epsrt_trainer.dit import DiT, DiTConfig
from epsrt_trainer.sample import ddim_loop
from helpers import run_python

FOREIGN = ("diffusers", "denoising_diffusion_pytorch", "torchvision", "transformers", "accelerate")
LOAD = """
import sys
from epsrt_export import families
try:
    families.load(sys.argv[1], sys.argv[2])
except ValueError as error:
    print(type(error).__name__, error)
print([name for name in sys.argv[3].split(",") if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("epsrt", "BundleError nowhere does not exist"),
        ("guided-diffusion", "BundleError nowhere does not exist"),
        ("diffusers", "InputError --from diffusers needs diffusers: pip install diffusers"),
    ],
)
def test_only_the_family_that_is_asked_for_is_imported(family, message):
    done = run_python(LOAD, family, "nowhere", ",".join(FOREIGN), blocked=FOREIGN)
    assert done.returncode == 0, done.stderr
    said, imported = done.stdout.strip().splitlines()
    assert said.startswith(message)
    assert imported == "[]"


@pytest.mark.parametrize("features", ["sinusoidal", "fourier"])
def test_a_dit_of_the_trainer(tmp_path, features):
    schedule = Schedule(T=100, beta_start=1e-3, beta_end=0.2)
    config = DiTConfig(1, 8, width=32, depth=2, heads=2, classes=3, null_label=True, time_features=features)
    network = redraw(DiT(config), schedule, (1, 8, 8), classes=4)
    path = save_checkpoint(tmp_path / "dit.safetensors", network, config, schedule)
    bundle = export(path, tmp_path / "dit.epsrt", max_batch=4, precisions=("fp32",))
    p = bundle.manifest.provenance
    assert (p.network, p.family, p.config["time_features"]) == ("epsrt_trainer.dit.DiT", "epsrt", features)
    x = torch.from_numpy(noise.normals(7, range(4), noise.START, 0, 64).reshape(4, 1, 8, 8))
    labels = [0, 1, 2, 3]
    truth = ddim_loop(lambda x, t: network(x, t, torch.tensor(labels)), schedule, x, spaced(schedule, 20)).numpy()
    with Sampler.open(bundle.path, "onnxruntime", threads=1) as sampler:
        images = sampler.sample(4, steps=20, seed=7, labels=[0, 1, 2, None], rederive=False)
        assert all(rung.passed for rung in verify(sampler.engine))
    assert 0.2 < truth.std() < 1
    assert np.abs(truth[0] - truth[1]).max() > 0.1
    assert worst_psnr(images, truth, (-1.0, 1.0)) > 100
