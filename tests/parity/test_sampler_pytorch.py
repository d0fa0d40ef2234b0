"""The whole way, against the module that was exported: loops written from the papers, and the network itself."""

import numpy as np
import pytest
import torch

from epsrt import noise
from epsrt.parity.measure import network_outputs, relative_l2
from epsrt.timesteps import spaced
from epsrt_trainer.sample import ddim_loop, ddpm_loop

STEPS = 8


@pytest.mark.parametrize("loop", [ddpm_loop, ddim_loop])
def test_samples_are_pytorchs(sampler, network, schedule, loop):
    label, index = [3, 10, 7, 0], np.arange(4)
    ts = spaced(schedule.T, STEPS, "linspace")
    x = torch.from_numpy(noise.normals(11, index, noise.START, 0, 64).reshape(4, 1, 8, 8))

    def draw(i):
        return torch.from_numpy(noise.normals(11, index, noise.STEP, i, 64).reshape(4, 1, 8, 8))

    truth = loop(lambda x, t: network(x, t, torch.tensor(label)), schedule, x, ts, draw)
    method = loop.__name__.removesuffix("_loop")
    own = {"rederive": False} if method == "ddim" else {}  # the loop takes the network's own ε
    asked = [None if each == 10 else each for each in label]
    mine = sampler.sample(method=method, steps=STEPS, spacing="linspace", seed=11, labels=asked, **own)
    np.testing.assert_allclose(mine, truth.numpy(), rtol=0, atol=3e-5)


def test_network_outputs_are_the_networks_in_any_batch(engine, network):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((5, 1, 8, 8), np.float32)
    t, label = np.array([0, 30, 99, 30, 7], np.float32), np.array([0, 10, 3, 4, 5])
    with torch.no_grad():
        truth = network(torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(label)).numpy()
    for batch in (1, 2, 5, 8):
        given = [{"label": each} for each in label]
        assert relative_l2(network_outputs(engine, x, t, given, batch), truth) < 2e-6


def test_the_networks_of_the_tests_are_not_blind(network, plain_network):
    """No parameter is still zero, and out has RMS 0.5 to 2 on N(0, 1), whatever t and label are."""
    for module, shape, label in ((network, (1, 8, 8), (torch.arange(32) % 11,)), (plain_network, (3, 8, 8), ())):
        assert all(p.abs().max() > 1e-3 for p in module.parameters())
        x = torch.randn(32, *shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            out = module(x, torch.linspace(0, 99, 32), *label)
            other = module(x, torch.linspace(99, 0, 32), *label)
        assert 0.5 < float(out.square().mean().sqrt()) < 2
        assert float((out - other).abs().max()) > 0.1
